"""A node daemon with emulated cards for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.daemons import daemon, open_folder


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
    with open_folder() as folder:
        state = folder / "node"
        arguments = ["--listen", "127.0.0.1:0", "--state", str(state), "--emulate", cards]
        with daemon("nodedaemon", arguments, folder / "node.log") as address:
            yield NodeDaemon(address, state)
