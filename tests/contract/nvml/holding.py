"""Other processes of the node: those that hold a slice's cap node open, and those that call NVML."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.contract.nvml.conftest import CARDS

HOLD = "import sys; held = open(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
"""Holds a node and does nothing."""

BURN = """
import sys, time
held = open(sys.argv[1])
while True:
    print('burnt', flush=True)
    until = time.process_time() + 0.15
    while time.process_time() < until:
        pass
"""
"""Holds a node and never rests; prints a line for every 150 ms of CPU time."""

OTHER = f"""
import sys
from pathlib import Path
import pynvml
from nodedaemon.emulation import install, parse_cards
from tests.contract.nvml import calls
install(Path(sys.argv[1]), parse_cards({CARDS!r}))
pynvml.nvmlInit()
device = pynvml.nvmlDeviceGetHandleByIndex(0)
"""
"""Another process of the same node, with the H100 as ``device``."""


@contextmanager
def python_process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that lives until the block ends, and has printed its first line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline(), "the process died before its first line"
            yield process
        finally:
            process.kill()
