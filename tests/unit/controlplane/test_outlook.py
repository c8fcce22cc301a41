from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from controlplane.durations import JUST_BEGUN_S, Basis, Estimate
from controlplane.fleet import GpuView, Use
from controlplane.outlook import Outlook
from controlplane.queued_job import QueuedJob
from controlplane.reservations import AttemptKey
from puhui.v1 import job_pb2
from tests.unit.controlplane.samples import view


@dataclass
class Here:
    """A centre whose clock is set, and what it is asked."""

    queue: Sequence[QueuedJob] = ()
    at: float = 0.0
    costs_s: float = 0.0
    looked: int = 0
    read: list[tuple[set[AttemptKey], list[str]]] = field(default_factory=list)
    uses: tuple[Use, ...] = (Use("7g.80gb", 0, 8, False, key=("h", 1)),)

    def gpus(self) -> list[GpuView]:
        self.looked += 1
        self.at += self.costs_s
        return [view(uses=self.uses)]

    def meter(self) -> float:
        return self.at

    async def refresh(self, held: Collection[AttemptKey], queued: Iterable[str]) -> None:
        self.read.append((set(held), list(queued)))

    def of_share(self, key: AttemptKey, at: float) -> Estimate:
        return Estimate(90.0, Basis.AGE)

    def of_job(self, job_id: str) -> Estimate:
        return Estimate(JUST_BEGUN_S, Basis.DEFAULT)

    def of_spec(self, spec: job_pb2.JobSpec) -> Estimate:
        return Estimate(JUST_BEGUN_S, Basis.DEFAULT)

    def outlook(self) -> Outlook:
        return Outlook(self, self, self, 60.0, lambda: 1000.0, self.meter)


def job(job_id: str) -> QueuedJob:
    return QueuedJob(job_id, 0, 1, "7g.80gb", 0, 1000.0)


def test_peers_are_told_what_is_free_and_how_long_one_would_wait() -> None:
    told = {one.profile: one for one in Here().outlook().summaries()}
    assert (told["7g.80gb"].free, told["7g.80gb"].expected_wait.seconds) == (0, 90)
    free = {one.profile: one for one in Here(uses=()).outlook().summaries()}
    assert (free["1g.10gb"].free, free["1g.10gb"].expected_wait.seconds) == (7, 0)
    foreign = Here(uses=(Use("7g.80gb", 0, 8, True),))
    assert not any(one.HasField("expected_wait") for one in foreign.outlook().summaries())


def test_waits_are_worked_out_again_the_later_the_more_they_cost() -> None:
    here = Here(costs_s=0.1)
    outlook = here.outlook()
    first = outlook.waits()
    here.at += 1.0
    assert outlook.waits() is first
    here.at += 5.0
    assert outlook.waits() is not first


def test_a_job_that_came_since_is_not_taken_for_one_whose_wait_is_unknown() -> None:
    here = Here()
    outlook = here.outlook()
    outlook.waits()
    here.queue = [job("new")]
    here.at += 0.1
    assert "new" not in outlook.waits().waits
    assert outlook.waits(["new"]).of("new").seconds == 90


async def test_what_is_read_is_not_read_all_the_time() -> None:
    here = Here(queue=[job("q")])
    outlook = here.outlook()
    await outlook.refresh()
    await outlook.refresh()
    assert here.read == [({("h", 1)}, ["q"])]
    here.at += 1.0
    await outlook.refresh()
    assert len(here.read) == 2
