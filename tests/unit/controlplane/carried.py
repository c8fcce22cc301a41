"""Two centres in this process, with a session of one at the other, and a connection between them that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import grpc

from controlplane import happenings
from controlplane.call_carrier import CallCarrier
from controlplane.carried_calls import CarriedJobService
from controlplane.forwards import ForwardRecord, ForwardStage
from controlplane.guests import GuestRecord
from controlplane.jobs import transition
from controlplane.log_reader import LogReader
from controlplane.offers import Offer
from controlplane.reach import Reach
from controlplane.records import Change, JobRecord
from controlplane.results import Results
from controlplane.sending import send
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now
from puhui.v1 import federation_service_pb2 as federation
from puhui.v1 import job_pb2, stream_pb2
from puhui.v1 import job_service_pb2 as wire
from tests.unit.controlplane.centres import RunningCentre, eventually, running
from tests.unit.controlplane.fake_node import ExecCommand, FakeNode
from tests.unit.controlplane.fake_peer import Book, FakePeer, TestClock

ALL_TOLD = 2**40
"""A cursor past every event."""


class Connection(FakePeer):
    """A peer whose calls of JobService are really carried; the connection can be cut.

    Attributes:
        requests: what was sent there.
        spoil: changes what comes back, as a hostile peer may.
        speaks: cleared, it says nothing, and its connection stands.
    """

    def __init__(self, carrier: CallCarrier, there: RunningCentre, job_there: str) -> None:
        super().__init__("b")
        self._there = there
        self._job_there = job_there
        self.requests: list[federation.CallForwardedJobRequest] = []
        self.spoil: Callable[[bytes], bytes] = lambda data: data
        self.speaks = asyncio.Event()
        self.speaks.set()
        self._carrier = carrier
        self._cut = asyncio.Event()

    async def cut(self) -> None:
        """Breaks what is open; nothing gets through until `mend`."""
        await self.set_contact(False)
        self._cut.set()

    async def mend(self) -> None:
        """The peer is in contact again."""
        self._cut = asyncio.Event()
        await self.set_contact(True)

    async def call(
        self, requests: AsyncIterator[federation.CallForwardedJobRequest]
    ) -> AsyncGenerator[federation.CallForwardedJobResponse, None]:
        async def noted() -> AsyncIterator[federation.CallForwardedJobRequest]:
            async for request in requests:
                self.requests.append(request)
                yield request

        self._arrive("call")
        await self.speaks.wait()
        async with contextlib.aclosing(self._until_cut(self._carrier.serve("a", noted()))) as answers:
            async for answer in answers:
                yield federation.CallForwardedJobResponse(message=self.spoil(answer.message))

    async def read_logs(
        self, request: federation.ReadForwardedLogsRequest
    ) -> AsyncGenerator[stream_pb2.LogChunk, None]:
        self._arrive("read_logs")
        asked = wire.ReadLogsRequest(
            job_id=self._job_there, offset=request.offset, tail_lines=request.tail_lines, follow=request.follow
        )
        output: Any = self._there.centre._jobs.ReadLogs(asked, cast("Any", None))
        async with contextlib.aclosing(self._until_cut(output)) as answers:
            async for answer in answers:
                yield stream_pb2.LogChunk.FromString(self.spoil(answer.chunk.SerializeToString()))

    async def _until_cut(self, answers: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """Yields what comes until the connection is cut."""
        cut = asyncio.create_task(self._cut.wait())
        async with contextlib.aclosing(answers):
            coming: asyncio.Future[Any] | None = None
            try:
                while True:
                    coming = asyncio.ensure_future(anext(answers))
                    await asyncio.wait({coming, cut}, return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        raise Refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN", "the connection is broken")
                    try:
                        answer = coming.result()
                    except StopAsyncIteration:
                        return
                    yield answer
            finally:
                pending: list[asyncio.Future[Any]] = [cut] if coming is None else [cut, coming]
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)


@dataclass
class Ends:
    """The origin's side and the executing one.

    Attributes:
        here: where the session was submitted.
        there: where it runs, once it is bound.
        jobs: JobService of the origin.
        job_id: the session, at the origin.
        job_there: the job that it is at the other side.
        node: where that one runs.
        peer: the connection between them.
        logs: reads output for the origin.
        results: what the origin has collected.
        book: the peers of the origin.
    """

    here: RunningCentre
    there: RunningCentre
    jobs: Any
    job_id: str
    job_there: str
    node: FakeNode
    peer: Connection
    logs: LogReader
    results: Results
    book: Book = field(default_factory=Book)

    async def job(self) -> job_pb2.Job:
        """Returns the session as its origin shows it."""
        request = wire.GetJobRequest(job_id=self.job_id)
        job: job_pb2.Job = (await self.jobs.GetJob(request, None)).job
        return job

    async def send(self) -> None:
        """The session goes to the peer; whether that has it is not known yet."""
        offer = Offer("b", "o-1", 1.0, 0.5, 1.0, 0.0, 0.0, 10.0, 3600.0, "1g.10gb", "H100", False)

        def decide(record: JobRecord, token: int) -> Change | None:
            return send(record, token, offer, at=now(), clock_s=0.0, boot="boot-1", lease_s=90.0)

        record = await self.here.centre._store.change_job(self.job_id, decide)
        assert record.attempt.peer == "b"

    async def bind(self, cursor: int = ALL_TOLD) -> None:
        """The peer has bound it, and all of what it tells, up to a cursor, was taken over."""
        forward = await self.forward()
        guest = GuestRecord("a", self.job_id, 1, forward.token, job_id=self.job_there, lease_end=1e12, boot="boot-1")
        await self.there.centre._store.change_guest(guest.key, lambda _: guest)
        await self.change(happenings.Forwarded(self.job_there, 0), stage=ForwardStage.BOUND, cursor=cursor)

    async def forward(self) -> ForwardRecord:
        forward = await self.here.centre._store.forward(self.job_id, 1)
        assert forward is not None
        return forward

    async def change(self, *told: happenings.Happening, **fields: Any) -> None:
        """Stores what the origin has noticed."""
        after = replace(await self.forward(), **fields)

        def decide(record: JobRecord, _: int) -> Change:
            events = []
            for one in told:
                record, event = transition(record, one, now())
                events.append(event)
            return Change(record, tuple(events), forward=after)

        await self.here.centre._store.change_job(self.job_id, decide)

    async def begin(self) -> None:
        """It is at the peer, and the origin was told that it runs there."""
        await self.send()
        await self.bind()
        job = await self.there.job(self.job_there)
        event = job_pb2.JobEvent(reason="CONTAINER_STARTED", state=job_pb2.JOB_STATE_RUNNING, message="it runs")
        await self.change(happenings.PeerTold(event, job))

    def run(self, request_id: str = "", **start: Any) -> Conversation:
        """Gives a run instruction at the origin."""
        return Conversation(self.jobs, wire.RunStart(job_id=self.job_id, request_id=request_id, **start))

    async def command(self) -> ExecCommand:
        """Returns the command that runs at the peer, once it does."""
        await eventually(lambda: bool(self.node.commands))
        return self.node.commands[-1]


class Conversation:
    """A run, as its caller sees it. Use it as an asynchronous context."""

    def __init__(self, jobs: Any, start: wire.RunStart) -> None:
        self._sent: asyncio.Queue[wire.RunJobRequest | None] = asyncio.Queue()
        self._sent.put_nowait(wire.RunJobRequest(start=start))
        self.answers: AsyncGenerator[wire.RunJobResponse, None] = jobs.RunJob(self._requests(), None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.answers.aclose()

    def send(self, **part: Any) -> None:
        self._sent.put_nowait(wire.RunJobRequest(**part))

    def end(self) -> None:
        self._sent.put_nowait(None)

    async def until(self, part: str) -> wire.RunJobResponse:
        """Reads until an answer of this kind."""
        async with asyncio.timeout(20):
            async for answer in self.answers:
                if answer.WhichOneof("part") == part:
                    return answer
        raise AssertionError(f"it ended without {part}")

    async def rest(self) -> list[wire.RunJobResponse]:
        async with asyncio.timeout(20):
            return [answer async for answer in self.answers]

    async def _requests(self) -> AsyncIterator[wire.RunJobRequest]:
        while (request := await self._sent.get()) is not None:
            yield request


@contextlib.asynccontextmanager
async def ends(folder: Path) -> AsyncIterator[Ends]:
    """Runs both centres until the block ends; the session waits at the origin, its like runs at the other side."""
    node = FakeNode()
    node.exits_at_once = None
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    async with running(folder / "a", join=False) as here, running(folder / "b", node) as there:
        session: dict[str, Any] = {"kind": job_pb2.JOB_KIND_SESSION, "command": []}
        job_there = await there.submit(**session)
        await there.until(job_there, job_pb2.JOB_STATE_RUNNING)
        store = here.centre._store
        peer = Connection(CallCarrier(there.centre._store, there.centre._jobs), there, job_there)
        book = Book(b=peer)
        reach = Reach(cast("Any", book), TestClock(), "id-of-a", 90.0, 30.0, 600.0)
        jobs = CarriedJobService("a", here.centre._jobs, store, here.centre._feed, reach, explained_s=0.5)
        results = Results(folder / "results")
        logs = LogReader("a", store, here.centre._feed, here.centre._nodes, results, reach)
        yield Ends(here, there, jobs, await here.submit(**session), job_there, node, peer, logs, results, book)
