"""What is known here of runs that were at a peer, while they are there and afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from controlplane import happenings
from controlplane.endings import Ending
from controlplane.forwards import ForwardStage
from puhui.rpc.moment import now, timestamp
from puhui.v1 import job_pb2
from tests.unit.controlplane.carried import Ends, ends

FIRST, SECOND, THIRD = "r-aaaaaaaaaaa2", "r-bbbbbbbbbbb2", "r-ccccccccccc2"


def run(run_id: str, **fields: Any) -> job_pb2.Run:
    started = job_pb2.Run(id=run_id, job_id="j-there", attempt=1, command=["x"], **fields)
    started.start_time.CopyFrom(timestamp(now()))
    if "exit_code" in fields:
        started.end_time.CopyFrom(timestamp(now()))
    return started


async def tell(both: Ends, *runs: job_pb2.Run) -> None:
    """The peer tells of runs."""
    job = await both.there.job(both.job_there)
    job.runs.extend(runs)
    job.run_count = len(runs)
    event = job_pb2.JobEvent(reason="RUN_STARTED", state=job_pb2.JOB_STATE_RUNNING, message="told")
    await both.change(happenings.PeerTold(event, job))


async def runs(both: Ends) -> dict[str, job_pb2.Run]:
    return {one.id: one for one in (await both.job()).runs}


async def test_runs_under_way_end_when_the_session_comes_back(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.begin()
        await tell(both, run(FIRST, exit_code=0), run(SECOND))
        assert not (await runs(both))[SECOND].HasField("end_time")
        back = happenings.BroughtBack("PEER_LOST", "it waits again", False)
        await both.change(back, stage=ForwardStage.SETTLED)
        known = await runs(both)
        assert known[FIRST].exit_code == 0
        assert known[SECOND].HasField("end_time")
        assert not known[SECOND].HasField("exit_code")
        assert "no longer at peer b" in known[SECOND].message


async def test_runs_of_earlier_attempts_stay_known(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.begin()
        await tell(both, run(FIRST, exit_code=3))
        back = happenings.BroughtBack("PEER_LOST", "it waits again", False)
        await both.change(back, stage=ForwardStage.SETTLED)
        await both.send()
        await tell(both)
        assert list(await runs(both)) == [FIRST]
        for _ in range(2):
            await tell(both, run(FIRST, exit_code=0), run(SECOND, exit_code=1), run(THIRD))
            known = await runs(both)
            assert {one: known[one].attempt for one in known} == {FIRST: 1, SECOND: 2, THIRD: 2}
            assert known[FIRST].exit_code == 3, "what another attempt has left is not the peer's to change"
            assert (await both.job()).run_count == 3


async def test_no_more_than_the_newest_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.begin()
        told = [run(f"r-{'a' * 10}{number:02}", exit_code=0) for number in range(22, 38)]
        for count in range(1, len(told) + 1):
            await tell(both, *told[max(0, count - 10) : count])
        assert list(await runs(both)) == [one.id for one in told[-10:]]
        assert (await both.job()).run_count == len(told)


async def test_runs_under_way_end_with_their_session(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.begin()
        await tell(both, run(FIRST))
        job = await both.there.job(both.job_there)
        job.runs.add().CopyFrom(run(FIRST))
        ending = Ending(job_pb2.JOB_STATE_CANCELLED, "CANCELLED", "enough")
        await both.change(happenings.PeerEnded(job, ending), stage=ForwardStage.ENDED)
        assert (await runs(both))[FIRST].HasField("end_time")
