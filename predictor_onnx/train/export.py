"""The fitted parts as one ONNX graph, with one half for each way of knowing a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxmltools import convert_lightgbm
from onnxmltools.convert.common.data_types import FloatTensorType

from predictor_onnx.features import FEATURES
from predictor_onnx.traced_step import TRACED_FEATURES
from predictor_onnx.train.fit import LARGEST_CORRECTION, LARGEST_MEDIAN_SHIFT, LEAST_CORRECTION, Fitted
from predictor_onnx.train.physics import Array, StaticPhysics, TracedPhysics

_OPSET: Final = 17
#: The newest that onnxmltools writes; only its tree node is taken, which is in ai.onnx.ml.
_CONVERTER_OPSET: Final = 15


class _Graph:
    """Nodes that compute from one input; the names of all begin with a prefix."""

    def __init__(self, source: str, width: int, prefix: str = "") -> None:
        self.source = source
        self.width = width
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._prefix = prefix

    def constant(self, name: str, value: Any, kind: Any = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, kind), self._prefix + name))
        return self._prefix + name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        name = self._prefix + output
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def columns(self, first: int, last: int, name: str) -> str:
        indices = self.constant(f"{name}_indices", list(range(first, last)), np.int64)
        return self.node("Gather", [self.source, indices], name, axis=1)

    def linear(self, first: int, weights: list[float], bias: float, name: str) -> str:
        """A weighted sum of neighbouring columns."""
        columns = self.columns(first, first + len(weights), f"{name}_columns")
        matrix = self.constant(f"{name}_weights", np.array(weights).reshape(-1, 1))
        return self.node("Gemm", [columns, matrix, self.constant(f"{name}_bias", [bias])], name)

    def trees(self, booster: Any, source: str, width: int, name: str) -> str:
        converted = convert_lightgbm(
            booster, initial_types=[("input", FloatTensorType([None, width]))], target_opset=_CONVERTER_OPSET
        )
        ensemble = next(n for n in converted.graph.node if n.op_type == "TreeEnsembleRegressor")
        del ensemble.input[:], ensemble.output[:]
        ensemble.input.append(source)
        ensemble.output.append(self._prefix + name)
        ensemble.name = self._prefix + name
        self.nodes.append(ensemble)
        return self._prefix + name


def _quantiles(g: _Graph, fitted: Fitted, fixed: str, work: str) -> None:
    """Node ``quantiles_mib``: the corrected peak, spread by the heads."""
    first = fitted.physics.width
    shape = g.columns(first, g.width, "shape")
    change = g.trees(fitted.correction, shape, g.width - first, "correction_raw")
    change = g.node("Clip", [change, g.constant("least", LEAST_CORRECTION),
                             g.constant("most", LARGEST_CORRECTION)], "correction")  # fmt: skip
    work = g.node("Mul", [work, g.node("Exp", [change], "factor")], "corrected_work")
    peak = g.node("Add", [fixed, work], "peak")
    steps = []
    for i, (head, shift) in enumerate(zip(fitted.heads, fitted.shifts, strict=True)):
        raw = g.trees(head, shape, g.width - first, f"head_{i}")
        steps.append(g.node("Add", [raw, g.constant(f"shift_{i}", [shift])], f"step_{i}"))
    steps[0] = g.node(
        "Clip",
        [steps[0], g.constant("low", -LARGEST_MEDIAN_SHIFT), g.constant("high", LARGEST_MEDIAN_SHIFT)],
        "step_p50",
    )
    gap = g.constant("gap", [0.01])
    for i in (1, 2):
        floor = g.node("Add", [steps[i - 1], gap], f"floor_{i}")
        steps[i] = g.node("Max", [steps[i], floor], f"step_ordered_{i}")
    together = g.node("Concat", steps, "steps", axis=1)
    g.node("Mul", [peak, g.node("Exp", [together], "spread")], "quantiles_mib")


def _static(fitted: Fitted) -> _Graph:
    g, physics = _Graph("features", len(FEATURES)), fitted.physics
    if not isinstance(physics, StaticPhysics):
        raise TypeError("this half is of what was read from the code")
    context = g.linear(0, [physics.convolutions], physics.context, "context")
    resident = g.linear(1, [physics.resident], 0.0, "resident")
    update = g.linear(2, [physics.update], 0.0, "update")
    backward = g.linear(3, list(physics.backward), 0.0, "backward")
    work = g.node("Max", [backward, update], "work")
    _quantiles(g, fitted, g.node("Add", [context, resident], "fixed"), work)
    g.node("Concat", [context, resident, backward, update], "parts_mib", axis=1)
    return g


def _traced(fitted: Fitted) -> _Graph:
    g, physics = _Graph("traced", len(TRACED_FEATURES), "traced_"), fitted.physics
    if not isinstance(physics, TracedPhysics):
        raise TypeError("this half is of what was traced")
    context = g.linear(0, [physics.convolutions], physics.context, "context")
    reserved = g.linear(1, [physics.reserved], 0.0, "reserved")
    _quantiles(g, fitted, context, reserved)
    g.node("Concat", [context, reserved], "parts_mib", axis=1)
    return g


@dataclass(frozen=True)
class Model:
    """All that the file holds.

    Attributes:
        static: from the features of the static analysis.
        traced: from the features of a traced step.
        population: p50, p90, p99 of measured memory, for code that cannot be sized.
        reach: least and largest value of each structural feature of the static analysis in training.
        traced_reach: the same of a traced step.
    """

    static: Fitted
    traced: Fitted
    population: list[float]
    reach: tuple[Array, Array]
    traced_reach: tuple[Array, Array]


def graph_of(content: Model) -> Any:
    """The ONNX model; inputs and outputs are described in ``predictor_onnx.model``."""
    parts = (_static(content.static), _traced(content.traced))
    mib = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node for part in parts for node in part.nodes], "puhui_memory",
        [mib(part.source, TensorProto.FLOAT, [None, part.width]) for part in parts],
        [mib("quantiles_mib", TensorProto.FLOAT, [None, 3]), mib("parts_mib", TensorProto.FLOAT, [None, 4]),
         mib("traced_quantiles_mib", TensorProto.FLOAT, [None, 3]),
         mib("traced_parts_mib", TensorProto.FLOAT, [None, 2])],
        [constant for part in parts for constant in part.constants],
    )  # fmt: skip
    model = helper.make_model(
        graph, producer_name="puhui",
        opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid("ai.onnx.ml", 3)],
    )  # fmt: skip
    model.ir_version = 9
    helper.set_model_props(model, {
        "features": ",".join(FEATURES), "traced_features": ",".join(TRACED_FEATURES),
        "lowest": _numbers(content.reach[0]), "highest": _numbers(content.reach[1]),
        "traced_lowest": _numbers(content.traced_reach[0]), "traced_highest": _numbers(content.traced_reach[1]),
        "population_mib": ",".join(f"{value:.1f}" for value in content.population),
    })  # fmt: skip
    onnx.checker.check_model(model)
    return model


def _numbers(values: Array) -> str:
    return ",".join(f"{value:.6g}" for value in values)


def write(content: Model, path: Path) -> None:
    """Write the ONNX file; the same fit gives the same bytes."""
    path.write_bytes(graph_of(content).SerializeToString(deterministic=True))
