"""The fitted parts as one ONNX graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxmltools import convert_lightgbm
from onnxmltools.convert.common.data_types import FloatTensorType

from predictor_onnx.features import FEATURES, PHYSICS
from predictor_onnx.train.fit import LARGEST_CORRECTION, LARGEST_MEDIAN_SHIFT, LEAST_CORRECTION, Array, Fitted

_OPSET: Final = 17
#: The newest that onnxmltools writes; only its tree node is taken, which is in ai.onnx.ml.
_CONVERTER_OPSET: Final = 15


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: Any, kind: Any = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def columns(self, first: int, last: int, name: str) -> str:
        indices = self.constant(f"{name}_indices", list(range(first, last)), np.int64)
        return self.node("Gather", ["features", indices], name, axis=1)

    def linear(self, source: str, weights: list[float], bias: float, name: str) -> str:
        matrix = self.constant(f"{name}_weights", np.array(weights).reshape(-1, 1))
        offset = self.constant(f"{name}_bias", [bias])
        return self.node("Gemm", [source, matrix, offset], name)

    def trees(self, booster: Any, source: str, name: str) -> str:
        width = len(FEATURES) - len(PHYSICS)
        converted = convert_lightgbm(
            booster, initial_types=[("input", FloatTensorType([None, width]))], target_opset=_CONVERTER_OPSET
        )
        ensemble = next(n for n in converted.graph.node if n.op_type == "TreeEnsembleRegressor")
        del ensemble.input[:], ensemble.output[:]
        ensemble.input.append(source)
        ensemble.output.append(name)
        ensemble.name = name
        self.nodes.append(ensemble)
        return name


def graph_of(fitted: Fitted, population: list[float], reach: tuple[Array, Array]) -> Any:
    """The ONNX model; inputs and outputs are described in ``predictor_onnx.model``."""
    g, physics = _Graph(), fitted.physics
    split = len(PHYSICS)
    fixed_columns = g.columns(0, 2, "fixed_columns")
    context = g.linear(g.columns(0, 1, "convolutions"), [physics.convolutions], physics.context,
                       "context")  # fmt: skip
    resident = g.linear(g.columns(1, 2, "resident_column"), [physics.resident], 0.0, "resident")
    fixed = g.linear(fixed_columns, [physics.convolutions, physics.resident], physics.context, "fixed")
    update = g.linear(g.columns(2, 3, "update_column"), [physics.update], 0.0, "update")
    backward = g.linear(g.columns(3, split, "backward_columns"), list(physics.backward), 0.0, "backward")
    shape = g.columns(split, len(FEATURES), "shape")
    change = g.trees(fitted.correction, shape, "correction_raw")
    change = g.node("Clip", [change, g.constant("least", LEAST_CORRECTION),
                             g.constant("most", LARGEST_CORRECTION)], "correction")  # fmt: skip
    work = g.node("Max", [backward, update], "work")
    work = g.node("Mul", [work, g.node("Exp", [change], "factor")], "corrected_work")
    peak = g.node("Add", [fixed, work], "peak")
    steps = []
    for i, (head, shift) in enumerate(zip(fitted.heads, fitted.shifts, strict=True)):
        raw = g.trees(head, shape, f"head_{i}")
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
    g.node("Concat", [context, resident, backward, update], "parts_mib", axis=1)
    graph = helper.make_graph(
        g.nodes, "puhui_memory",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, len(FEATURES)])],
        [helper.make_tensor_value_info("quantiles_mib", TensorProto.FLOAT, [None, 3]),
         helper.make_tensor_value_info("parts_mib", TensorProto.FLOAT, [None, 4])],
        g.constants,
    )  # fmt: skip
    model = helper.make_model(
        graph, producer_name="puhui",
        opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid("ai.onnx.ml", 3)],
    )  # fmt: skip
    model.ir_version = 9
    helper.set_model_props(model, {
        "features": ",".join(FEATURES),
        "lowest": ",".join(f"{value:.6g}" for value in reach[0]),
        "highest": ",".join(f"{value:.6g}" for value in reach[1]),
        "population_mib": ",".join(f"{value:.1f}" for value in population),
    })  # fmt: skip
    onnx.checker.check_model(model)
    return model


def write(fitted: Fitted, population: list[float], reach: tuple[Array, Array], path: Path) -> None:
    """Write the ONNX file; the same fit gives the same bytes.

    Args:
        fitted: what the graph computes.
        population: p50, p90, p99 of measured memory, for code that cannot be sized.
        reach: least and largest value of each structural feature in training.
        path: of the file.
    """
    path.write_bytes(graph_of(fitted, population, reach).SerializeToString(deterministic=True))
