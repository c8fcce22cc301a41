from __future__ import annotations

import pytest

from controlplane.durations import JUST_BEGUN_S, Basis, Durations, Estimate, History, remaining
from controlplane.records import JobQuery, JobRecord
from puhui.rpc.moment import duration, timestamp
from puhui.v1 import job_pb2


@pytest.mark.parametrize(
    ("age_s", "limit_s", "history", "expected"),
    [
        (0, None, [], Estimate(JUST_BEGUN_S, Basis.DEFAULT)),
        (5, None, [], Estimate(JUST_BEGUN_S, Basis.DEFAULT)),
        (4000, None, [], Estimate(4000, Basis.AGE)),
        (4000, 5000, [], Estimate(1000, Basis.LIMIT)),
        (6000, 5000, [], Estimate(0, Basis.LIMIT)),
        (0, None, [10, 20, 30], Estimate(20, Basis.HISTORY)),
        (15, None, [10, 20, 30], Estimate(10, Basis.HISTORY)),
        (40, None, [10, 20, 30], Estimate(JUST_BEGUN_S, Basis.DEFAULT)),
        (4000, None, [10, 20, 30], Estimate(4000, Basis.AGE)),
        (15, 16, [10, 20, 30], Estimate(1, Basis.LIMIT)),
        (-5, None, [10], Estimate(10, Basis.HISTORY)),
    ],
)
def test_what_is_left_of_a_command(
    age_s: float, limit_s: float | None, history: list[float], expected: Estimate
) -> None:
    assert remaining(age_s, limit_s, history) == expected


def spec(tenant: str = "a", *command: str, **fields: object) -> job_pb2.JobSpec:
    return job_pb2.JobSpec(tenant=tenant, command=command or ["python3", "x.py"], **fields)  # type: ignore[arg-type]


def test_history_is_of_the_same_command_and_else_of_the_same_program() -> None:
    history = History()
    for taken in (100.0, 200.0, 300.0):
        history.learn(spec("a", "python3", "x.py", "--epochs", str(taken)), taken)
    assert history.of(spec("a", "python3", "x.py", "--epochs", "100.0")) == (100.0,)
    assert history.of(spec("a", "python3", "x.py", "--epochs", "7")) == (100.0, 200.0, 300.0)
    assert history.of(spec("b", "python3", "x.py", "--epochs", "100.0")) == ()
    assert history.of(spec("a", "python3", "y.py")) == ()


def test_history_forgets_what_is_old() -> None:
    history = History()
    for number in range(5000):
        history.learn(spec("a", "run", str(number)), 1.0)
    assert len(history) == 4096
    assert history.of(spec("a", "run", "4999")) == (1.0,)


class Stored:
    """Jobs, by id; counts what is read."""

    def __init__(self) -> None:
        self.kept: dict[str, JobRecord] = {}
        self.read = 0

    async def job(self, job_id: str) -> JobRecord | None:
        self.read += 1
        return self.kept.get(job_id)

    async def jobs(self, query: JobQuery) -> list[JobRecord]:
        found = [
            one
            for one in self.kept.values()
            if one.state in query.states and (query.before_sequence is None or one.sequence < query.before_sequence)
        ]
        return sorted(found, key=lambda one: -one.sequence)[: query.limit]

    def put(
        self,
        job_id: str,
        wanted: job_pb2.JobSpec,
        state: job_pb2.JobState.ValueType,
        start: float | None = None,
        end: float | None = None,
    ) -> None:
        job = job_pb2.Job(id=job_id, spec=wanted, state=state)
        if start is not None:
            attempt = job.attempts.add(number=1, start_time=timestamp(start))
            attempt.shares.add(hold_time=timestamp(start - 3))
            if end is not None:
                attempt.end_time.CopyFrom(timestamp(end))
                job.exit_code = 0
        elif state != job_pb2.JOB_STATE_QUEUED:
            job.attempts.add(number=1)
        self.kept[job_id] = JobRecord(job, sequence=len(self.kept) + 1)


RUNNING, DONE, QUEUED = job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_QUEUED


async def test_it_learns_from_what_ended_before_and_from_what_ends() -> None:
    store = Stored()
    store.put("old", spec(), DONE, 0, 50)
    store.put("now", spec("b"), RUNNING, 1000)
    durations = Durations(store)
    await durations.load()
    assert durations.of_spec(spec()) == Estimate(50, Basis.HISTORY)
    await durations.refresh([("now", 1)], [])
    assert durations.of_share(("now", 1), 1010) == Estimate(JUST_BEGUN_S, Basis.DEFAULT)
    assert durations.of_share(("now", 1), 5000) == Estimate(4000, Basis.AGE)
    store.put("now", spec("b"), DONE, 1000, 1070)
    await durations.refresh([], [])
    assert durations.of_spec(spec("b")) == Estimate(70, Basis.HISTORY)


async def test_what_is_not_known_is_said_to_be_unknown() -> None:
    durations = Durations(Stored())
    assert durations.of_share(("nobody", 1), 5.0) == Estimate(None, Basis.UNKNOWN)


async def test_what_is_known_is_not_read_again_and_what_has_begun_since_is() -> None:
    store = Stored()
    store.put("j", spec(), RUNNING)
    store.put("q", spec("c", max_duration=duration(30)), QUEUED)
    durations = Durations(store)
    await durations.refresh([("j", 1)], ["q"])
    assert durations.of_share(("j", 1), 5000) == Estimate(JUST_BEGUN_S, Basis.DEFAULT)
    assert durations.of_job("q") == Estimate(30, Basis.LIMIT)
    store.put("j", spec(), RUNNING, 1000)
    await durations.refresh([("j", 1)], ["q"])
    assert durations.of_share(("j", 1), 5000) == Estimate(4000, Basis.AGE)
    read = store.read
    await durations.refresh([("j", 1)], ["q"])
    assert store.read == read


async def test_one_look_reads_a_bounded_number_of_jobs() -> None:
    store = Stored()
    for number in range(1000):
        store.put(f"q{number}", spec(), QUEUED)
    await Durations(store).refresh([], list(store.kept))
    assert store.read == 256


async def test_a_session_is_judged_by_how_long_it_has_had_its_share() -> None:
    store = Stored()
    session = spec(kind=job_pb2.JOB_KIND_SESSION, max_duration=duration(100))
    store.put("s", session, RUNNING, 1000)
    durations = Durations(store)
    await durations.refresh([("s", 1)], [])
    assert durations.of_share(("s", 1), 4997) == Estimate(4000, Basis.AGE)
