"""What the Python client promises, over a real connection."""

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from puhui.client import Centre, Patience, Refusal, Trouble
from puhui.v1 import job_pb2, stream_pb2
from puhui.v1.job_service_pb2 import JobFilter
from tests.unit.cli.small_centre import RunningCentre

OUTPUT = b"to stdout \xe6\x99\xaeto stderr\n again\n"


def spec(**labels: str) -> job_pb2.JobSpec:
    return job_pb2.JobSpec(name="a-job", command=["python3", "train.py"], labels=labels)


@pytest.fixture
def centre(running: RunningCentre) -> Iterator[Centre]:
    with Centre(running.address) as centre:
        yield centre


def test_a_job_is_submitted_watched_and_pulled(centre: Centre, code: Path, tmp_path: Path) -> None:
    job = centre.submit(spec(), code)
    events = list(centre.watch(job.id))
    assert [event.reason for event in events] == [
        "SUBMITTED",
        "PREDICTED",
        "RESERVED",
        "CONTAINER_STARTED",
        "COMMAND_ENDED",
        "SUCCEEDED",
    ]
    assert b"".join(chunk.data for chunk in centre.logs(job.id, follow=True)) == OUTPUT
    pulled = centre.pull(job.id, tmp_path / "out")
    assert (tmp_path / "out/deep/metrics.json").read_bytes() == b"{}"
    assert {file.path for file in pulled.manifest.files} == {"model.pt", "deep/metrics.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "out"]


def test_a_lost_answer_makes_no_second_job(centre: Centre, running: RunningCentre, code: Path) -> None:
    centre.put_bundle(code)
    running.centre.faults["SubmitJob"] = [grpc.StatusCode.UNAVAILABLE]
    job = centre.submit(spec(), code)
    first, second = running.centre.request_ids
    assert first == second != ""
    assert list(running.centre.kept) == [job.id]


def test_a_broken_upload_begins_again(centre: Centre, running: RunningCentre, code: Path) -> None:
    running.centre.faults["PutBundle"] = [grpc.StatusCode.UNAVAILABLE] * 2
    bundle = centre.put_bundle(code)
    assert list(running.centre.bundles) == [bundle.id]
    assert running.centre.calls["PutBundle"] == 3


def test_every_submission_is_a_job_of_its_own(centre: Centre, code: Path) -> None:
    assert centre.submit(spec(), code).id != centre.submit(spec(), code).id
    same = [centre.submit(spec(), code, request_id="mine").id for _ in range(2)]
    assert same[0] == same[1]


def test_known_code_is_not_sent_again(centre: Centre, running: RunningCentre, code: Path) -> None:
    (code / "data.bin").write_bytes(bytes(range(256)) * 4096)
    told: list[tuple[int, int]] = []
    first = centre.put_bundle(code, lambda sent, total: told.append((sent, total)))
    assert told[-1][0] == told[-1][1] == first.size_bytes
    assert centre.put_bundle(code).id == first.id
    assert list(running.centre.bundles) == [first.id]


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_broken_streams_go_on_where_they_were(running: RunningCentre, code: Path, tmp_path: Path, after: int) -> None:
    troubles: list[Trouble] = []
    with Centre(running.address, on_trouble=troubles.append) as centre:
        job = centre.submit(spec(), code)
        whole = [event.cursor for event in centre.watch(job.id)]
        for rpc in ("WatchJob", "ReadLogs", "GetArtifacts"):
            running.centre.break_after[rpc] = [after, 1]
        assert [event.cursor for event in centre.watch(job.id)] == whole
        assert b"".join(chunk.data for chunk in centre.logs(job.id, follow=True)) == OUTPUT
        centre.pull(job.id, tmp_path / "out")
        assert (tmp_path / "out/model.pt").read_bytes() == b"weights"
    assert troubles
    assert troubles[0].address == running.address


def test_a_tail_that_breaks_off_is_not_repeated(centre: Centre, running: RunningCentre, code: Path) -> None:
    job = centre.submit(spec(), code)
    centre.wait(job.id)
    running.centre.break_after["ReadLogs"] = [1]
    assert b"".join(chunk.data for chunk in centre.logs(job.id, tail_lines=1)) == b" again\n"
    running.centre.break_after["ReadLogs"] = [1]
    assert b"".join(chunk.data for chunk in centre.logs(job.id, tail_lines=2)) == OUTPUT


def test_waiting_survives_a_restart_of_the_centre(running: RunningCentre, code: Path) -> None:
    missed = threading.Event()
    ended: list[job_pb2.Job] = []
    with Centre(running.address, on_trouble=lambda trouble: missed.set()) as centre:
        job = centre.submit(spec(course="hang"), code)
        waiter = threading.Thread(target=lambda: ended.append(centre.wait(job.id)))
        waiter.start()
        while running.centre.calls["WatchJob"] == 0:
            assert centre.get(job.id).id == job.id
        running.hang_up()
        assert missed.wait(20)
        running.listen()
        running.do("end", job.id, job_pb2.JOB_STATE_FAILED, "EXIT_CODE", 3)
        waiter.join(30)
    assert [(job.state, job.exit_code) for job in ended] == [(job_pb2.JOB_STATE_FAILED, 3)]


def test_waiting_has_an_end(centre: Centre, code: Path) -> None:
    job = centre.submit(spec(course="wait"), code)
    with pytest.raises(Refusal, match="goes on") as caught:
        centre.wait(job.id, timeout_s=0.2)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "WAIT_TIMED_OUT")
    assert centre.get(job.id).state == job_pb2.JOB_STATE_QUEUED


def test_jobs_come_page_by_page(centre: Centre, running: RunningCentre, code: Path) -> None:
    ids = [centre.submit(spec(course="wait"), code).id for _ in range(5)]
    assert [job.id for job in centre.jobs(page_size=2)] == ids[::-1]
    assert running.centre.calls["ListJobs"] == 3
    assert list(centre.jobs(JobFilter(name_prefix="other"))) == []


def test_a_refusal_is_not_tried_again(centre: Centre, running: RunningCentre) -> None:
    with pytest.raises(Refusal, match="puhui ps") as caught:
        centre.get("j-nothing")
    assert (caught.value.reason, caught.value.metadata) == ("JOB_NOT_FOUND", {"job_id": "j-nothing"})
    assert running.centre.calls["GetJob"] == 1


def test_what_the_centre_says_will_pass_is_waited_for(centre: Centre, running: RunningCentre) -> None:
    passing = Refusal(grpc.StatusCode.UNAVAILABLE, "NODE_UNREACHABLE", "the node is away", retry_after_s=0.05)
    running.centre.faults["CancelJob"] = [passing]
    with pytest.raises(Refusal, match="no job"):
        centre.cancel("j-1")
    assert running.centre.calls["CancelJob"] == 2
    running.centre.faults["CancelJob"] = [Refusal(grpc.StatusCode.UNAVAILABLE, "NODE_UNREACHABLE", "away for good")]
    with pytest.raises(Refusal, match="away for good"):
        centre.cancel("j-1")
    assert len(set(running.centre.request_ids)) == 2


def test_an_address_where_nothing_is_says_so_soon() -> None:
    with Centre("127.0.0.1:1", patience=Patience(first_s=0.1)) as centre, pytest.raises(Refusal) as caught:
        centre.capacity()
    assert caught.value.reason == "CENTRE_UNREACHABLE"
    assert "127.0.0.1:1" in caught.value.message
    assert "puhui up" in caught.value.message


def test_closing_ends_what_is_followed(running: RunningCentre, code: Path) -> None:
    centre = Centre(running.address)
    job = centre.submit(spec(course="hang"), code)
    read: list[bytes] = []
    caught: list[Refusal] = []
    seen = threading.Event()

    def follow() -> None:
        try:
            for chunk in centre.logs(job.id, follow=True):
                read.append(chunk.data)
                if sum(map(len, read)) == len(OUTPUT):
                    seen.set()
        except Refusal as refusal:
            caught.append(refusal)

    reader = threading.Thread(target=follow)
    reader.start()
    assert seen.wait(20)
    centre.close()
    reader.join(10)
    assert b"".join(read) == OUTPUT
    assert [refusal.code for refusal in caught] == [grpc.StatusCode.CANCELLED]


def test_damaged_artifacts_are_not_kept(centre: Centre, code: Path, tmp_path: Path) -> None:
    job = centre.submit(spec(artifacts="damaged"), code)
    centre.wait(job.id)
    with pytest.raises(Refusal) as caught:
        centre.pull(job.id, tmp_path / "out")
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.DATA_LOSS, "ARTIFACTS_DIGEST")
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_artifacts_overwrite_nothing(centre: Centre, code: Path, tmp_path: Path) -> None:
    job = centre.submit(spec(), code)
    centre.wait(job.id)
    with pytest.raises(Refusal) as caught:
        centre.pull(job.id, code)
    assert caught.value.reason == "TARGET_NOT_EMPTY"
    assert (code / "train.py").exists()
    (tmp_path / "empty").mkdir()
    assert centre.pull(job.id, tmp_path / "empty").folder == tmp_path / "empty"


def test_artifacts_that_lead_outside_are_refused(
    centre: Centre, running: RunningCentre, code: Path, tmp_path: Path
) -> None:
    job = centre.submit(spec(), code)
    centre.wait(job.id)
    running.centre.kept[job.id].artifacts = {"../escaped": b"x"}
    with pytest.raises(Refusal) as caught:
        centre.pull(job.id, tmp_path / "deep/out")
    assert caught.value.reason == "BUNDLE_PATH_OUTSIDE"
    assert not (tmp_path / "deep/escaped").exists()
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_job_without_artifacts_leaves_an_empty_folder(
    centre: Centre, running: RunningCentre, code: Path, tmp_path: Path
) -> None:
    job = centre.submit(spec(), code)
    centre.wait(job.id)
    running.centre.kept[job.id].artifacts = {}
    assert list(centre.pull(job.id, tmp_path / "out").folder.iterdir()) == []


def test_code_that_is_too_large_never_leaves(centre: Centre, running: RunningCentre, code: Path) -> None:
    with (code / "weights.bin").open("wb") as file:
        file.truncate(5 * 2**30)
    with pytest.raises(Refusal, match="leave out what the code does not need") as caught:
        centre.submit(spec(), code)
    assert caught.value.reason == "BUNDLE_TOO_LARGE"
    assert running.centre.calls["PutBundle"] == 0


def test_predict_stores_no_job(centre: Centre, running: RunningCentre, code: Path) -> None:
    answer = centre.predict(spec(), code)
    assert answer.sizing.choices[0].profile == "1g.10gb"
    assert running.centre.kept == {}


def test_the_fleet_is_shown(centre: Centre) -> None:
    (node,) = centre.nodes()
    assert node.inventory.gpus[0].emulated
    assert centre.capacity().gpus[0].memory_slices_free == 7


def test_streams_of_output_are_told_apart(centre: Centre, code: Path) -> None:
    job = centre.submit(spec(), code)
    chunks = list(centre.logs(job.id, follow=True))
    assert [chunk.stream for chunk in chunks] == [
        stream_pb2.LOG_STREAM_STDOUT,
        stream_pb2.LOG_STREAM_STDERR,
        stream_pb2.LOG_STREAM_STDOUT,
    ]
