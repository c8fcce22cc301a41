"""Bad input gets a clear error and nothing is lost: gRPC code, reason, and the store as it was."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import resource
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from controlplane.entrypoint import LARGEST_PARSED_BYTES
from puhui.rpc.bundle import pack_files
from puhui.v1 import fleet_service_pb2, job_pb2, stream_pb2
from puhui.v1 import job_service_pb2 as wire
from tests.unit.controlplane.centres import RunningCentre, eventually, refused, running

INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
async def centre(tmp_path: Path) -> AsyncIterator[RunningCentre]:
    async with running(tmp_path) as it:
        yield it


@contextlib.asynccontextmanager
async def refused_without_a_trace(
    centre: RunningCentre, code: grpc.StatusCode, reason: str, **metadata: str
) -> AsyncIterator[None]:
    before = await centre.unchanged()
    async with refused(code, reason, **metadata):
        yield
    assert await centre.unchanged() == before


def submission(files: dict[str, str] | None = None, **spec: Any) -> wire.SubmitJobRequest:
    return wire.SubmitJobRequest(
        spec=job_pb2.JobSpec(**{"command": ["python3", "x.py"], **spec}),
        inline=wire.InlineCode(files=files if files is not None else {"x.py": "print(1)\n"}),
    )


def parts(archive: bytes, bundle_id: str = "", size: int = -1) -> list[wire.PutBundleRequest]:
    header = stream_pb2.BundleHeader(
        bundle_id=bundle_id or "sha256:" + hashlib.sha256(archive).hexdigest(),
        size_bytes=size if size >= 0 else len(archive),
    )
    chunks = [archive[at : at + 2**18] for at in range(0, len(archive), 2**18)]
    return [wire.PutBundleRequest(header=header), *(wire.PutBundleRequest(chunk=chunk) for chunk in chunks)]


async def put(centre: RunningCentre, requests: list[wire.PutBundleRequest]) -> wire.PutBundleResponse:
    return await centre.jobs.PutBundle(iter(requests))


def tar_of(*entries: tarfile.TarInfo) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for entry in entries:
            tar.addfile(entry, io.BytesIO(b"\0" * entry.size))
    return archive.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname = kind, size, link
    return made


@pytest.mark.parametrize(
    ("archive", "code", "reason"),
    [
        (tar_of(entry("../x.py")), INVALID, "BUNDLE_PATH_OUTSIDE"),
        (tar_of(entry("/etc/x.py")), INVALID, "BUNDLE_PATH_OUTSIDE"),
        (tar_of(entry("null", tarfile.CHRTYPE)), INVALID, "BUNDLE_ENTRY_KIND"),
        (tar_of(entry("pipe", tarfile.FIFOTYPE)), INVALID, "BUNDLE_ENTRY_KIND"),
        (tar_of(entry("out", tarfile.SYMTYPE, link="../../etc")), INVALID, "BUNDLE_LINK_OUTSIDE"),
        (tar_of(entry("bomb", size=300 * 2**20)), EXHAUSTED, "BUNDLE_RATIO"),
        (tar_of(entry("folder", tarfile.DIRTYPE)), INVALID, "BUNDLE_EMPTY"),
        (b"not an archive", INVALID, "BUNDLE_UNREADABLE"),
        (pack_files({"x.py": b"print(1)" * 1000})[:-20], INVALID, "BUNDLE_UNREADABLE"),
    ],
    ids=["dotdot", "absolute", "device", "pipe", "symlink", "bomb", "empty", "no-archive", "cut-short"],
)
async def test_a_harmful_bundle(centre: RunningCentre, archive: bytes, code: grpc.StatusCode, reason: str) -> None:
    async with refused_without_a_trace(centre, code, reason):
        await put(centre, parts(archive))


@pytest.mark.parametrize(
    ("requests", "code", "reason"),
    [
        ([], INVALID, "UPLOAD_MALFORMED"),
        ([wire.PutBundleRequest(chunk=b"x")], INVALID, "UPLOAD_MALFORMED"),
        (parts(b"x", bundle_id="md5:00"), INVALID, "UPLOAD_MALFORMED"),
        (parts(b"abc", bundle_id="sha256:" + "0" * 64), INVALID, "UPLOAD_DIGEST"),
        (parts(b"abc", size=10), INVALID, "UPLOAD_INCOMPLETE"),
        (parts(b"abc", size=2), INVALID, "UPLOAD_MALFORMED"),
        (parts(b"abc", size=2**40), EXHAUSTED, "BUNDLE_TOO_LARGE"),
    ],
    ids=["nothing", "no-header", "no-digest", "digest", "short", "long", "too-large"],
)
async def test_a_malformed_upload(
    centre: RunningCentre, requests: list[wire.PutBundleRequest], code: grpc.StatusCode, reason: str
) -> None:
    async with refused_without_a_trace(centre, code, reason):
        await put(centre, requests)


async def test_a_client_that_vanishes_in_the_middle_of_an_upload(centre: RunningCentre) -> None:
    before = await centre.unchanged()
    folder = centre.state / "bundles"
    header, *_ = parts(b"x" * 2**20)
    call: Any = cast("Any", centre.jobs).PutBundle()
    await call.write(header)
    await call.write(wire.PutBundleRequest(chunk=b"x" * 1000))
    await eventually(lambda: bool(list(folder.iterdir())))
    call.cancel()
    await eventually(lambda: not list(folder.iterdir()))
    assert await centre.unchanged() == before
    assert (await centre.ended(await centre.submit())).state == job_pb2.JOB_STATE_SUCCEEDED


async def test_an_upload_that_is_there_already_answers_early(centre: RunningCentre) -> None:
    archive = pack_files({"x.py": b"print(1)\n"})
    first = await put(centre, parts(archive))
    again = await put(centre, parts(archive)[:1])
    assert (first.already_present, again.already_present) == (False, True)
    assert first.bundle == again.bundle
    request = wire.SubmitJobRequest(spec=job_pb2.JobSpec(command=["python3", "x.py"]), bundle_id=first.bundle.id)
    job = (await centre.jobs.SubmitJob(request)).job
    assert job.bundle_id == first.bundle.id
    await centre.ended(job.id)


@pytest.mark.parametrize(
    ("request_", "code", "reason", "metadata"),
    [
        (submission(command=["python3", "absent.py"]), INVALID, "ENTRYPOINT_NOT_FOUND", {"path": "absent.py"}),
        (submission({"x.py": "x = 1\ndef f(:\n"}), INVALID, "CODE_UNPARSABLE", {"path": "x.py", "line": "2"}),
        (submission({"x.py": "x = 1\n", "../y": ""}), INVALID, "BUNDLE_PATH_OUTSIDE", {}),
        (submission({}), INVALID, "CODE_MISSING", {}),
        (submission({"x.py": "#" * (2**20 + 1)}), INVALID, "INLINE_TOO_LARGE", {}),
        (submission(command=[]), INVALID, "SPEC_INVALID", {"field": "command"}),
        (submission(name="No Such Name"), INVALID, "SPEC_INVALID", {"field": "name"}),
        (
            submission(idle=job_pb2.IdlePolicy(idle_after=Duration(nanos=100_000_000))),
            grpc.StatusCode.INVALID_ARGUMENT,
            "IDLE_AFTER_TOO_SHORT",
            {"shortest_s": "0.3"},
        ),
        (
            submission(resources=job_pb2.Resources(profile="1g.5gb")),
            grpc.StatusCode.FAILED_PRECONDITION,
            "PROFILE_NOT_AVAILABLE",
            {"profile": "1g.5gb"},
        ),
        (
            wire.SubmitJobRequest(spec=job_pb2.JobSpec(command=["python3", "x.py"]), bundle_id="sha256:" + "0" * 64),
            grpc.StatusCode.NOT_FOUND,
            "BUNDLE_NOT_FOUND",
            {},
        ),
    ],
)
async def test_a_job_that_cannot_be(
    centre: RunningCentre,
    request_: wire.SubmitJobRequest,
    code: grpc.StatusCode,
    reason: str,
    metadata: dict[str, str],
) -> None:
    async with refused_without_a_trace(centre, code, reason, **metadata):
        await centre.jobs.SubmitJob(request_)
    prediction = wire.PredictJobRequest(spec=request_.spec, bundle_id=request_.bundle_id)
    if request_.WhichOneof("code") == "inline":
        prediction.inline.CopyFrom(request_.inline)
    async with refused_without_a_trace(centre, code, reason, **metadata):
        await centre.jobs.PredictJob(prediction)


async def test_a_request_id_used_twice_with_another_body(centre: RunningCentre) -> None:
    request = submission(name="first")
    request.request_id = "r-1"
    first = (await centre.jobs.SubmitJob(request)).job
    await centre.ended(first.id)
    before = await centre.unchanged()
    assert (await centre.jobs.SubmitJob(request)).job.id == first.id
    assert await centre.unchanged() == before
    request.spec.name = "second"
    async with refused_without_a_trace(centre, grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"):
        await centre.jobs.SubmitJob(request)
    async with refused_without_a_trace(centre, grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"):
        await centre.jobs.CancelJob(wire.CancelJobRequest(job_id=first.id, request_id="r-1"))
    request.request_id = "r" * 65
    async with refused_without_a_trace(centre, INVALID, "REQUEST_ID_INVALID"):
        await centre.jobs.SubmitJob(request)


async def test_one_request_sent_many_times_at_once_makes_one_job(centre: RunningCentre) -> None:
    request = submission()
    request.request_id = "r-1"
    answers = await asyncio.gather(*(centre.jobs.SubmitJob(request) for _ in range(10)))
    assert len({answer.job.id for answer in answers}) == 1
    assert len((await centre.jobs.ListJobs(wire.ListJobsRequest())).jobs) == 1


async def test_a_job_id_that_does_not_exist(centre: RunningCentre) -> None:
    absent = "j-000000000000"
    calls: list[Callable[[], Any]] = [
        lambda: centre.jobs.GetJob(wire.GetJobRequest(job_id=absent)),
        lambda: centre.jobs.CancelJob(wire.CancelJobRequest(job_id=absent)),
        lambda: anext(aiter(centre.jobs.WatchJob(wire.WatchJobRequest(job_id=absent)))),
        lambda: anext(aiter(centre.jobs.ReadLogs(wire.ReadLogsRequest(job_id=absent)))),
        lambda: anext(aiter(centre.jobs.GetArtifacts(wire.GetArtifactsRequest(job_id=absent)))),
    ]
    for call in calls:
        async with refused_without_a_trace(centre, grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND", job_id=absent):
            await call()
    job_id = await centre.submit()
    await centre.ended(job_id)
    async with refused_without_a_trace(centre, grpc.StatusCode.NOT_FOUND, "ATTEMPT_NOT_FOUND"):
        await centre.log(job_id, attempt=2)


async def test_a_page_token_from_elsewhere(centre: RunningCentre) -> None:
    for _ in range(3):
        await centre.ended(await centre.submit(labels={"a": "b"}))
    request = wire.ListJobsRequest(page_size=2, filter=wire.JobFilter(labels={"a": "b"}))
    page = await centre.jobs.ListJobs(request)
    newest = await centre.submit(labels={"a": "b"})
    await centre.ended(newest)
    request.page_token = page.next_page_token
    rest = await centre.jobs.ListJobs(request)
    seen = [job.id for job in [*page.jobs, *rest.jobs]]
    assert (len(seen), len(set(seen)), newest in seen, rest.next_page_token) == (3, 3, False, "")
    for token, wanted in [
        ("made-up", request.filter),
        (page.next_page_token, wire.JobFilter()),
        (page.next_page_token + "A", request.filter),
    ]:
        async with refused_without_a_trace(centre, INVALID, "PAGE_TOKEN_INVALID"):
            await centre.jobs.ListJobs(wire.ListJobsRequest(page_token=token, filter=wanted))
    async with refused_without_a_trace(centre, INVALID, "PAGE_TOKEN_INVALID"):
        await centre.fleet.ListNodes(fleet_service_pb2.ListNodesRequest(page_token=page.next_page_token))


async def test_a_stranger_cannot_join(centre: RunningCentre) -> None:
    request = fleet_service_pb2.RegisterNodeRequest(join_token="wrong", address="127.0.0.1:1")
    request.inventory.name = "stranger"
    async with refused_without_a_trace(centre, grpc.StatusCode.UNAUTHENTICATED, "JOIN_TOKEN_INVALID"):
        await centre.fleet.RegisterNode(request)
    request.join_token = (centre.state / "join-token").read_text()
    request.address = "192.0.2.1:7071"
    async with refused_without_a_trace(centre, INVALID, "NODE_INVALID"):
        await centre.fleet.RegisterNode(request)
    request.address = "127.0.0.1:1"
    request.certificate_request_pem = b"-----BEGIN"
    async with refused_without_a_trace(centre, grpc.StatusCode.UNIMPLEMENTED, "CERTIFICATES_NOT_IMPLEMENTED"):
        await centre.fleet.RegisterNode(request)
    async with refused_without_a_trace(centre, grpc.StatusCode.NOT_FOUND, "NODE_NOT_FOUND"):
        await centre.fleet.Heartbeat(fleet_service_pb2.HeartbeatRequest(node_id="n-absent"))
    assert (centre.state / "join-token").stat().st_mode & 0o777 == 0o600


async def test_what_is_not_served_yet_says_so(centre: RunningCentre) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: centre.fleet.DrainNode(fleet_service_pb2.DrainNodeRequest()),
        lambda: centre.fleet.UndrainNode(fleet_service_pb2.UndrainNodeRequest()),
        lambda: anext(aiter(centre.fleet.WatchFleet(fleet_service_pb2.WatchFleetRequest()))),
    ]
    for call in calls:
        async with refused(grpc.StatusCode.UNIMPLEMENTED, "RPC_NOT_IMPLEMENTED"):
            await call()


async def test_run_instructions_that_cannot_be(centre: RunningCentre) -> None:
    def run(*requests: wire.RunJobRequest) -> Any:
        return anext(aiter(centre.jobs.RunJob(iter(requests), timeout=20)))

    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "START_MISSING"):
        await run(wire.RunJobRequest(stdin=b"x"))
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", field="command"):
        await run(wire.RunJobRequest(start=wire.RunStart(job_id="j-nosuchjob")))
    start = wire.RunStart(job_id="j-nosuchjob", command=["ls"], working_directory="here")
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", field="working_directory"):
        await run(wire.RunJobRequest(start=start))
    async with refused(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND"):
        await run(wire.RunJobRequest(start=wire.RunStart(job_id="j-nosuchjob", command=["ls"])))
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", field="hardest"):
        await centre.jobs.SuspendJob(wire.SuspendJobRequest(hardest=job_pb2.RECLAIM_MODE_NEVER))
    for call in (centre.jobs.SuspendJob(wire.SuspendJobRequest()), centre.jobs.ResumeJob(wire.ResumeJobRequest())):
        async with refused(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND"):
            await call
    job_id = (
        await centre.jobs.SubmitJob(wire.SubmitJobRequest(spec=job_pb2.JobSpec(kind=job_pb2.JOB_KIND_SESSION)))
    ).job.id
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, "JOB_NOT_STARTED"):
        await centre.jobs.SuspendJob(wire.SuspendJobRequest(job_id=job_id))
    await centre.cancel(job_id)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, "JOB_ENDED"):
        await run(wire.RunJobRequest(start=wire.RunStart(job_id=job_id, command=["ls"])))


@contextlib.contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """The operating system refuses to let any file of this process grow further, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk(centre: RunningCentre) -> None:
    archive = pack_files({"x.py": b"print(1)\n", "noise": hashlib.shake_256(b"x").digest(3 * 2**20)})
    async with refused_without_a_trace(centre, EXHAUSTED, "DISK_FULL"):
        with files_of_at_most(2**20):
            await put(centre, parts(archive))
    await put(centre, parts(archive))


async def test_a_full_database(tmp_path: Path) -> None:
    async with running(tmp_path, join=False) as centre:
        writer = centre.centre._store._writer
        await writer.write(lambda db: db.execute("pragma max_page_count = 1").fetchone())
        before = await centre.unchanged()
        async with refused(EXHAUSTED, "DISK_FULL"):
            # A database page may have room for a few; each that is accepted is really there.
            for number in range(1000):
                before = await centre.unchanged()
                await centre.jobs.SubmitJob(submission({"x.py": f"print({number})"}, env={"X": "y" * 8000}))
        assert await centre.unchanged() == before
        await writer.write(lambda db: db.execute("pragma max_page_count = 100000").fetchone())
        await centre.jobs.SubmitJob(submission())


async def test_a_list_of_large_jobs_comes_in_more_pages(tmp_path: Path) -> None:
    async with running(tmp_path, join=False) as centre:
        large: dict[str, Any] = {"command": ["python3", "x.py", "x" * 110_000], "env": {"X": "y" * 110_000}}
        made = [(await centre.jobs.SubmitJob(submission(**large))).job.id for _ in range(45)]
        seen, request = list[str](), wire.ListJobsRequest(page_size=500)
        while True:
            page = await centre.jobs.ListJobs(request)
            assert page.ByteSize() <= 4.5 * 2**20
            seen += [job.id for job in page.jobs]
            request.page_token = page.next_page_token
            if not request.page_token:
                break
        assert seen == made[::-1]
        few = await centre.jobs.ListJobs(wire.ListJobsRequest(page_size=3))
        assert [job.id for job in few.jobs] == made[:-4:-1]


@pytest.mark.parametrize("budget_s", [0, -1, 121, 315576000000])
async def test_a_budget_that_cannot_be(centre: RunningCentre, budget_s: int) -> None:
    request = wire.PredictJobRequest(
        spec=job_pb2.JobSpec(command=["python3", "x.py"]), inline=wire.InlineCode(files={"x.py": "print(1)"})
    )
    request.budget.seconds = budget_s
    async with refused(INVALID, "BUDGET_OUT_OF_RANGE"):
        await centre.jobs.PredictJob(request)
    request.budget.seconds = 30
    assert len((await centre.jobs.PredictJob(request)).profiles) > 0


async def test_a_program_too_large_to_parse_is_accepted_and_the_prediction_says_so(centre: RunningCentre) -> None:
    longest = "a=1\n" * (LARGEST_PARSED_BYTES // 4)
    for code, said in ((longest, ""), (longest + "(((\n", "x.py has 393220 bytes and was not parsed")):
        request = wire.PredictJobRequest(
            spec=job_pb2.JobSpec(command=["python3", "x.py"]), inline=wire.InlineCode(files={"x.py": code})
        )
        assert (await centre.jobs.PredictJob(request)).prediction.reason.startswith(said)
    async with refused(INVALID, "CODE_UNPARSABLE"):
        await centre.jobs.SubmitJob(submission({"x.py": longest[:-4] + "(((\n"}))
    job = (await centre.jobs.SubmitJob(submission({"x.py": longest + "(((\n"}))).job
    assert "was not parsed" in job.prediction.reason
    await centre.ended(job.id)
