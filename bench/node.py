"""A node daemon with emulated cards for the length of a block."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from puhui.rpc.notify import ReadySocket

_START_S = 60.0
_STOP_S = 30.0


@dataclass(frozen=True)
class NodeDaemon:
    """A daemon that serves."""

    address: str
    state: Path


@contextlib.contextmanager
def node_daemon(cards: str) -> Iterator[NodeDaemon]:
    """Runs a daemon until the block ends, with a state directory that is removed then.

    Args:
        cards: emulated cards, "MODEL:COUNT,...".

    Raises:
        RuntimeError: it did not start; the text holds what it said.
    """
    # The containers' user must be able to reach the state, so it cannot lie in a private home.
    with tempfile.TemporaryDirectory(prefix="puhui-bench-", dir="/var/tmp") as name, ReadySocket() as ready:
        folder = Path(name)
        folder.chmod(0o711)
        log, state = folder / "node.log", folder / "node"
        arguments = ["serve", "--listen", "127.0.0.1:0", "--state", str(state), "--emulate", cards]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "nodedaemon", *arguments, "--log-level", "warning"],
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
                raise RuntimeError(f"the node daemon did not start ({error}):\n{log.read_text()}") from error
            yield NodeDaemon(address, state)
        finally:
            process.terminate()
            process.wait(_STOP_S)
