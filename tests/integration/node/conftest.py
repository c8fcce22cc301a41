"""One node daemon at a time, with emulated cards and real rootless containers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from puhui.rpc.channel import open_channel
from puhui.rpc.identity import new_id
from tests.daemons import Daemon, daemon, open_folder
from tests.integration.node.client import Node

CARDS = "H100-80GB-SXM5:1,A100-80GB:1"


def podman(*arguments: str) -> str:
    """Runs podman as the daemon does, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "nodedaemon", "podman", "--", *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def containers_of(centre: str) -> list[str]:
    """Returns the ids of a centre's containers, as podman itself lists them."""
    return podman("ps", "--all", "--quiet", "--filter", f"label=puhui.centre={centre}").split()


Start = Callable[..., AbstractContextManager[Daemon]]


@pytest.fixture
def home() -> Iterator[Path]:
    """Where this test's daemon keeps its state, in node/, and its log, node.log."""
    with open_folder() as folder:
        yield folder


@pytest.fixture
def start(home: Path) -> Start:
    """Starts the daemon of this test's state directory, again and again."""

    def start_daemon(cards: str = CARDS) -> AbstractContextManager[Daemon]:
        arguments = ["--listen", "127.0.0.1:0", "--state", str(home / "node"), "--emulate", cards]
        return daemon("nodedaemon", [*arguments, "--runtime", "podman", "--log-level", "debug"], home / "node.log")

    return start_daemon


@pytest.fixture(scope="module")
def state() -> Iterator[Path]:
    """The state directory of the module's daemon."""
    with open_folder() as folder:
        yield folder / "state"


@pytest.fixture(scope="module")
def serving(state: Path) -> Iterator[Daemon]:
    """The module's daemon."""
    arguments = ["--listen", "127.0.0.1:0", "--state", str(state), "--emulate", CARDS, "--runtime", "podman"]
    with daemon("nodedaemon", arguments, state.parent / "node.log") as running:
        yield running


@pytest.fixture
async def node(serving: Daemon, state: Path) -> AsyncIterator[Node]:
    """A connection to the module's daemon, which must be as clean after each test as before."""
    async with open_channel(serving.address) as channel:
        connection = Node(channel, new_id("centre"))
        yield connection
        await connection.clear()
        assert await connection.slices() == []
        assert await connection.containers() == []
        assert list((state / "attempts").iterdir()) == []
