"""The trained predictor behind the control plane's seam."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from controlplane.prediction import Code, OnnxPrediction
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


async def test_a_predictor_that_meets_the_unforeseen_does_not_cost_the_job(prediction: OnnxPrediction) -> None:
    answer = await prediction.of(Code({"x.py": None}, {}, ["python3", "x.py"], 0))  # type: ignore[dict-item]
    assert answer.tier == prediction_pb2.PREDICTION_TIER_UNKNOWN
    assert answer.required_mib > 0
