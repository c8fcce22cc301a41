"""A centre of one's own for the length of a block: for tests, notebooks, benchmarks and demonstrations.

    from puhui.client import Centre
    from puhui.local import local_centre

    with local_centre("H100-80GB-SXM5:1") as address, Centre(address) as centre:
        ...

It is what `puhui up` runs, with emulated cards, on a free port and with a state directory that is removed in the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from puhui.rpc.notify import ReadySocket

__all__ = ["local_centre"]

_START_S = 60.0
_STOP_S = 60.0


@contextlib.contextmanager
def local_centre(emulate: str, runtime: str = "auto", state: Path | None = None) -> Iterator[str]:
    """Runs a centre with emulated cards until the block ends, and yields the address of its control plane.

    Args:
        emulate: emulated cards, "MODEL:COUNT,...".
        runtime: "auto", "podman" or "process" (no isolation).
        state: an existing directory that is kept; None is a new one that is removed in the end.

    Raises:
        RuntimeError: it did not start; the text holds what `puhui up` said.
    """
    # The containers' user must be able to reach the state, so it cannot lie in a private home.
    folder = state or Path(tempfile.mkdtemp(prefix="puhui-", dir="/var/tmp"))
    if state is None:
        folder.chmod(0o711)
    log = folder / "up.log"
    command = [sys.executable, "-m", "puhui.cli", "up", "--port", "0", "--state", str(folder)]
    try:
        with ReadySocket() as ready, log.open("wb") as output:
            up = subprocess.Popen(
                [*command, "--emulate", emulate, "--runtime", runtime],
                env={**os.environ, "NOTIFY_SOCKET": ready.path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            try:
                try:
                    address = ready.wait(up.pid, _START_S)
                except (ChildProcessError, TimeoutError) as error:
                    raise RuntimeError(f"the centre did not start ({error}):\n{log.read_text()}") from error
                yield address
            finally:
                up.terminate()
                up.wait(_STOP_S)
    finally:
        if state is None:
            shutil.rmtree(folder, ignore_errors=True)
