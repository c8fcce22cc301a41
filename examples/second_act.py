"""The second act of the demonstration: an idle share goes back to work while its owner lives on (steps S6 to S8).

A session has a whole card. It does not use it, so its share is taken back; another job of the same tenant is given that
very slice; then a run instruction arrives for the session, and it gets a share of the other card. Its shell is the same
process all the time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration

from puhui.client import Centre
from puhui.v1.job_pb2 import (
    JOB_KIND_SESSION,
    JOB_STATE_CANCELLED,
    JOB_STATE_SUCCEEDED,
    IdlePolicy,
    Job,
    JobEvent,
    JobSpec,
    PeerPolicy,
    Resources,
)
from puhui.v1.node_pb2 import Container
from puhui.v1.node_service_pb2 import ListContainersRequest, ListSlicesRequest
from puhui.v1.node_service_pb2_grpc import NodeServiceStub

__all__ = ["ACT_STEPS", "SecondAct"]

CODE = Path(__file__).resolve().parent / "session"
# A whole card of either model: the session and the other job cannot share one.
PROFILE = "7g.80gb"
IDLE_AFTER_S = 1
# Which event tells of which step.
ACT_STEPS = {
    "RECLAIMING": "S6",
    "RECLAIMED": "S7",
    "SLICE_TAKEN_OVER": "S7",
    "RESUMING": "S8",
    "RESUMED": "S8",
    "RUN_STARTED": "S8",
}
_PATIENCE_S = 60.0

Say = Callable[[str, str, str], None]
"""(step, who, what)."""


@dataclass
class SecondAct:
    """Plays the act, and says what was seen of it."""

    centre: Centre
    node: NodeServiceStub
    python: str
    say: Say
    session: Job = field(default_factory=Job)
    other: Job = field(default_factory=Job)
    events: dict[str, list[JobEvent]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    containers: list[Container] = field(default_factory=list)
    """The session's container, as the node lists it: with its share, without, and with another."""

    def play(self) -> None:
        """Plays the act to its end; everything is released then.

        Raises:
            Refusal: the centre refuses something or cannot be reached.
            TimeoutError: something did not happen in time.
        """
        policy = IdlePolicy(idle_after=Duration(seconds=IDLE_AFTER_S), start_grace=Duration(seconds=30))
        spec = JobSpec(
            name="session",
            kind=JOB_KIND_SESSION,
            command=[self.python, "shell.py"],
            resources=Resources(profile=PROFILE),
            idle=policy,
            peers=PeerPolicy(here_only=True),
        )
        self.session = self.centre.submit(spec, CODE)
        heard = self._follow("session", self.session.id)
        heard("CONTAINER_STARTED")
        self._run("compute.py", "0.3")
        self._look()
        heard("RECLAIMED")
        self._look()
        job = JobSpec(
            name="other",
            command=[self.python, "compute.py", "3"],
            resources=Resources(profile=PROFILE),
            peers=PeerPolicy(here_only=True),
        )
        self.other = self.centre.submit(job, CODE)
        self._follow("other", self.other.id)("CONTAINER_STARTED")
        self._run("compute.py", "0.3")
        self._look()
        self.centre.cancel(self.session.id, "the act is over")
        self.session = self.centre.wait(self.session.id, timeout_s=_PATIENCE_S)
        self.other = self.centre.wait(self.other.id, timeout_s=_PATIENCE_S)

    def _follow(self, who: str, job_id: str) -> Callable[[str], None]:
        """Follows a job in a thread, and returns what waits until an event with some reason has come."""
        seen, come = self.events.setdefault(who, []), threading.Condition()

        def read() -> None:
            for event in self.centre.watch(job_id):
                self.say(ACT_STEPS.get(event.reason, ""), who, event.message)
                with come:
                    seen.append(event)
                    come.notify_all()

        def heard(reason: str) -> None:
            with come:
                if not come.wait_for(lambda: any(event.reason == reason for event in seen), _PATIENCE_S):
                    raise TimeoutError(f"{who}: no {reason} within {_PATIENCE_S:.0f} s")

        threading.Thread(target=read, daemon=True).start()
        return heard

    def _run(self, *command: str) -> None:
        """Gives the session a run instruction, and keeps what the command said."""
        output = b""
        for response in self.centre.run(self.session.id, [self.python, *command]):
            if response.HasField("output"):
                output += response.output.data
        self.say("", "session", "│ " + output.decode(errors="replace").strip())
        self.runs.append(json.loads(output))

    def _look(self) -> None:
        """Asks the node itself about the session's container."""
        listed = self.node.ListContainers(ListContainersRequest()).containers
        self.containers += [one for one in listed if one.owner.job_id == self.session.id]

    def findings(self) -> dict[str, Any]:
        """Returns, for each step, whether it happened, and the evidence."""
        reclaiming, reclaimed = self._event("session", "RECLAIMING"), self._event("session", "RECLAIMED")
        resumed, taken = self._event("session", "RESUMED"), self._event("other", "SLICE_TAKEN_OVER")
        before, without, after = (*self.containers, Container(), Container(), Container())[:3]
        first, last = (*self.runs, {}, {})[:2]
        lives = bool(before.pid) and before.pid == without.pid == after.pid
        left = self.node.ListSlices(ListSlicesRequest(include_foreign=True)).slices
        return {
            "S6": {
                "ok": reclaiming.get("why") == "IDLE" and int(reclaiming.get("unused_ms", 0)) >= IDLE_AFTER_S * 1000,
                "job_id": self.session.id,
                "idle_after_s": IDLE_AFTER_S,
                **{key: reclaiming.get(key, "") for key in ("unused_ms", "signal", "signal_message", "slice_uuid")},
            },
            "S7": {
                "ok": lives
                and not without.slice_uuids
                and taken.get("slice_uuid", "?") == reclaimed.get("slice_uuid")
                and self.other.state == JOB_STATE_SUCCEEDED,
                "mode": reclaimed.get("mode", ""),
                "slice_uuid": reclaimed.get("slice_uuid", ""),
                "gpu_index": int(reclaimed.get("gpu_index", -1)),
                "held_ms": int(reclaimed.get("held_ms", 0)),
                "container_id": reclaimed.get("container_id", ""),
                "host_pid": {"before": before.pid, "without_share": without.pid, "after": after.pid},
                "given_to": {"job_id": self.other.id, "slice_uuid": taken.get("slice_uuid", "")},
            },
            "S8": {
                "ok": lives
                and self.session.state == JOB_STATE_CANCELLED
                and bool(last.get("shell_lives"))
                and last.get("shell_pid") == first.get("shell_pid")
                and last.get("slice_uuid") == resumed.get("slice_uuid")
                and resumed.get("gpu_index", "") != reclaimed.get("gpu_index", ""),
                "pid_inside": {"before": first.get("shell_pid"), "after": last.get("shell_pid")},
                "shell_begun_ticks": {"before": first.get("shell_begun"), "after": last.get("shell_begun")},
                "runs_noted_in_workspace": last.get("runs_noted"),
                "slice_uuid": {"before": first.get("slice_uuid"), "after": last.get("slice_uuid")},
                "gpu_index": {
                    "before": int(reclaimed.get("gpu_index", -1)),
                    "after": int(resumed.get("gpu_index", -1)),
                },
                "without_share_ms": int(resumed.get("without_share_ms", 0)),
                "leftover_slices": len(left),
            },
        }

    def _event(self, who: str, reason: str) -> dict[str, str]:
        """Returns the details of the first event with this reason."""
        found = next((event for event in self.events.get(who, []) if event.reason == reason), None)
        return dict(found.details) if found is not None else {}
