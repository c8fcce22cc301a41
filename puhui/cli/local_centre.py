"""A whole centre in processes of this machine: one control plane, one node daemon with emulated cards."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from puhui.cli.daemon_log import exit_words, reason_in
from puhui.cli.local_state import ProcessId, Record, StateFolder
from puhui.rpc.errors import Refusal
from puhui.rpc.notify import ReadySocket

__all__ = ["LocalCentre", "LocalOptions"]

_START_S = 60.0
_STOP_S = 20.0


@dataclass(frozen=True)
class LocalOptions:
    """What a local centre is to be like."""

    emulate: str
    """Emulated cards, "MODEL:COUNT,..."."""
    port: int
    """Port of the control plane on loopback; 0 is any free one."""
    runtime: str
    """"auto", "podman" or "process"."""
    image: str
    """Default image; empty is the node daemon's."""
    podman_user: str
    """User that owns the containers when we are root; empty is the node daemon's default."""
    log_level: str
    """Level of the daemons' logs."""

    def arguments(self) -> list[str]:
        """Returns them as arguments of `puhui up`."""
        return [
            *("--emulate", self.emulate, "--port", str(self.port), "--runtime", self.runtime),
            *("--image", self.image, "--podman-user", self.podman_user, "--log-level", self.log_level),
        ]


class LocalCentre:
    """The daemons of a local centre, children of this process."""

    def __init__(self, folder: StateFolder, options: LocalOptions) -> None:
        self._folder = folder
        self._options = options
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = ""
        self.node_address = ""

    def start(self) -> None:
        """Starts the daemons, one after the other, and waits until each is ready.

        Raises:
            Refusal: UNAVAILABLE with DAEMON_FAILED, with the reason that its log gives.
        """
        options, token = self._options, self._folder.path / "join-token"
        self.address = self._start(
            "controlplane",
            ["--listen", f"127.0.0.1:{options.port}", "--join-token-file", str(token), "--centre", "local"],
        )
        node = ["--listen", "127.0.0.1:0", "--name", "local", "--control-plane", self.address]
        node += ["--join-token-file", str(token), "--emulate", options.emulate, "--runtime", options.runtime]
        node += ["--image", options.image] if options.image else []
        node += ["--podman-user", options.podman_user] if options.podman_user else []
        self.node_address = self._start("nodedaemon", node)

    def wait(self) -> Refusal:
        """Waits until a daemon ends, which it should not, and returns what to say about it."""
        descriptors = {os.pidfd_open(process.pid): name for name, process in self._processes.items()}
        try:
            ended = select.select(list(descriptors), [], [])[0]
            name = descriptors[ended[0]]
            return self._failed(name, exit_words(self._processes[name].wait()))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def stop(self) -> None:
        """Stops the daemons; the one that gives the orders goes first."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(_STOP_S)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()
                process.wait()
        self._folder.clear()

    def log_of(self, name: str) -> Path:
        """Returns the path of a daemon's log."""
        return self._folder.logs / f"{name}.log"

    def _start(self, name: str, arguments: Sequence[str]) -> str:
        command = [sys.executable, "-m", name, "serve", *arguments]
        command += ["--state", str(self._folder.path / name), "--log-level", self._options.log_level]
        log = self.log_of(name)
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        with ReadySocket() as ready:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    env={**os.environ, "NOTIFY_SOCKET": ready.path},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # Ctrl-C is for `puhui up` alone, which stops its daemons in order.
                    start_new_session=True,
                )
            self._processes[name] = process
            self._keep()
            try:
                return ready.wait(process.pid, _START_S)
            except ChildProcessError as error:
                raise self._failed(name, f"{exit_words(process.wait())} before it was ready") from error
            except TimeoutError as error:
                raise self._failed(name, f"was not ready within {_START_S:g} s") from error
            finally:
                self._keep()

    def _keep(self) -> None:
        running = {name: process for name, process in self._processes.items() if process.poll() is None}
        self._folder.write(
            Record(
                supervisor=ProcessId.of(os.getpid()),
                daemons={name: ProcessId.of(process.pid) for name, process in running.items()},
                address=self.address,
                node_address=self.node_address,
                emulate=self._options.emulate,
            )
        )

    def _failed(self, name: str, what: str) -> Refusal:
        log = self.log_of(name)
        reason = reason_in(log)
        return Refusal(
            grpc.StatusCode.UNAVAILABLE,
            "DAEMON_FAILED",
            f"the {name} {what}{': ' if reason else ''}{reason}; its log is {log}",
            daemon=name,
            log=str(log),
        )
