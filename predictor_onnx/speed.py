"""How much slower a step runs on each profile, and how long it takes on a whole card: ``slowdown.onnx``.

Two kinds of knowledge answer for the slowdown. From the program alone: its arithmetic, bytes and launches. Once it has
run on a whole card: the utilization that was seen, which is the better witness. A duration is told only where the
number of steps is known.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from predictor_onnx.cards import CARDS, HALF, MEASURED, SLICED, card_named, quicker_than_sliced
from predictor_onnx.errors import ModelUnavailableError
from predictor_onnx.features import Workload
from predictor_onnx.shares import Share, shares
from predictor_onnx.step_work import SHAPE, StepWork

PATH: Final = Path(__file__).with_name("slowdown.onnx")
#: Columns of the model's one input, a row for each slice. ``card_*``: the measured card's peaks over the asked one's.
INPUTS: Final = (
    "flops", "moved_bytes", "state_bytes", "launches", "sm_utilization", "bandwidth_utilization", "seen",
    "slower_compute", "slower_memory", "card_flops", "card_bytes", "carried", *SHAPE,
)  # fmt: skip


@dataclass(frozen=True)
class Utilization:
    """What was seen while the program had a whole card, 0 to 1: time with a kernel running, and bandwidth in use."""

    sm: float
    bandwidth: float


@dataclass(frozen=True)
class Slowdown:
    """How many times longer a step takes than on the whole card; at least 1."""

    p50: float
    p90: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step on a whole card.

    Attributes:
        p50_s: as likely above as below.
        p90_s: nine of ten programs like this stay under it.
        carried_over: whether the card is another than the measured one, so that data sheets stand in for measurement.
    """

    p50_s: float
    p90_s: float
    carried_over: bool


@dataclass(frozen=True)
class Duration:
    """Seconds that a number of steps takes."""

    p50_s: float
    p90_s: float


class SpeedModel:
    """An ONNX session from a step and its slices to slowdown and step time."""

    def __init__(self, path: Path | None = None) -> None:
        """Load the model once; instances can be shared.

        Raises:
            ModelUnavailableError: the file is missing, is no ONNX model, or is for other inputs.
        """
        self.path = path if path is not None else PATH
        again = "rebuild it with 'python -m predictor_onnx.train --data DIR'"
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ModelUnavailableError(
                f"the model {self.path.name} cannot be read ({error.strerror}); {again}"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelUnavailableError(f"the model {self.path.name} is not a usable ONNX file; {again}") from error
        known = self._session.get_modelmeta().custom_metadata_map.get("inputs", "").split(",")
        if known != list(INPUTS):
            raise ModelUnavailableError(f"the model {self.path.name} was trained on other inputs; {again}")
        #: Hash of the file, first 12 hex digits.
        self.version = hashlib.sha256(content).hexdigest()[:12]

    def slowdowns(
        self, work: Workload, profiles: Iterable[str], seen: Utilization | None = None, product: str = ""
    ) -> dict[str, Slowdown]:
        """Slowdown of each profile of a board, against its largest; nothing where neither code nor history tells.

        Args:
            work: what the static analysis read.
            profiles: names of one board's MIG profiles, the largest among them.
            seen: utilization of an earlier run on a whole card; with it the program need not be known.
            product: name of the card. A quicker card is done sooner while the host takes as long, so it slows down
                less; by data sheets, and taken for an A100 where the name is not known.

        Raises:
            ValueError: a name is not that of a MIG profile.
        """
        cut = shares(profiles)
        if not cut or (seen is None and not work.known):
            return {}
        arithmetic, traffic = quicker_than_sliced(card_named(product) or CARDS[SLICED], work.precision)
        step = StepWork.of(work)
        step = replace(
            step, flops=step.flops / arithmetic, moved_bytes=step.moved_bytes / traffic,
            state_bytes=step.state_bytes / traffic,
        )  # fmt: skip
        rows = [inputs(step, share, seen) for share in cut.values()]
        return {name: Slowdown(*pair) for name, pair in zip(cut, self.run("slowdown", rows), strict=True)}

    def step_time(self, work: Workload, product: str) -> StepTime | None:
        """Time of a training step on a whole card; None where program or card is unknown, or nothing is trained."""
        card, measured = card_named(product), CARDS[MEASURED]
        if card is None or not (work.known and work.training):
            return None
        half = work.precision in HALF
        carried = card != measured or not half
        peak = card.half_tflops if half else card.single_tflops
        row = inputs(StepWork.of(work), Share(1.0, 1.0), None, measured.half_tflops / peak,
                     measured.bandwidth_gb_s / card.bandwidth_gb_s, carried=carried)  # fmt: skip
        ((p50, p90),) = self.run("step_s", [row])
        return StepTime(p50, p90, carried)

    def run(self, output: str, rows: list[list[float]]) -> list[tuple[float, float]]:
        """p50 and p90 of ``slowdown`` or ``step_s`` for each row of ``INPUTS``."""
        found: Any = self._session.run([output], {"inputs": np.asarray(rows, dtype=np.float32)})[0]
        return [(float(p50), float(p90)) for p50, p90 in found]


def inputs(
    step: StepWork, share: Share, seen: Utilization | None, card_flops: float = 1.0, card_bytes: float = 1.0,
    *, carried: bool = False,
) -> list[float]:  # fmt: skip
    """Values of ``INPUTS`` for one step on one slice."""
    used = seen if seen is not None else Utilization(0.0, 0.0)
    return [
        step.flops, step.moved_bytes, step.state_bytes, step.launches, used.sm, used.bandwidth,
        float(seen is not None), 1 / share.compute, 1 / share.memory, card_flops, card_bytes, float(carried),
        *step.shape(),
    ]  # fmt: skip


def duration(steps: int | None, step: StepTime | None, slowdown: Slowdown | None) -> Duration | None:
    """Seconds of a job on a slice; None where steps, step time or slowdown is unknown.

    Both uncertainties are taken as independent and log-normal, so their logarithms add in quadrature.

    Raises:
        ValueError: fewer than no steps.
    """
    if steps is None or step is None or slowdown is None:
        return None
    if steps < 0:
        raise ValueError("a job has no fewer than 0 steps")
    middle = steps * step.p50_s * slowdown.p50
    spread = math.hypot(math.log(step.p90_s / step.p50_s), math.log(slowdown.p90 / slowdown.p50))
    return Duration(middle, middle * math.exp(spread))
