"""Starts a whole centre: a control plane and one node daemon with emulated cards, as real processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.daemons import Daemon, daemon, open_folder


@dataclass
class RunningCentre:
    """A centre that serves."""

    controlplane: Daemon
    node: Daemon
    state: Path

    @property
    def address(self) -> str:
        """Where the control plane serves."""
        return self.controlplane.address


@contextlib.contextmanager
def running_centre(cards: str = "H100-80GB-SXM5:2", runtime: str = "podman") -> Iterator[RunningCentre]:
    """Runs a centre until the block ends, with its state in a directory of its own."""
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(open_folder())
        token = state / "join-token"
        controlplane = stack.enter_context(
            daemon(
                "controlplane",
                ["--listen", "127.0.0.1:0", "--state", str(state / "controlplane"), "--join-token-file", str(token)],
                state / "controlplane.log",
            )
        )
        node = stack.enter_context(
            daemon(
                "nodedaemon",
                [
                    *("--listen", "127.0.0.1:0", "--state", str(state / "node"), "--name", "node-1"),
                    *("--control-plane", controlplane.address, "--join-token-file", str(token)),
                    *("--emulate", cards, "--runtime", runtime),
                ],
                state / "node.log",
            )
        )
        yield RunningCentre(controlplane, node, state)
