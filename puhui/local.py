"""A centre of one's own for the length of a block: for tests, notebooks, benchmarks and demonstrations.

    from puhui.client import Centre
    from puhui.local import local_centre

    with local_centre("H100-80GB-SXM5:1") as address, Centre(address) as centre:
        ...

It is what `puhui up` runs, with emulated cards, on a free port and with a state directory that is removed in the end.
Jobs that have not ended by then are cancelled, since nobody could find them again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from puhui.cli.local_state import local_addresses
from puhui.client import Centre, Refusal
from puhui.rpc.notify import ReadySocket
from puhui.v1 import job_pb2
from puhui.v1.job_service_pb2 import JobFilter

__all__ = ["local_centre", "local_centres"]

_START_S = 120.0
_STOP_S = 60.0
_END_S = 30.0
_ACTIVE = (
    job_pb2.JOB_STATE_QUEUED,
    job_pb2.JOB_STATE_STARTING,
    job_pb2.JOB_STATE_RUNNING,
    job_pb2.JOB_STATE_IDLE,
    job_pb2.JOB_STATE_RESUMING,
    job_pb2.JOB_STATE_STOPPING,
)


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
    with local_centres([emulate], runtime, state) as addresses:
        yield next(iter(addresses.values()))


@contextlib.contextmanager
def local_centres(emulate: Sequence[str], runtime: str = "auto", state: Path | None = None) -> Iterator[dict[str, str]]:
    """Runs several centres, peers of each other, until the block ends.

    Args:
        emulate: emulated cards of each, "MODEL:COUNT,...".
        runtime: "auto", "podman" or "process" (no isolation).
        state: an existing directory that is kept; None is a new one that is removed in the end.

    Yields:
        The address of each control plane, by the name of its centre.

    Raises:
        RuntimeError: they did not start; the text holds what `puhui up` said.
    """
    # The containers' user must be able to reach the state, so it cannot lie in a private home.
    folder = state or Path(tempfile.mkdtemp(prefix="puhui-", dir="/var/tmp"))
    if state is None:
        folder.chmod(0o711)
    log = folder / "up.log"
    command = [sys.executable, "-m", "puhui.cli", "up", "--port", "0", "--state", str(folder), "--runtime", runtime]
    command += ["--centers", str(len(emulate)), *(word for cards in emulate for word in ("--emulate", cards))]
    try:
        with ReadySocket() as ready, log.open("wb") as output:
            up = subprocess.Popen(
                command,
                env={**os.environ, "NOTIFY_SOCKET": ready.path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C is for the block; the centres are stopped when the block has ended.
                start_new_session=True,
            )
            try:
                try:
                    ready.wait(up.pid, _START_S)
                except (ChildProcessError, TimeoutError) as error:
                    raise RuntimeError(f"the centre did not start ({error}):\n{log.read_text()}") from error
                addresses = local_addresses({"PUHUI_LOCAL_STATE": str(folder)})
                try:
                    yield addresses
                finally:
                    if state is None:
                        for address in addresses.values():
                            _end_jobs(address)
            finally:
                up.terminate()
                up.wait(_STOP_S)
    finally:
        if state is None:
            shutil.rmtree(folder, ignore_errors=True)


def _end_jobs(address: str) -> None:
    """Cancels what has not ended and waits until it has, so that no container outlives the centre."""
    with contextlib.suppress(Refusal), Centre(address) as centre:
        jobs = list(centre.jobs(JobFilter(states=_ACTIVE)))
        for job in jobs:
            centre.cancel(job.id, "the centre of its own is stopped")
        for job in jobs:
            centre.wait(job.id, timeout_s=_END_S)
