"""Slowdown and step time as one ONNX graph; inputs and outputs are described in ``predictor_onnx.speed``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxmltools import convert_lightgbm
from onnxmltools.convert.common.data_types import FloatTensorType

from predictor_onnx.speed import INPUTS
from predictor_onnx.step_work import SHAPE
from predictor_onnx.train import slowdown_form as form
from predictor_onnx.train.slowdown_fit import Chosen
from predictor_onnx.train.step_time_fit import LARGEST_CORRECTION, StepTimeFit

_OPSET: Final = 17
_CONVERTER_OPSET: Final = 15


@dataclass(frozen=True)
class Fits:
    """All that the graph computes.

    Attributes:
        static: slowdown from the program alone.
        observed: slowdown from utilization that was seen.
        step: step time on the measured card.
        carried_spread: logarithm of p90 over p50 of the step time on another card.
    """

    static: Chosen
    observed: Chosen
    step: StepTimeFit
    carried_spread: float


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def op(self, kind: str, *operands: str | float, output: str | None = None, **attributes: Any) -> str:
        name = output or f"n{len(self.nodes)}"
        names = [one if isinstance(one, str) else self.constant([one]) for one in operands]
        self.nodes.append(helper.make_node(kind, names, [name], name=name, **attributes))
        return name

    def column(self, name: str) -> str:
        return self.op("Gather", "inputs", self.constant([INPUTS.index(name)], np.int64), axis=1)

    def clip(self, value: str, low: float, high: float) -> str:
        return self.op("Clip", value, self.constant(low), self.constant(high))

    def both(self, p50: str, spread: str, output: str) -> str:
        return self.op("Concat", p50, self.op("Mul", p50, self.op("Exp", spread)), output=output, axis=1)


def _log_ratio(g: _Graph, over: str, under: str) -> str:
    return _log(g, g.op("Div", over, under))


def _log(g: _Graph, value: str) -> str:
    """Natural logarithm."""
    return g.op("Log", value)


def _curve(g: _Graph, chosen: Chosen, terms: list[str], mix: str) -> str:
    curve = chosen.curve
    level = g.constant([[curve.level]])
    for term, power in zip(terms, curve.powers, strict=True):
        if power:
            level = g.op("Add", level, g.op("Mul", term, power))
    demand = g.op("Exp", g.clip(level, -20.0, 20.0))
    bound = g.op("Sigmoid", g.op("Add", g.op("Mul", mix, curve.mix_power), curve.mix_level))
    by_compute = g.op("Mul", bound, g.column("slower_compute"))
    by_memory = g.op("Mul", g.op("Sub", 1.0, bound), g.column("slower_memory"))
    slower = g.op("Add", by_compute, by_memory)
    # 1 + (d^p (x^p - 1)) / (1 + d^p), which is the same and loses no digits where d is large.
    demand = g.op("Pow", demand, curve.power)
    excess = g.op("Mul", demand, g.op("Sub", g.op("Pow", slower, curve.power), 1.0))
    over = g.op("Add", 1.0, g.op("Div", excess, g.op("Add", 1.0, demand)))
    return g.op("Pow", over, 1 / curve.power)


def _slowdown(g: _Graph, fits: Fits) -> None:
    arithmetic = g.op("Max", g.op("Div", g.column("flops"), form.CARD_FLOPS), 1e-9)
    moved = g.op("Add", g.column("moved_bytes"), g.column("state_bytes"))
    traffic = g.op("Max", g.op("Div", moved, form.CARD_BYTES), 1e-9)
    card = g.op("Add", arithmetic, traffic)
    busy = g.clip(g.column("sm_utilization"), form.CLIP, 1 - form.CLIP)
    moving = g.clip(g.column("bandwidth_utilization"), form.CLIP, 1 - form.CLIP)
    terms = [
        _log_ratio(g, card, _host(g)), _log(g, moving), _log(g, busy),
        _log_ratio(g, busy, g.op("Sub", 1.0, busy)),
    ]  # fmt: skip
    mix = _log_ratio(g, arithmetic, traffic)
    seen = g.op("Greater", g.column("seen"), 0.5)
    curve = g.op("Where", seen, _curve(g, fits.observed, terms, mix), _curve(g, fits.static, terms, mix))
    p50 = g.op("Max", curve, 1.0)
    # The whole card is the measure of all others: there the slowdown is 1 without doubt.
    whole = g.op("Less", g.op("Add", g.column("slower_compute"), g.column("slower_memory")), 2.0 + 1e-4)
    spread = g.op("Where", seen, fits.observed.spread, fits.static.spread)
    g.both(p50, g.op("Where", whole, 0.0, spread), "slowdown")


def _host(g: _Graph) -> str:
    return g.op("Add", g.op("Mul", g.column("launches"), form.LAUNCH_S), form.STEP_S)


def _step_time(g: _Graph, fits: Fits) -> None:
    flops, moved, state = (float(value) for value in fits.step.roofline)
    arithmetic = g.op("Mul", g.op("Mul", g.column("flops"), flops), g.column("card_flops"))
    traffic = g.op("Add", g.op("Mul", g.column("moved_bytes"), moved), g.op("Mul", g.column("state_bytes"), state))
    card = g.op("Add", arithmetic, g.op("Mul", traffic, g.column("card_bytes")))
    p50 = g.op("Max", card, _host(g))
    if fits.step.correction is not None:
        p50 = g.op("Mul", p50, g.op("Exp", g.clip(_trees(g, fits.step.correction), -LARGEST_CORRECTION,
                                                  LARGEST_CORRECTION)))  # fmt: skip
    carried = g.op("Greater", g.column("carried"), 0.5)
    g.both(p50, g.op("Where", carried, fits.carried_spread, fits.step.spread), "step_s")


def _trees(g: _Graph, booster: Any) -> str:
    first = INPUTS.index(SHAPE[0])
    shape = g.op("Gather", "inputs", g.constant(list(range(first, len(INPUTS))), np.int64), axis=1)
    converted = convert_lightgbm(
        booster, initial_types=[("input", FloatTensorType([None, len(SHAPE)]))], target_opset=_CONVERTER_OPSET
    )
    ensemble = next(node for node in converted.graph.node if node.op_type == "TreeEnsembleRegressor")
    del ensemble.input[:], ensemble.output[:]
    ensemble.input.append(shape)
    ensemble.output.append("correction")
    ensemble.name = "correction"
    g.nodes.append(ensemble)
    return "correction"


def write(fits: Fits, path: Path) -> None:
    """Write the ONNX file; the same fits give the same bytes."""
    g = _Graph()
    _slowdown(g, fits)
    _step_time(g, fits)
    graph = helper.make_graph(
        g.nodes, "puhui_speed",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, [None, len(INPUTS)])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 2]) for name in ("slowdown", "step_s")],
        g.constants,
    )  # fmt: skip
    model = helper.make_model(
        graph, producer_name="puhui",
        opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid("ai.onnx.ml", 3)],
    )  # fmt: skip
    model.ir_version = 9
    helper.set_model_props(model, {"inputs": ",".join(INPUTS)})
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
