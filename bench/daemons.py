"""A daemon of this project, as a process, for the length of a block."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from puhui.rpc.notify import ReadySocket

__all__ = ["daemon", "open_folder"]

_START_S = 60.0
_STOP_S = 30.0


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """Makes a folder that the containers' user can pass through, and removes it when the block ends."""
    # The containers' user must be able to reach the state, so it cannot lie in a private home.
    with tempfile.TemporaryDirectory(prefix="puhui-bench-", dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


@contextlib.contextmanager
def daemon(module: str, arguments: Sequence[str], log: Path) -> Iterator[str]:
    """Runs `python -m module serve *arguments` until the block ends, and yields the address that it serves.

    Raises:
        RuntimeError: it did not start; the text holds what it said.
    """
    with ReadySocket() as ready:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "serve", *arguments, "--log-level", "warning"],
                env={**os.environ, "NOTIFY_SOCKET": ready.path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            try:
                address = ready.wait(process.pid, _START_S)
            except (ChildProcessError, TimeoutError) as error:
                raise RuntimeError(f"{module} did not start ({error}):\n{log.read_text()}") from error
            yield address
        finally:
            process.terminate()
            process.wait(_STOP_S)
