"""Starts real daemons as processes and awaits that they are ready."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from puhui.rpc.notify import ReadySocket


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A directory that the containers' user can pass through. pytest's own are private, and made so again and again."""
    with tempfile.TemporaryDirectory(prefix="puhui-test-", dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


@dataclass
class Daemon:
    """A running daemon."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def kill(self) -> None:
        """Kills it as a crash would, and reaps it."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float = 20) -> int:
        """Asks it to stop, and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def daemon(
    module: str, arguments: Sequence[str], log: Path, timeout_s: float = 30, within: Sequence[str] = ()
) -> Iterator[Daemon]:
    """Runs `python -m module serve *arguments` until the block ends.

    Args:
        module: of the daemon.
        arguments: of its command.
        log: what it says is appended to this file.
        timeout_s: it must be ready by then.
        within: command that becomes it, such as one that enters a namespace.
    """
    with ReadySocket() as ready:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*within, sys.executable, "-m", module, "serve", *arguments],
                env={**os.environ, "NOTIFY_SOCKET": ready.path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            address = ready.wait(process.pid, timeout_s)
        except (ChildProcessError, TimeoutError) as error:
            process.kill()
            process.wait()
            raise AssertionError(f"{module} did not start: {error}\n{log.read_text()}") from error
        running = Daemon(process, address, log)
        try:
            yield running
        finally:
            if process.poll() is None:
                running.stop()
