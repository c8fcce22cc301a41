"""The trained predictor behind the control plane's seam."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest

from controlplane.fleet import Geometry
from controlplane.observing import ObservedAttempt
from controlplane.prediction import Code, OnnxPrediction, Tracing, with_history
from controlplane.sizing import size
from puhui.rpc.errors import Refusal
from puhui.v1 import job_pb2, prediction_pb2
from tests.unit.controlplane.samples import GEOMETRY

TRAINING = b"""\
import torch
from torch import nn
model = nn.Sequential(nn.Linear(8192, 32768), nn.ReLU(), nn.Linear(32768, 8192)).cuda()
optimizer = torch.optim.Adam(model.parameters())
for _ in range(10):
    loss = model(torch.randn(256, 8192).cuda()).sum()
    loss.backward()
    optimizer.step()
"""


@pytest.fixture
async def prediction() -> AsyncIterator[OnnxPrediction]:
    made = OnnxPrediction(budget_s=20)
    yield made
    await made.close()


def code(source: bytes) -> Code:
    return Code({"x.py": source}, {"x.py": len(source)}, ["python3", "x.py"], 0)


async def test_a_training_loop_needs_more_than_code_without_an_accelerator(prediction: OnnxPrediction) -> None:
    large = await prediction.of(code(TRAINING))
    none = await prediction.of(code(b"print(1)\n"))
    assert large.tier == prediction_pb2.PREDICTION_TIER_STATIC
    assert none.tier == prediction_pb2.PREDICTION_TIER_NO_ACCELERATOR
    assert large.required_mib > 4000 > none.required_mib
    assert 0 < large.memory.p50_mib <= large.memory.p90_mib <= large.memory.p99_mib
    assert sum(part.mib for part in large.parts) == pytest.approx(large.memory.p50_mib)
    assert {fact.name: fact.value for fact in large.facts}["optimizer"].lower() == "adam"
    assert large.model_version
    assert large.elapsed.ToNanoseconds() > 0
    assert size(job_pb2.Resources(), none, [GEOMETRY]).choices[0].profile == "1g.10gb"


NAMED = b"""\
import timm
import torch
model = timm.create_model("resnet18").cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(1000):
    loss = model(torch.randn(32, 3, 224, 224, device="cuda")).sum()
    loss.backward()
    optimizer.step()
"""


async def test_a_network_with_a_name_is_traced() -> None:
    traced = OnnxPrediction(budget_s=100, tracing=Tracing.AT_START)
    untraced = OnnxPrediction(budget_s=100, tracing=Tracing.OFF)
    try:
        with_trace, without = await traced.of(code(NAMED)), await untraced.of(code(NAMED))
        hurried = await traced.of(code(NAMED.replace(b"resnet18", b"resnet34")), budget_s=0.2)
    finally:
        await traced.close()
        await untraced.close()
    assert with_trace.tier == prediction_pb2.PREDICTION_TIER_TRACE
    assert without.tier == hurried.tier == prediction_pb2.PREDICTION_TIER_STATIC
    # Both are about the same step.
    assert with_trace.memory.p50_mib == pytest.approx(without.memory.p50_mib, rel=0.25)
    assert with_trace.confidence == prediction_pb2.PREDICTION_CONFIDENCE_HIGH


async def test_how_fast_it_is_on_each_profile(prediction: OnnxPrediction) -> None:
    shapes = tuple(replace(shape, profile=shape.profile) for shape in GEOMETRY.shapes)
    geometry = Geometry("NVIDIA A100-SXM4-80GB", shapes, GEOMETRY.memory_slices)
    paces = await prediction.paces(code(NAMED), [geometry])
    assert {profile for _, profile in paces} == {shape.profile for shape in shapes}
    whole, smallest = paces[geometry.gpu_model, "7g.80gb"], paces[geometry.gpu_model, "1g.10gb"]
    assert 1 <= whole.slowdown_p50 < smallest.slowdown_p50 <= smallest.slowdown_p90
    assert whole.duration_p50_s is not None
    assert smallest.duration_p50_s is not None
    assert 1 < whole.duration_p50_s < smallest.duration_p50_s
    assert await prediction.paces(code(b"print(1)\n"), [geometry]) == {}
    assert await prediction.paces(code(b"def f(:\n"), [geometry]) == {}


async def test_code_that_does_not_parse_is_refused_with_its_line(prediction: OnnxPrediction) -> None:
    with pytest.raises(Refusal) as refused:
        await prediction.of(code(b"x = 1\ndef f(:\n"))
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CODE_UNPARSABLE")
    assert refused.value.metadata == {"path": "x.py", "line": "2"}


async def test_when_time_runs_out_the_answer_is_that_of_unknown_code() -> None:
    hurried = OnnxPrediction(budget_s=0.0)
    answer = await hurried.of(code(TRAINING))
    await hurried.close()
    assert answer.tier == prediction_pb2.PREDICTION_TIER_UNKNOWN
    assert answer.required_mib > 0
    assert answer.reason.startswith("the prediction was not ready within 0 s; ")


async def test_code_is_known_again_by_what_it_does(prediction: OnnxPrediction) -> None:
    first = await prediction.fingerprint(code(TRAINING))
    assert first == await prediction.fingerprint(code(b"# Trains.\n\n" + TRAINING)) != ""
    others = [TRAINING.replace(b"256", b"128"), b"print(1)\n"]
    assert first not in [await prediction.fingerprint(code(other)) for other in others]


async def test_what_was_observed_is_blended_with_what_is_predicted(prediction: OnnxPrediction) -> None:
    answer = await prediction.of(code(TRAINING))
    assert with_history(answer, []) is answer
    seen = ObservedAttempt("j-1", 1, "lab", "f", 1.0, 12_000, None, 60.0, 0.5, "2g.20gb", "H100", False, "")
    after = with_history(answer, [seen])
    assert after.memory.p50_mib == pytest.approx(12_000, rel=0.02)
    assert after.reason == f"1 earlier run of this code peaked at 11.7 GiB. {answer.reason}"
    assert after.required_mib > 12_000
    assert sum(part.mib for part in after.parts) == pytest.approx(after.memory.p50_mib)
    ran_out = with_history(answer, [replace(seen, peak_mib=None, at_least_mib=20_096)])
    assert size(job_pb2.Resources(), ran_out, [GEOMETRY]).choices[0].profile == "3g.40gb"


async def test_a_fingerprint_that_cannot_be_made_is_none(prediction: OnnxPrediction) -> None:
    assert await prediction.fingerprint(Code({"x.py": None}, {}, ["python3", "x.py"], 0)) == ""  # type: ignore[dict-item]
    hurried = OnnxPrediction(budget_s=0.0)
    assert await hurried.fingerprint(code(TRAINING * 100)) == ""
    await hurried.close()


async def test_a_predictor_that_meets_the_unforeseen_does_not_cost_the_job(prediction: OnnxPrediction) -> None:
    answer = await prediction.of(Code({"x.py": None}, {}, ["python3", "x.py"], 0))  # type: ignore[dict-item]
    assert answer.tier == prediction_pb2.PREDICTION_TIER_UNKNOWN
    assert answer.required_mib > 0
