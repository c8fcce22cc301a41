"""Dry runs: what is asked of a node, what is believed of what comes back, and that nothing is left."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import zipfile
from dataclasses import asdict
from pathlib import Path

import grpc
import pytest

from controlplane.dry_runs import DryRuns
from controlplane.orphans import remove_orphans
from controlplane.prediction import Code
from controlplane.records import BundleRecord
from controlplane.reservations import Reservations
from predictor_onnx.traced_step import TracedStep
from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, node_pb2
from tests.unit.controlplane.fake_node import FakeNode

STEP = TracedStep(
    10.0, 9.0, 9.5, 8.0,
    {"parameter": 1.0, "data": 0.0, "activation": 6.0, "gradient": 0.5, "optimizer": 0.5, "temporary": 0.0},
    2.0, 3.0, parameters=4, convolutions=0, pointwise=0, depthwise=0, kernels=9, flops=1e9, moved_bytes=1e8,
)  # fmt: skip
CODE = Code({"train.py": b"import torch\n"}, {"train.py": 13}, ["python3", "train.py", "--lr", "1"], 0, {"A": "b"})


def finding(ending: str = "steps_seen", step: TracedStep | None = STEP) -> bytes:
    told = {"ending": ending, "reason": "", "steps": 2, "step": None if step is None else asdict(step)}
    return json.dumps(told).encode() + b"\n"


class Box:
    """A node in contact."""

    def __init__(self, name: str = "n-1") -> None:
        self.node_id = name
        self.client = FakeNode(name)
        self.client.exits_at_once = None

    async def begun(self, number: int = 1) -> str:
        """Waits until it runs so many containers, and returns the id of the newest one's owner."""
        async for event in self.client.events(0):
            if event.kind == node_pb2.NODE_EVENT_KIND_CONTAINER_STARTED:
                number -= 1
            if not number:
                return event.owner.job_id
        raise AssertionError("a node's events never end")

    async def ends(self, output: bytes, number: int = 1) -> None:
        job_id = await self.begun(number)
        await self.client.write(job_id, output)
        await self.client.exit(job_id, 0)


def asked(runs: DryRuns, fingerprint: str = "f", within_s: float = 60, tenant: str = "astro") -> asyncio.Task[object]:
    here = Path(__file__)
    record = BundleRecord("sha256:1", here.stat().st_size, 10, {})
    return asyncio.create_task(runs.of(tenant, fingerprint, CODE, record, here, within_s))


async def test_a_finding_is_believed_and_remembered_and_nothing_is_left() -> None:
    box = Box()
    runs = DryRuns("local", lambda: [box])
    waiting = asked(runs)
    await box.begun()
    assert len(runs.living) == 1
    await box.ends(b"what the program prints elsewhere\n" + finding())
    assert await waiting == STEP
    await runs.close()
    assert box.client.empty
    assert not runs.living
    assert runs.known("astro", "f") == STEP
    assert runs.known("geo", "f") is None
    assert await asked(runs) == STEP
    assert len(box.client.started) == 1


async def test_what_is_asked_of_the_node() -> None:
    box = Box()
    requests = []
    create = box.client.create_container

    async def noted(request: object) -> node_pb2.Container:
        requests.append(request)
        return await create(request)  # type: ignore[arg-type]

    box.client.create_container = noted  # type: ignore[method-assign]
    runs = DryRuns("local", lambda: [box])
    waiting = asked(runs)
    await box.ends(finding())
    await waiting
    (request,) = requests
    assert not request.network  # type: ignore[attr-defined]
    assert not request.slice_uuids  # type: ignore[attr-defined]
    limits, env = request.limits, dict(request.env)  # type: ignore[attr-defined]
    assert (limits.cpus, limits.pids) == (1, 256)
    assert 0 < limits.host_memory_mib <= 8192
    assert 0 < request.max_duration.seconds <= 60  # type: ignore[attr-defined]
    assert list(request.command)[-5:] == ["60", *CODE.command]  # type: ignore[attr-defined]
    program = base64.b64decode(env.pop("PUHUI_DRY_RUN"))
    assert env == {"A": "b"}
    assert "__main__.py" in zipfile.ZipFile(io.BytesIO(program)).namelist()
    assert len(program) < 90_000  # Linux bears 128 KiB in one variable
    await runs.close()


@pytest.mark.parametrize(
    "output",
    [b"", b"nonsense\n", b"x" * 300_000, finding("failed", None), finding("no_card_used", None), b'{"ending": 1}\n'],
    ids=["nothing", "nonsense", "endless", "failed", "no card", "other form"],
)
async def test_what_is_no_finding_is_none_and_not_tried_again(output: bytes) -> None:
    box = Box()
    runs = DryRuns("local", lambda: [box])
    waiting = asked(runs)
    await box.ends(output)
    assert await waiting is None
    assert await asked(runs) is None
    assert len(box.client.started) == 1
    await runs.close()
    assert box.client.empty


async def test_one_that_takes_long_goes_on_for_who_asks_next() -> None:
    box = Box()
    runs = DryRuns("local", lambda: [box])
    assert await asked(runs, within_s=0) is None
    later = asked(runs)
    await box.ends(finding())
    assert await later == STEP
    assert len(box.client.started) == 1
    await runs.close()


async def test_one_at_a_time_on_a_node_and_two_in_all() -> None:
    boxes = [Box("n-1"), Box("n-2"), Box("n-3")]
    runs = DryRuns("local", lambda: boxes[:1])
    first = asked(runs, "f1")
    await boxes[0].begun()
    assert await asked(runs, "f2") is None
    runs_all = DryRuns("local", lambda: boxes[1:])
    both = [asked(runs_all, "f1"), asked(runs_all, "f2")]
    await boxes[1].begun()
    await boxes[2].begun()
    assert await asked(runs_all, "f3") is None
    for box in boxes:
        await box.ends(finding())
    assert [await one for one in (first, *both)] == [STEP] * 3
    await runs.close()
    await runs_all.close()


async def test_a_node_that_refuses_says_nothing_of_the_code() -> None:
    box = Box()
    runs = DryRuns("local", lambda: [box])
    refusal = Refusal(grpc.StatusCode.UNAVAILABLE, "RUNTIME_AWAY", "podman does not answer")
    box.client.refuse("create_container", refusal)
    assert await asked(runs) is None
    again = asked(runs)
    await box.ends(finding())
    assert await again == STEP
    await runs.close()


async def test_closing_removes_what_runs() -> None:
    box = Box()
    runs = DryRuns("local", lambda: [box])
    waiting = asked(runs)
    await box.begun()
    await runs.close()
    assert await waiting is None
    assert box.client.empty


async def test_what_a_dead_control_plane_left_is_removed_and_what_lives_is_not() -> None:
    class NoStore:
        async def job(self, job_id: str) -> None:
            return None

    node = FakeNode()
    node.exits_at_once = None
    for job_id in ("d-left", "d-lives", "j-other"):
        owner = card_pb2.AttemptRef(centre="local", job_id=job_id, attempt=1, fencing_token=1)
        node.containers[job_id, 1] = node_pb2.Container(owner=owner)
    await remove_orphans(
        node, "local", NoStore(), Reservations(lambda: None), [], list(node.containers.values()), {"d-lives"},  # type: ignore[arg-type]
    )  # fmt: skip
    assert sorted(job_id for job_id, _ in node.containers) == ["d-lives", "j-other"]


async def test_code_without_a_fingerprint_and_a_centre_without_sandboxes_have_none() -> None:
    box = Box()
    assert await asked(DryRuns("local", lambda: [box]), "") is None
    assert await asked(DryRuns("local", list)) is None
    assert not box.client.started
