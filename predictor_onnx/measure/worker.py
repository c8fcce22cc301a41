"""The measuring process: measures one configuration, or says what it would measure with. Needs torch and a GPU.

``python -m predictor_onnx.measure.worker``: one JSON line in, one JSON line out. With a ``configuration`` the answer
has the values of an `Outcome`; without, those of a `Header` and the card's UUID.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import sys
import time
import warnings
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import torch

from predictor_onnx.configuration import Configuration, Precision
from predictor_onnx.measure.card import MIB, Card, NoCardError
from predictor_onnx.measure.out_of_memory import card_was_full, tried_mib
from predictor_onnx.measure.protocol import ALLOCATOR, Settings
from predictor_onnx.measure.rows import Ending, Header, Outcome, Reading, configuration_of
from predictor_onnx.step import CannotBuildError, Step

_DEVICE: Final = "cuda"
_LEAST_STEPS: Final = 10
_MOST_STEPS: Final = 1000
#: Longer than the second over which the driver takes utilization rates.
_LEAST_S: Final = 1.5
_DETAIL: Final = 300


def probe(settings: Settings) -> dict[str, Any]:
    """The values of a header, and the card's UUID.

    Raises:
        NoCardError: there is no GPU that torch and NVML both see.
    """
    if not torch.cuda.is_available():
        raise NoCardError(f"torch {torch.__version__} sees no NVIDIA GPU")
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    card = Card(uuid)
    header = Header(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        card=card.name, total_mib=card.total_mib, mig_profile=card.mig_profile, driver=card.driver,
        cuda=str(torch.version.cuda), cudnn=str(torch.backends.cudnn.version() or ""), torch=str(torch.__version__),
        timm=_version("timm"), transformers=_version("transformers"), torchvision=_version("torchvision"),
        cudnn_benchmark=settings.cudnn_benchmark, expandable_segments=settings.expandable_segments,
        allocator=os.environ.get(ALLOCATOR, ""), warm_up=settings.warm_up,
    )  # fmt: skip
    return {"header": asdict(header), "uuid": uuid}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def measure(asked: Configuration, settings: Settings, uuid: str) -> Outcome:
    """What the card shows during the steps of a configuration; an out-of-memory error is an outcome as well.

    Raises:
        NoCardError: NVML does not tell of the card.
        RuntimeError: torch could not run the step.
    """
    began = time.monotonic()
    # Before CUDA is touched: what is in use now is not ours.
    card = Card(uuid)
    try:
        reading = _reading(asked, settings, card)
    except CannotBuildError as error:
        return Outcome(Ending.CANNOT_BUILD, time.monotonic() - began, detail=str(error)[:_DETAIL])
    except RuntimeError as error:
        if not card_was_full(str(error)):
            raise
        tried = tried_mib(str(error))
        had = torch.cuda.memory_stats().get("allocated_bytes.all.current", 0) / MIB if tried is not None else 0.0
        peak = torch.cuda.max_memory_allocated() / MIB
        return Outcome(
            Ending.OUT_OF_MEMORY, time.monotonic() - began,
            allocated_at_least_mib=peak if tried is None else max(peak, had + tried),
            device_at_least_mib=card.free_mib, detail=str(error)[:_DETAIL],
        )  # fmt: skip
    return Outcome(Ending.MEASURED, time.monotonic() - began, reading)


def _reading(asked: Configuration, settings: Settings, card: Card) -> Reading:
    # Else torch's own choice stays, which is what a job gets that says nothing.
    if asked.precision is Precision.TF32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    torch.cuda.init()
    torch.cuda.synchronize()
    context = card.memory()
    step = Step(asked, _DEVICE)
    most, source = context.used_mib, context.source
    for _ in range(settings.warm_up):
        step.run()
        torch.cuda.synchronize()
        most = max(most, card.memory().used_mib)
    times: list[float] = []

    def timed() -> None:
        begun = time.monotonic()
        while len(times) < _LEAST_STEPS or (time.monotonic() - begun < _LEAST_S and len(times) < _MOST_STEPS):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            step.run()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))

    activity, activity_source = card.activity(timed)
    memory = card.memory()
    median = statistics.median(times)
    return Reading(
        allocated_mib=torch.cuda.max_memory_allocated() / MIB, reserved_mib=torch.cuda.max_memory_reserved() / MIB,
        device_mib=max(most, memory.used_mib), device_source=memory.source if memory.source == source else "difference",
        context_mib=context.used_mib, activity_percent=activity, activity_source=activity_source,
        tf32_products=torch.backends.cuda.matmul.allow_tf32, tf32_convolutions=torch.backends.cudnn.allow_tf32,
        step_ms=median, step_p90_ms=statistics.quantiles(times, n=10, method="inclusive")[-1],
        throughput=asked.batch * asked.accumulation * 1000 / median, steps=len(times), parameters=step.parameters,
    )  # fmt: skip


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    settings = Settings(**request["settings"])
    if "configuration" not in request:
        return probe(settings)
    outcome = measure(configuration_of(request["configuration"]), settings, request["uuid"])
    return {**asdict(outcome), "ending": outcome.ending.value}


def main() -> None:
    """Answer one request."""
    warnings.simplefilter("ignore")
    # Libraries print; the answer must be all that is in its pipe.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        told = _answer(json.loads(sys.stdin.readline()))
    except NoCardError as error:
        told = {"no_card": str(error)}
    answer.write(json.dumps(told) + "\n")
    answer.flush()


if __name__ == "__main__":
    main()
