"""One daemon of a local centre: a process that is started as often as it must be."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from puhui.cli.daemon_log import exit_words, reason_in
from puhui.rpc.errors import Refusal
from puhui.rpc.notify import ReadySocket

__all__ = ["LocalDaemon"]


class LocalDaemon:
    """A daemon, child of this process. It keeps the address that it got at its first start.

    Args:
        name: distinguishes it from every other daemon of this `puhui up`.
        title: what people read, such as "nodedaemon of local-2".
        module: the Python package that is run.
        arguments: returns those of `serve`, given the address to listen at; "" is for the first start.
        log: file that it writes to. That of the last `puhui up` is kept beside it.
    """

    def __init__(
        self, name: str, title: str, module: str, arguments: Callable[[str], Sequence[str]], log: Path
    ) -> None:
        self.name = name
        self.title = title
        self.log = log
        self.address = ""
        self.module = module
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: ReadySocket | None = None
        self._descriptor = -1
        self._log_begin = 0
        self._started = False

    @property
    def pid(self) -> int | None:
        """Its process; None while it does not run."""
        return self._process.pid if self._process is not None else None

    @property
    def ended_fd(self) -> int | None:
        """A descriptor that becomes readable when it ends; None while it does not run."""
        return self._descriptor if self._process is not None else None

    @property
    def ready_fd(self) -> int | None:
        """A descriptor that becomes readable when it may have become ready; None while it is not awaited."""
        return self._ready.fileno() if self._ready is not None else None

    def launch(self) -> None:
        """Starts the process. `ready_fd` and `ended_fd` tell what becomes of it."""
        if not self._started and self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))
        self._started = True
        self._ready = ready = ReadySocket()
        try:
            with self.log.open("ab") as output:
                self._log_begin = output.tell()
                self._process = subprocess.Popen(
                    [sys.executable, "-m", self.module, "serve", *self._arguments(self.address)],
                    env={**os.environ, "NOTIFY_SOCKET": ready.path},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # Ctrl-C is for `puhui up` alone, which stops its daemons in order.
                    start_new_session=True,
                )
            self._descriptor = os.pidfd_open(self._process.pid)
        except OSError:
            self._awaited_no_more()
            raise

    def became_ready(self) -> bool:
        """Reads what came at `ready_fd`, and says whether it was that the daemon is ready."""
        address = self._ready.receive() if self._ready is not None else None
        if address is None:
            return False
        self.address = self.address or address
        self._awaited_no_more()
        return True

    def reap(self) -> str:
        """Takes leave of the process, which has ended, and returns how, in words."""
        if self._process is None:
            return ""
        before = " before it was ready" if self._ready is not None else ""
        words = exit_words(self._process.wait()) + before
        self._process = None
        os.close(self._descriptor)
        self._awaited_no_more()
        return words

    def kill(self) -> None:
        """Kills the process; `reap` has to follow."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def terminate(self) -> None:
        """Asks the process to end."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait_or_kill(self, patience_s: float) -> None:
        """Waits until the process has ended, and kills it when it does not."""
        if self._process is None:
            return
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
        self.reap()

    def reason(self) -> str:
        """Returns why it ended, as far as what it wrote since its last start says so; "" is unknown."""
        return reason_in(self.log, self._log_begin)

    def failed(self, what: str) -> Refusal:
        """Returns the refusal that says that it cannot be had: UNAVAILABLE with DAEMON_FAILED."""
        reason = self.reason()
        return Refusal(
            grpc.StatusCode.UNAVAILABLE,
            "DAEMON_FAILED",
            f"the {self.title} {what}{': ' if reason else ''}{reason}; its log is {self.log}",
            daemon=self.name,
            log=str(self.log),
        )

    def _awaited_no_more(self) -> None:
        if self._ready is not None:
            with contextlib.suppress(OSError):  # its folder may be gone with /tmp
                self._ready.close()
        self._ready = None
