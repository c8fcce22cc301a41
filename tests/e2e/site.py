"""A control plane and a node daemon with real rootless containers, both of which can be killed and started again."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puhui.client import Centre
from puhui.client.centre import FINAL_STATES
from puhui.rpc.channel import open_blocking_channel
from puhui.rpc.errors import Refusal
from puhui.v1 import job_pb2
from puhui.v1.node_pb2 import Container
from puhui.v1.node_service_pb2 import ListContainersRequest, ListSlicesRequest
from puhui.v1.node_service_pb2_grpc import NodeServiceStub
from tests.daemons import Daemon, daemon, open_folder

_PATIENCE_S = 60.0


@dataclass
class Site:
    """One centre with one node, at addresses that stay."""

    folder: Path
    cards: str
    options: tuple[str, ...]
    stack: contextlib.ExitStack
    daemons: dict[str, Daemon] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"unix:{self.folder / 'centre.sock'}"

    def start(self, which: str) -> None:
        """Starts the "controlplane", the "nodedaemon", or another node by any other name."""
        log = self.folder / f"{which}.log"
        if which == "controlplane":
            module, arguments = which, ["--listen", self.address, "--state", str(self.folder / "centre"), *self.options]
        else:
            state = "node" if which == "nodedaemon" else which
            module = "nodedaemon"
            arguments = [
                *("--listen", self._node_address(which), "--state", str(self.folder / state), "--name", which),
                *("--control-plane", self.address),
                *("--join-token-file", str(self.folder / "centre" / "join-token")),
                *("--emulate", self.cards, "--runtime", "podman"),
            ]
        self.daemons[which] = self.stack.enter_context(daemon(module, arguments, log))

    def _node_address(self, which: str) -> str:
        return f"unix:{self.folder / which}.sock"

    def kill(self, which: str) -> None:
        """Kills one as a crash would."""
        self.daemons[which].kill()

    @contextlib.contextmanager
    def centre(self) -> Iterator[Centre]:
        with Centre(self.address) as centre:
            yield centre

    @contextlib.contextmanager
    def node(self, which: str = "nodedaemon") -> Iterator[NodeServiceStub]:
        channel = open_blocking_channel(self._node_address(which))
        try:
            yield NodeServiceStub(channel)
        finally:
            channel.close()

    def container(self, job_id: str, which: str = "nodedaemon") -> Container:
        """Returns a job's newest container, as the node lists it."""
        with self.node(which) as node:
            listed = node.ListContainers(ListContainersRequest(), wait_for_ready=True, timeout=30).containers
        return [one for one in listed if one.owner.job_id == job_id][-1]

    def leftovers(self, which: str = "nodedaemon") -> tuple[int, int]:
        """(slices, containers) at a node."""
        with self.node(which) as node:
            slices = node.ListSlices(ListSlicesRequest(include_foreign=True), wait_for_ready=True, timeout=30).slices
            listed = node.ListContainers(ListContainersRequest(), wait_for_ready=True, timeout=30).containers
        return len(slices), len(listed)


class Story:
    """Follows a job's events from the first, and waits for those that are to come, over any number of crashes."""

    def __init__(self, centre: Centre, job_id: str) -> None:
        self.events: list[job_pb2.JobEvent] = []
        self._come = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(centre, job_id), daemon=True)
        self._thread.start()

    def _read(self, centre: Centre, job_id: str) -> None:
        try:
            for event in centre.watch(job_id):
                with self._come:
                    self.events.append(event)
                    self._come.notify_all()
        except Refusal as refusal:
            # A test that has seen enough closes its connection, whether or not the job has ended.
            if refusal.reason != "CONNECTION_CLOSED":
                raise

    def heard(self, reason: str, times: int = 1, *, after: str = "", **details: str) -> dict[str, str]:
        """Waits until such an event has come so many times, and returns the details of that one.

        Args:
            reason: of the event.
            times: how many of them.
            after: only those count that came after the last event with this reason.
            details: what they must say.
        """
        deadline = time.monotonic() + _PATIENCE_S
        with self._come:
            while True:
                last = max((at for at, event in enumerate(self.events) if event.reason == after), default=-1)
                found = [
                    event
                    for event in self.events[last + 1 :]
                    if event.reason == reason and details.items() <= dict(event.details).items()
                ]
                if len(found) >= times:
                    return dict(found[times - 1].details)
                left_s = deadline - time.monotonic()
                assert left_s > 0, f"no {reason} within {_PATIENCE_S:.0f} s: {[event.reason for event in self.events]}"
                self._come.wait(left_s)

    def ended(self) -> None:
        """Waits until the job has ended and all of it is told."""
        self._thread.join(_PATIENCE_S)
        assert not self._thread.is_alive()

    @property
    def reasons(self) -> list[str]:
        with self._come:
            return [event.reason for event in self.events]


def ran(centre: Centre, job_id: str, *command: str) -> tuple[int | None, bytes]:
    """Gives a run instruction, and returns its exit code and output."""
    output = b""
    call = centre.run(job_id, command)
    for response in call:
        if response.HasField("output"):
            output += response.output.data
    return call.exit_code, output


def ended(centre: Centre, job_id: str) -> job_pb2.Job:
    """Cancels a job, and returns it when it has ended."""
    centre.cancel(job_id, "the test is over")
    job = centre.wait(job_id, timeout_s=_PATIENCE_S)
    assert job.state in FINAL_STATES
    return job


@contextlib.contextmanager
def site(cards: str = "H100-80GB-SXM5:2", *options: str) -> Iterator[Site]:
    """Runs a centre and a node until the block ends."""
    with open_folder() as folder, contextlib.ExitStack() as stack:
        running = Site(folder, cards, options, stack)
        running.start("controlplane")
        running.start("nodedaemon")
        yield running


def policy(**fields: Any) -> job_pb2.IdlePolicy:
    """Returns an idle policy that a test need not wait for."""
    asked = job_pb2.IdlePolicy(**fields)
    if not asked.HasField("idle_after"):
        asked.idle_after.FromMilliseconds(500)
    asked.start_grace.FromSeconds(60)
    return asked
