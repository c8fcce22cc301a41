"""The third act of the demonstration: a full centre borrows an idle share of another one (steps S9 to S11).

Every card of the first centre is taken, which its capacity shows (S9). The next job is predicted to need a slice that
is not free there, so its centre asks its peer, takes what that one offers, and hands the job over (S10). The peer runs
it in a container on a share of its own idle card; its user goes on talking to the first centre only: follows the output
there while the peer writes it, and pulls the artifacts there (S11). What is claimed of the peer is the peer's own view.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from puhui.client import Centre, Refusal
from puhui.v1.card_pb2 import Slice
from puhui.v1.fleet_service_pb2 import GetCapacityResponse
from puhui.v1.job_pb2 import (
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    Job,
    JobEvent,
    JobSpec,
    JobState,
    PeerPolicy,
    Resources,
)
from puhui.v1.node_pb2 import Container
from puhui.v1.node_service_pb2 import ListContainersRequest, ListSlicesRequest
from puhui.v1.node_service_pb2_grpc import NodeServiceStub

__all__ = ["ThirdAct"]

HERE = Path(__file__).resolve().parent
# A whole card of either model.
WHOLE = "7g.80gb"
# Which event tells of which step.
ACT_STEPS = {
    "PREDICTED": "S9",
    "WAITS": "S9",
    "FORWARDING": "S10",
    "FORWARDED": "S10",
    "SLICE_CREATED": "S11",
    "CONTAINER_STARTED": "S11",
    "COMMAND_ENDED": "S11",
    "PEER_ENDED": "S11",
    "SUCCEEDED": "S11",
}
_PATIENCE_S = 120.0

Say = Callable[[str, str, str], None]
"""(step, who, what)."""


@dataclass
class Site:
    """A centre and its node, as this program reaches them."""

    name: str
    node_id: str
    centre: Centre
    node: NodeServiceStub

    def slices(self, job_id: str = "") -> list[Slice]:
        """Returns the slices that its node really has; those of one job if it is named."""
        listed = self.node.ListSlices(ListSlicesRequest(include_foreign=True)).slices
        return [one for one in listed if job_id in ("", one.owner.job_id)]

    def containers(self, job_id: str = "") -> list[Container]:
        """Returns the containers that its node really has; those of one job if it is named."""
        listed = self.node.ListContainers(ListContainersRequest()).containers
        return [one for one in listed if job_id in ("", one.owner.job_id)]


@dataclass
class ThirdAct:
    """Plays the act, and says what was seen of it."""

    here: Site
    there: Site
    python: str
    target: Path
    say: Say
    job: Job = field(default_factory=Job)
    """The borrowing job, as its own centre knows it."""
    guest: Job = field(default_factory=Job)
    """The same, as the peer knows it, when it has ended there."""
    events: list[JobEvent] = field(default_factory=list)
    capacity: dict[str, GetCapacityResponse] = field(default_factory=dict)
    """Of each centre, when every card of the first one was taken."""
    slices: list[Slice] = field(default_factory=list)
    """The peer's slices of the job, while it ran."""
    containers: list[Container] = field(default_factory=list)
    """The peer's containers of the job, while it ran."""
    log_bytes: int = 0
    live_log_bytes: int = 0
    """What had come of the log when the peer still said that the job runs."""
    files: list[str] = field(default_factory=list)
    """Artifacts that were pulled from the job's own centre."""
    left: dict[str, int] = field(default_factory=dict)
    """What the peer's node has when all is over."""

    def play(self) -> None:
        """Plays the act to its end; everything is released then.

        Raises:
            Refusal: a centre refuses something or cannot be reached.
            RuntimeError: the job could not be followed.
            TimeoutError: something did not happen in time.
        """
        occupants = self._fill()
        self.capacity = {site.name: site.centre.capacity() for site in (self.here, self.there)}
        spec = JobSpec(name="borrower", command=[self.python, "train.py", "--epochs", "4"])
        self.job = self.here.centre.submit(spec, HERE / "digits")
        self._until_done(self._follow, self._follow_log)
        self.job = self.here.centre.get(self.job.id)
        if peer_job_id := self._peer_job_id():
            self.guest = self.there.centre.get(peer_job_id)
        if self.job.artifacts.file_count:
            pulled = self.target / "borrower"
            self.here.centre.pull(self.job.id, pulled)
            self.files = sorted(path.name for path in pulled.rglob("*") if path.is_file())
            self.say(
                "S11", "borrower", f"{len(self.files)} files pulled from {self.here.name}: {', '.join(self.files)}"
            )
        self.left = {"slices": len(self.there.slices()), "containers": len(self.there.containers())}
        for occupant in occupants:
            self.here.centre.cancel(occupant.id, "the act is over")
        for occupant in occupants:
            self.here.centre.wait(occupant.id, timeout_s=_PATIENCE_S)

    def _fill(self) -> list[Job]:
        """Takes every card of the first centre."""
        spec = JobSpec(
            name="occupant",
            command=[self.python, "hold.py"],
            resources=Resources(profile=WHOLE),
            peers=PeerPolicy(here_only=True),
        )
        cards = len(self.here.centre.capacity().gpus)
        jobs = [self.here.centre.submit(spec, HERE / "occupant") for _ in range(cards)]
        for number, job in enumerate(jobs, 1):
            reasons = (event.reason for event in self.here.centre.watch(job.id))
            if "CONTAINER_STARTED" not in reasons:
                raise TimeoutError(f"occupant {job.id} did not start")
            self.say("", "occupant", f"holds card {number} of {cards} of {self.here.name}")
        return jobs

    def _until_done(self, *works: Callable[[], None]) -> None:
        """Does several things at once, until all are done."""
        problems: list[str] = []

        def run(work: Callable[[], None]) -> None:
            try:
                work()
            except (Refusal, grpc.RpcError, ValueError) as error:  # gRPC's answer on a closed channel is a ValueError
                problems.append(str(error))

        threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + _PATIENCE_S
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        if problems:
            raise RuntimeError(f"borrower {self.job.id} could not be followed: {'; '.join(problems)}")
        if any(thread.is_alive() for thread in threads):
            why = self.here.centre.explain(self.job.id).message
            raise TimeoutError(f"borrower {self.job.id} has not ended within {_PATIENCE_S:.0f} s: {why}")

    def _follow(self) -> None:
        """Follows the job's events at its own centre until it has ended."""
        for event in self.here.centre.watch(self.job.id):
            self.events.append(event)
            at = f"[{event.peer}] " if event.peer else ""
            step = ACT_STEPS.get(event.reason, "")
            # The peer predicts it as well, which is no step of the first centre's.
            self.say("" if step == "S9" and event.peer else step, "borrower", at + event.message)
            if event.reason == "CONTAINER_STARTED" and event.peer:
                # Asked of the peer's node itself while the job runs: are the card and the container really there?
                peer_job_id = self.here.centre.get(self.job.id).attempts[-1].peer_job_id
                self.slices = self.there.slices(peer_job_id)
                self.containers = self.there.containers(peer_job_id)

    def _follow_log(self) -> None:
        """Follows the job's output at its own centre, and asks the peer whether it runs still."""
        rest = b""
        for chunk in self.here.centre.logs(self.job.id, follow=True):
            self.log_bytes += len(chunk.data)
            *lines, rest = (rest + chunk.data).split(b"\n")
            for line in lines:
                self.say("", "borrower", "│ " + line.decode(errors="replace"))
            peer_job_id = self._peer_job_id()
            if peer_job_id and self.there.centre.get(peer_job_id).state == JOB_STATE_RUNNING:
                self.live_log_bytes = self.log_bytes

    def _peer_job_id(self) -> str:
        attempts = self.here.centre.get(self.job.id).attempts
        return attempts[-1].peer_job_id if attempts else ""

    def findings(self) -> dict[str, Any]:
        """Returns, for each step, whether it happened, and the evidence."""
        forwarding, forwarded = self._event("FORWARDING"), self._event("FORWARDED")
        attempt = self.job.attempts[-1] if self.job.attempts else None
        at_peer = self.guest.attempts[-1] if self.guest.attempts else None
        profile = forwarding.get("profile", "")
        free = {name: _free(capacity, profile) for name, capacity in self.capacity.items()}
        peer, peer_job_id = (attempt.peer, attempt.peer_job_id) if attempt is not None else ("", "")
        promised_s = float(forwarding.get("promised_wait_s", "nan")) + float(forwarding.get("transfer_s", "nan"))
        slice_uuid = at_peer.slice_uuid if at_peer is not None else ""
        container_id = at_peer.container_id if at_peer is not None else ""
        return {
            "S9": {
                "ok": bool(profile) and free[self.here.name] == 0 and free[self.there.name] > 0,
                "required_mib": self.job.prediction.required_mib,
                "profile": profile,
                "free": free,
                "held": {
                    name: sum(one.busy + one.idle for one in capacity.profiles)
                    for name, capacity in self.capacity.items()
                },
            },
            "S10": {
                "ok": peer == self.there.name
                and bool(forwarding.get("offer_id"))
                and forwarded.get("peer_job_id") == peer_job_id != ""
                and self.guest.guest.job_id == self.job.id
                and len(self.job.attempts) == 1,
                "job_id": self.job.id,
                "offer": {
                    **{key: forwarding.get(key, "") for key in ("offer_id", "profile", "gpu_model")},
                    "promised_wait_s": round(promised_s, 3),
                },
                "peer": peer,
                "peer_job_id": peer_job_id,
                "origin_job_id_at_peer": self.guest.guest.job_id,
                "attempts": len(self.job.attempts),
                "bundle_bytes": int(forwarded.get("bundle_bytes", 0)),
                "times_ms": self._times_ms(),
            },
            "S11": {
                "ok": self.job.state == JOB_STATE_SUCCEEDED
                and [one.uuid for one in self.slices] == [slice_uuid]
                and [one.id for one in self.containers] == [container_id]
                and at_peer is not None
                and at_peer.node_id == self.there.node_id
                and 0 < self.live_log_bytes <= self.log_bytes == self.job.log_size_bytes == self.guest.log_size_bytes
                and self.job.artifacts.digest == self.guest.artifacts.digest != ""
                and len(self.files) == self.job.artifacts.file_count
                and self.left == {"slices": 0, "containers": 0},
                "state": JobState.Name(self.job.state),
                "exit_code": self.job.exit_code if self.job.HasField("exit_code") else None,
                "emulated": all(one.emulated for one in self.slices),
                "node_id": at_peer.node_id if at_peer is not None else "",
                "slice_uuid": slice_uuid,
                "container_id": container_id,
                "log_bytes": {
                    "while_it_ran": self.live_log_bytes,
                    "followed": self.log_bytes,
                    "here": self.job.log_size_bytes,
                    "at_peer": self.guest.log_size_bytes,
                },
                "artifacts": {
                    "digest": {"here": self.job.artifacts.digest, "at_peer": self.guest.artifacts.digest},
                    "files": self.files,
                },
                "left_at_peer": self.left,
            },
        }

    def _event(self, reason: str) -> dict[str, str]:
        """Returns the details of the first event with this reason."""
        found = next((event for event in self.events if event.reason == reason), None)
        return dict(found.details) if found is not None else {}

    def _times_ms(self) -> dict[str, int]:
        """Returns when each step was taken, in milliseconds since the job was submitted."""
        first: dict[str, int] = {}
        for event in self.events:
            if event.reason in ACT_STEPS:
                first.setdefault(event.reason.lower(), _ms(self.job.create_time, event.time))
        return first


def _free(capacity: GetCapacityResponse, profile: str) -> int:
    """Returns how many slices of a profile could be cut on all GPUs together."""
    return sum(one.free for one in capacity.profiles if one.profile == profile)


def _ms(begin: Timestamp, end: Timestamp) -> int:
    return round((end.ToNanoseconds() - begin.ToNanoseconds()) / 1e6)
