"""A job file says what it means, or is refused with the place where it does not."""

from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from puhui.cli.job_file import JobFile, read_job_file
from puhui.cli.terminal import Mistake
from puhui.v1 import job_pb2


def read(tmp_path: Path, text: str) -> JobFile:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return read_job_file(path)


def refused(tmp_path: Path, text: str) -> Mistake:
    with pytest.raises(Mistake) as caught:
        read(tmp_path, text)
    return caught.value


def test_every_field_reaches_the_spec(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        """
        name: digits
        type: session
        command: python3 train.py --note "two words"
        image: localhost/x:1
        env: {BATCH: 64, RATE: 0.1, NAME: text}
        resources:
          profile: 2g.20gb
          memory: 12Gi
          cpus: 2.5
          host_memory: 8GB
          pids: 100
          network: true
        inputs:
          - {name: images, size: 1.5GB}
        priority: -3
        max_duration: 1h30m
        stop_grace: 20s
        labels: {team: vision}
        tenant: lab
        idle: {after: 10m, below_percent: 5, reclaim: checkpoint}
        peers: {here_only: true, preferred: [east], max_wait: 2m}
        """,
    ).spec()
    assert spec == job_pb2.JobSpec(
        name="digits",
        kind=job_pb2.JOB_KIND_SESSION,
        command=["python3", "train.py", "--note", "two words"],
        image="localhost/x:1",
        env={"BATCH": "64", "RATE": "0.1", "NAME": "text"},
        resources=job_pb2.Resources(
            profile="2g.20gb", memory_mib=12288, cpus=2.5, host_memory_mib=7630, pids=100, network=True
        ),
        inputs=[job_pb2.DataInput(name="images", size_bytes=1_500_000_000)],
        priority=-3,
        max_duration=Duration(seconds=5400),
        stop_grace=Duration(seconds=20),
        labels={"team": "vision"},
        tenant="lab",
        idle=job_pb2.IdlePolicy(
            idle_after=Duration(seconds=600), idle_below_percent=5, reclaim_mode=job_pb2.RECLAIM_MODE_CHECKPOINT
        ),
        peers=job_pb2.PeerPolicy(here_only=True, preferred_peers=["east"], max_wait=Duration(seconds=120)),
    )


def test_what_is_not_said_is_not_set(tmp_path: Path) -> None:
    spec = read(tmp_path, "command: [python3, train.py]").spec()
    assert spec == job_pb2.JobSpec(
        kind=job_pb2.JOB_KIND_BATCH, command=["python3", "train.py"], resources=job_pb2.Resources()
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "command: x\nmax_durration: 10m",
            "line 2: max_durration: is no field of a job file; did you mean max_duration?",
        ),
        ("command: x\nresources:\n  gpu: 1", "line 3: resources.gpu: is no field of a job file; there are: profile, "),
        ("command: x\ninputs:\n  - name: a\n    sise: 1GB", "line 4: inputs.0.sise: is no field"),
        ("command: x\ninputs:\n  - name: a", "line 3: inputs.0.size: is missing"),
        ("name: a", "line 1: command: is missing"),
        ("", "command: is missing"),
        ("command: ''", "line 1: command: is empty; say what to run"),
        ("command: x\nmax_duration: 600", "line 2: max_duration: 600 is no duration; write 90s"),
        ("command: x\nresources: {memory: 24}", "line 2: resources.memory: 24 is no size; write 24GB"),
        ("command: x\nenv: {DEBUG: yes}", "line 2: env.DEBUG: must be text; put it in quotes"),
        ("command: x\npriority: 101", "line 2: priority: must be at most 100"),
        ("command: x\ntype: daemon", "line 2: type: must be batch or session"),
        ("command: x\nname: a\nname: b", "line 3: name: is there twice"),
        ("- command: x", "line 1: the file: must be fields, each `name: value`"),
        ("command: x\nresources: 12GB", "line 2: resources: must be fields, each `name: value`"),
        ("command: x\nresources: {network: maybe}", "line 2: resources.network: must be true or false"),
        ("command: x\nresources: {cpus: two}", "line 2: resources.cpus: must be a number"),
        ("command: x\npriority: 1.5", "line 2: priority: must be a whole number"),
        ("command: 5", "line 1: command: must be text"),
        ("command: 'a \"b'", "line 1: command: has a quotation mark that is not closed"),
        ("command: x\nidle: {reclaim: now}", "line 2: idle.reclaim: must be detach, checkpoint, stop or never"),
        ("a: 1\nb: 2\ncommand: x", "line 1: a: is no field"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    mistake = refused(tmp_path, text)
    assert mistake.reason == "JOB_FILE_INVALID"
    assert said in mistake.message
    assert mistake.metadata["file"].endswith("job.yaml")


@pytest.mark.parametrize(
    "text", ["command: [x", "\tcommand: x", "a: &a [*a", "command: \x00", "!!python/object:os.x {}"]
)
def test_what_is_no_yaml_is_refused(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, text).reason in ("JOB_FILE_UNREADABLE", "JOB_FILE_INVALID")


def test_where_it_is_no_yaml_is_said_in_one_line(tmp_path: Path) -> None:
    said = refused(tmp_path, "name: x\ncommand: [x").message
    assert said.endswith("job.yaml: line 2: this is no YAML: expected ',' or ']', but got the end of the file")
    with pytest.raises(Mistake, match="cannot be read: Is a directory"):
        read_job_file(tmp_path)


def test_a_circle_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, "command: &a [*a]").reason == "JOB_FILE_INVALID"


def test_a_file_that_is_not_there_or_far_too_large(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"nothing\.yaml: there is no such file$"):
        read_job_file(tmp_path / "nothing.yaml")
    assert refused(tmp_path, "#" * 2**21).reason == "JOB_FILE_UNREADABLE"


def test_the_schema_forbids_what_the_reader_forbids() -> None:
    schema = JobFile.model_json_schema()
    assert schema["additionalProperties"] is False
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())
    assert schema["properties"]["max_duration"]["anyOf"][0]["type"] == "string"
    assert schema["required"] == ["command"]


def test_where_it_may_run(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "command: python3 train.py\n"
        "peers:\n  preferred: [east, west]\n  max_wait: 0s\n  labels: {region: eu}\n  not_labels: {tier: 2}\n"
    )
    assert read_job_file(path).spec().peers == job_pb2.PeerPolicy(
        preferred_peers=["east", "west"],
        max_wait=Duration(),
        required_labels={"region": "eu"},
        forbidden_labels={"tier": "2"},
    )
    path.write_text("command: python3 train.py\npeers: {}\n")
    assert read_job_file(path).spec().peers == job_pb2.PeerPolicy()


def test_when_a_share_may_be_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "command: python3 train.py\n"
        "idle:\n  after: 5m\n  below_percent: 2\n  reclaim: stop\n  start_grace: 90s\n  warn_signal: true\n"
        "  on_reclaim: sh -c 'save it'\n  on_reclaim_limit: 1m\n"
    )
    idle = read_job_file(path).spec().idle
    assert (idle.idle_after.seconds, idle.start_grace.seconds, idle.on_reclaim_limit.seconds) == (300, 90, 60)
    assert (idle.idle_below_percent, idle.warn_signal, list(idle.on_reclaim)) == (2, True, ["sh", "-c", "save it"])
    assert idle.reclaim_mode == job_pb2.RECLAIM_MODE_STOP
    path.write_text("command: python3 train.py\n")
    assert not read_job_file(path).spec().HasField("idle")
