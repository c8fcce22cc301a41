"""What people and scripts get to read."""

import json
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from puhui.cli import words
from puhui.cli.attached import ChunkJson
from puhui.cli.chart import bar, chance, memory_chart
from puhui.cli.facts import facts_line, number
from puhui.cli.jobs import job_facts
from puhui.cli.message_json import json_of
from puhui.cli.share_facts import share_facts
from puhui.cli.story import exit_code_of, tell, tell_end
from puhui.v1 import card_pb2, job_pb2, prediction_pb2, stream_pb2
from puhui.v1.job_service_pb2 import WatchJobResponse
from tests.unit.cli.small_centre import PREDICTION


def test_one_that_outgrew_its_slice_is_told_and_shown() -> None:
    update = WatchJobResponse(
        event=job_pb2.JobEvent(
            state=job_pb2.JOB_STATE_STOPPING, reason="DEVICE_OUT_OF_MEMORY", message="it ran out; it is tried again"
        )
    )
    assert tell(update) == [("memory", "it ran out; it is tried again")]
    update.event.state, update.event.reason = job_pb2.JOB_STATE_QUEUED, "GROWN"
    update.event.message = "it waits for 1g.20gb (20096 MiB)"
    assert tell(update) == [("waiting", "it waits for 1g.20gb (20096 MiB)")]
    job = job_pb2.Job(state=job_pb2.JOB_STATE_RUNNING)
    job.attempts.add(
        number=1, profile="1g.10gb", node_id="n-1", exit_code=1, message="it ran out", peak_memory_mib=9728
    )
    shown = dict(job_facts(job, 0.0))["attempt 1"]
    assert shown == "1g.10gb, node n-1, exit code 1, used up to 9.5 GiB of device memory: it ran out"


def test_json_has_every_field_by_its_proto_name() -> None:
    job = job_pb2.Job(
        id="j-1",
        spec=job_pb2.JobSpec(env={"B": "2", "A": "1"}, resources=job_pb2.Resources(memory_mib=2**40)),
        state=job_pb2.JOB_STATE_RUNNING,
        create_time=Timestamp(seconds=1),
        log_size_bytes=2**60,
    )
    document = json.loads(json.dumps(json_of(job)))
    assert list(document) == [field.name for field in job.DESCRIPTOR.fields]
    assert document["spec"]["env"] == {"A": "1", "B": "2"}
    assert document["spec"]["resources"]["memory_mib"] == 2**40
    assert (document["state"], document["log_size_bytes"]) == ("JOB_STATE_RUNNING", 2**60)
    assert (document["create_time"], document["end_time"], document["exit_code"]) == (
        "1970-01-01T00:00:01Z",
        None,
        None,
    )
    assert (document["attempts"], document["artifacts"]) == ([], None)


def test_json_of_what_json_has_no_words_for() -> None:
    assert json_of(Duration(seconds=5400)) == "5400s"
    assert json_of(stream_pb2.LogChunk(data=b"\xff"))["data"] == "/w=="
    assert json_of(prediction_pb2.MemoryPart(mib=float("nan")))["mib"] is None
    newer = stream_pb2.LogChunk.FromString(b"\x18\x63")  # a stream that this version does not know
    assert json_of(newer)["stream"] == 99


@given(st.text(), st.lists(st.integers(1, 5)))
def test_text_of_chunks_is_cut_nowhere(text: str, cuts: list[int]) -> None:
    data, as_json, seen, start = text.encode(errors="replace"), ChunkJson(), "", 0
    for length in [*cuts, len(data) + 1]:
        seen += as_json.of(stream_pb2.LogChunk(data=data[start : start + length]))["text"]
        start += length
    assert seen == data.decode()


@pytest.mark.parametrize(
    ("state", "exit_code", "started", "expected"),
    [
        (job_pb2.JOB_STATE_SUCCEEDED, 0, True, 0),
        (job_pb2.JOB_STATE_FAILED, 3, True, 3),
        (job_pb2.JOB_STATE_FAILED, 0, True, 1),  # timed out, and ended well all the same
        (job_pb2.JOB_STATE_FAILED, -1, True, 129),
        (job_pb2.JOB_STATE_FAILED, 300, True, 255),
        (job_pb2.JOB_STATE_FAILED, None, True, 1),
        (job_pb2.JOB_STATE_FAILED, None, False, 125),
        (job_pb2.JOB_STATE_CANCELLED, 143, True, 143),
        (job_pb2.JOB_STATE_CANCELLED, None, False, 125),
    ],
)
def test_the_exit_code_is_the_commands_and_never_a_false_zero(
    state: job_pb2.JobState.ValueType, exit_code: int | None, started: bool, expected: int
) -> None:
    job = job_pb2.Job(state=state, exit_code=exit_code, start_time=Timestamp(seconds=1) if started else None)
    assert exit_code_of(job) == expected


def test_the_story_says_what_the_evidence_is() -> None:
    job = job_pb2.Job(id="j-1", centre="here", prediction=PREDICTION)
    job.attempts.add(number=1, profile="1g.10gb", gpu_model="NVIDIA X", emulated=True, runtime="podman")
    job.attempts.add(number=2, profile="2g.20gb", gpu_model="NVIDIA X", gpu_index=3).placement.CopyFrom(
        card_pb2.Placement(start=4, size=2)
    )

    def told(reason: str, attempt: int = 1, message: str = "", **details: str) -> list[tuple[str, str]]:
        event = job_pb2.JobEvent(reason=reason, attempt=attempt, message=message, details=details)
        return tell(WatchJobResponse(job=job, event=event))

    assert told("SUBMITTED") == [("job", "j-1 at centre here")]
    assert told("RESERVED") == [("placed", "1g.10gb on GPU 0, X (emulated), memory slice 0")]
    assert told("RESERVED", 2) == [("placed", "2g.20gb on GPU 3, X, memory slices 4–5 (attempt 2)")]
    assert told("RESERVED", 3, "somewhere") == [("placed", "somewhere")]
    assert told("SLICE_CREATED", slice_uuid="MIG-12345678-9") == [("cut", "MIG-12345678")]
    assert told("CONTAINER_STARTED", container_id="abcdef0123456789") == [("started", "podman abcdef012345")]
    assert told("RESULTS_COLLECTED", log_bytes="2048", artifact_files="1") == [
        ("collected", "2.0 KiB of output, 1 artifact file")
    ]
    assert told("RESULTS_COLLECTED", message="all of it") == [("collected", "all of it")]
    assert told("NEW_THING", message="of a later version") == [("new thing", "of a later version")]
    assert told("SOMETHING_WITH_A_LONG_NAME", message="x") == [("event", "something with a long name: x")]
    assert told("COMMAND_ENDED") == []


def test_why_a_job_cannot_start_is_said_once() -> None:
    event = job_pb2.JobEvent(
        reason="IMAGE_NOT_FOUND", state=job_pb2.JOB_STATE_STOPPING, message="it cannot start: no image x"
    )
    assert tell(WatchJobResponse(job=job_pb2.Job(), event=event)) == [("stopping", "image not found")]
    job = job_pb2.Job(state=job_pb2.JOB_STATE_FAILED, reason=event.reason, message=event.message)
    assert tell_end(job) == "failed, no exit code (IMAGE_NOT_FOUND): it cannot start: no image x"


def test_the_users_word_wins_over_the_prediction() -> None:
    job = job_pb2.Job(prediction=PREDICTION)
    event = job_pb2.JobEvent(reason="PREDICTED")
    job.sizing.origin = prediction_pb2.SIZING_ORIGIN_MEMORY
    assert tell(WatchJobResponse(job=job, event=event)) == [
        ("predicted", "8.9 GiB; the memory that you asked for wins")
    ]
    job.prediction.tier = prediction_pb2.PREDICTION_TIER_NO_ACCELERATOR
    job.sizing.origin = prediction_pb2.SIZING_ORIGIN_PROFILE
    assert tell(WatchJobResponse(job=job, event=event)) == [
        ("predicted", "no use of a GPU was found; the profile that you asked for wins")
    ]


def test_the_end_says_why_and_where_the_results_are() -> None:
    job = job_pb2.Job(
        id="j-1", state=job_pb2.JOB_STATE_FAILED, reason="TIMED_OUT", message="ran for 10m", exit_code=137
    )
    assert tell_end(job) == "failed, exit code 137 (TIMED_OUT): ran for 10m"
    job.artifacts.file_count = 2
    killed = job_pb2.Job(state=job_pb2.JOB_STATE_FAILED, reason="EXIT_CODE", message="it ended", exit_code=137)
    assert tell_end(killed) == "failed, exit code 137 (signal 9); its log says more"
    assert tell_end(job).endswith("; 2 files in /workspace/outputs: puhui pull j-1")
    assert tell_end(job_pb2.Job(state=job_pb2.JOB_STATE_CANCELLED, reason="X")) == "cancelled, no exit code (X)"


@pytest.mark.parametrize(
    ("length", "said"),
    [(0, "0.0s"), (9.94, "9.9s"), (59, "59s"), (60, "1m"), (61, "1m1s"), (3660, "1h1m"), (90000, "1d1h")],
)
def test_spans(length: float, said: str) -> None:
    assert words.span(length) == said


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**50, "1024.0 TiB")]
)
def test_sizes(size: float, said: str) -> None:
    assert words.size(size) == said


@given(st.floats(-1, 2))
def test_bars_keep_to_their_width(share: float) -> None:
    assert len(bar(share)) <= 40
    assert len(bar(1)) == 40
    assert bar(0) == ""


def outlook(profile: str, memory_mib: int, **more: Any) -> prediction_pb2.ProfileOutlook:
    return prediction_pb2.ProfileOutlook(profile=profile, gpu_model="A100", memory_mib=memory_mib, **more)


def charted(prediction: prediction_pb2.Prediction, profiles: list[prediction_pb2.ProfileOutlook]) -> list[str]:
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(memory_chart(prediction, profiles))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_the_chart_marks_the_slice_that_is_chosen() -> None:
    profiles = [outlook(f"{n}g.{n}0gb", 9728 * n, chosen=n == 7) for n in range(1, 8)]
    lines = charted(PREDICTION, profiles)
    words = [line.split()[0] for line in lines if line.strip()]
    assert words[words.index("p50") :][:4] == ["p50", "p90", "p99", "needs"]
    assert next(line for line in lines if "chosen" in line).startswith("7g.70gb")
    assert any("needs" in line for line in charted(prediction_pb2.Prediction(), []))


def test_the_chart_says_of_each_profile_what_is_known_and_nothing_else() -> None:
    prediction = prediction_pb2.Prediction(required_mib=9900)
    prediction.memory.p50_mib, prediction.memory.p90_mib, prediction.memory.p99_mib = 9000, 9900, 11000
    for category, mib in (("context", 1500), ("activations", 7480), ("data", 20)):
        prediction.parts.add(category=category, mib=mib)
    small = outlook("1g.10gb", 9728, reason="too small", chance_of_fit=0.85, slowdown_p50=6.2)
    large = outlook("2g.20gb", 19968, chosen=True, satisfies=True, chance_of_fit=0.99999, slowdown_p50=3.1)
    large.duration_p50.FromSeconds(7300)
    assert charted(prediction, [small, large]) == [
        "activations  ████████▎               7.3 GiB",
        "context      █▋                      1.5 GiB",
        "",
        "p50          █████████▉              8.8 GiB",
        "p90          ██████████▉             9.7 GiB",
        "p99          ████████████▏           10.7 GiB",
        "needs        ██████████▉             9.7 GiB",
        "",
        "                                               fits  slower  takes",
        "1g.10gb      ██████████▊             9.5 GiB    85%    6.2x         too small",
        "2g.20gb      ██████████████████████  19.5 GiB  >99%    3.1x   2h1m  ← chosen",
    ]


@pytest.mark.parametrize(("share", "said"), [(0, "0%"), (1e-9, "<1%"), (0.5, "50%"), (0.9999, ">99%"), (1, "100%")])
def test_a_chance_is_no_certainty(share: float, said: str) -> None:
    assert chance(share) == said


def test_facts_have_units_and_leave_out_what_is_not() -> None:
    facts = {
        "model": "resnet50",
        "parameters": "25557032",
        "trained_parameters": "25557032",
        "batch": "64",
        "image": "0",
        "training": "True",
        "gradient_checkpointing": "False",
        "beyond_training": "True",
        "activation_bytes": str(round(10.2 * 2**30)),
        "macs_per_step": "1046000000000",
        "new_fact": "7",
    }
    assert facts_line(prediction_pb2.CodeFact(name=name, value=value) for name, value in facts.items()) == (
        "model resnet50, 25.6 M parameters, batch 64, training, activations 10.2 GiB, 1.0 T MAC per step, new fact 7"
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (999600, "1.0 M"), (9e5, "900 k"), (2e18, "2000.0 P")],
)
def test_numbers(value: float, said: str) -> None:
    assert number(value) == said


def test_large_amounts_in_a_sentence_are_readable() -> None:
    assert words.readable("3774874 MiB are predicted; the largest is 7g.80gb (81050 MiB)") == (
        "3.6 TiB are predicted; the largest is 7g.80gb (81050 MiB)"
    )


def test_shares_and_their_use_are_shown() -> None:
    job = job_pb2.Job(state=job_pb2.JOB_STATE_RUNNING, run_count=7)
    job.idleness.idle = True
    job.idleness.unused_since.seconds = 1000
    job.idleness.signal, job.idleness.message = "multiprocessors", "its multiprocessors were used 0.2%"
    job.idle_policy.idle_after.seconds, job.idle_policy.idle_below_percent = 300, 1.5
    job.idle_policy.reclaim_mode = job_pb2.RECLAIM_MODE_CHECKPOINT
    attempt = job.attempts.add(number=1)
    for index in range(7):
        share = attempt.shares.add(slice_uuid=f"MIG-{index}", gpu_index=index, profile="1g.10gb", busy_seconds=30)
        share.hold_time.seconds, share.release_time.seconds = 900, 960
        share.reclaim_mode = job_pb2.RECLAIM_MODE_DETACH
    attempt.shares[-1].ClearField("release_time")
    run = job.runs.add(id="r-1", command=["python3", "a b.py"], exit_code=3)
    run.create_time.seconds, run.start_time.seconds, run.end_time.seconds = 1000, 1010, 1030
    facts = share_facts(job, 1060.0)
    assert facts[0] == ("use", "idle, unused for 1m (multiprocessors: its multiprocessors were used 0.2%)")
    assert facts[1] == ("taken back", "after 5m below 1.5%, at most by checkpoint, ending no work")
    assert facts[2] == ("shares", "7; the newest 5 are below")
    assert facts[3] == (
        "share",
        "1g.10gb MIG-2 on GPU 2, memory slice 0, held 1m, used 30s, taken back (detach)",
    )
    assert facts[7][1].endswith("held 2m40s, has it now")
    assert facts[8:] == [
        ("runs", "7; the newest 1 are below, `puhui runs ` shows more"),
        ("run", "python3 'a b.py': exit code 3, ran 20s, 1m ago (r-1)"),
    ]
    job.idle_policy.reclaim_mode = job_pb2.RECLAIM_MODE_NEVER
    assert share_facts(job, 1060.0)[1][1] == "never, but by `puhui suspend`"
