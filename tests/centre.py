"""Starts a whole centre: a control plane and one node daemon with emulated cards, as real processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.daemons import Daemon, daemon


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
def running_centre(state: Path, cards: str = "H100-80GB-SXM5:2", runtime: str = "podman") -> Iterator[RunningCentre]:
    """Runs a centre until the block ends."""
    state.mkdir(parents=True, exist_ok=True)
    # The containers' user must be able to pass through; pytest makes its directories private.
    for folder in (state, *state.parents):
        if folder.stat().st_uid == 0 and folder.stat().st_mode & 0o077 == 0:
            folder.chmod(0o711)
    token = state / "join-token"
    with (
        daemon(
            "controlplane",
            ["--listen", "127.0.0.1:0", "--state", str(state / "controlplane"), "--join-token-file", str(token)],
            state / "controlplane.log",
        ) as controlplane,
        daemon(
            "nodedaemon",
            [
                *("--listen", "127.0.0.1:0", "--state", str(state / "node"), "--name", "node-1"),
                *("--control-plane", controlplane.address, "--join-token-file", str(token)),
                *("--emulate", cards, "--runtime", runtime),
            ],
            state / "node.log",
        ) as node,
    ):
        yield RunningCentre(controlplane, node, state)
