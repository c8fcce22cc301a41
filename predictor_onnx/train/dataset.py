"""Measured configurations, each turned into source code and read by the same static analysis as a job."""

from __future__ import annotations

import ast
import csv
import gzip
import hashlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from predictor_onnx import catalog
from predictor_onnx.configuration import Configuration
from predictor_onnx.source import CodeBundle
from predictor_onnx.static.analysis import analyse
from predictor_onnx.traced_step import TracedStep
from predictor_onnx.train import traces

#: The card that the timm rows were measured on has 40 GB; rows from here on are a full card.
FULL_CARD_MIB: Final = 38_500.0

_TIMM: Final = """\
import timm
import torch

model = timm.create_model("{model}").cuda()
optimizer = torch.optim.Adam(model.parameters())
images = torch.randn({batch}, {size}, device="cuda")
labels = torch.randint(0, 1000, ({batch},), device="cuda")
for step in range(10):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
"""
_MLP: Final = """\
import torch
from torch import nn

model = nn.Sequential({layers}).cuda()
optimizer = torch.optim.Adam(model.parameters())
inputs = torch.randn({batch}, {width}).cuda()
labels = torch.randint(0, {classes}, ({batch},)).cuda()
for step in range(10):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
"""


@dataclass(frozen=True)
class Row:
    """One measured configuration.

    Attributes:
        source: which data file it is from.
        family: what must never be on both sides of a split.
        model: name of the configuration's network.
        batch: samples per step.
        measured_mib: peak device memory that was measured.
        vector: its features, in the order of ``FEATURES``.
        parameter_mib: bytes of its weights in MiB, for the weights-only baseline.
        clean: False for rows that the filter of the card excludes.
        configuration: what was run.
        traced: its features as the tracer saw it, in the order of ``TRACED_FEATURES``; None where it was not traced.
        alive_mib: all tensors that live at once, as the tracer saw it.
    """

    source: str
    family: str
    model: str
    batch: int
    measured_mib: float
    vector: tuple[float, ...]
    parameter_mib: float
    clean: bool
    configuration: Configuration
    traced: tuple[float, ...] | None = None
    alive_mib: float = 0.0

    @property
    def key(self) -> traces.Key:
        """What the traced steps are kept by."""
        return key_of(self.configuration)


def key_of(asked: Configuration) -> traces.Key:
    """Source, name of the network (a digest of its layers where it has none), and batch."""
    name = asked.model if asked.source == "timm" else hashlib.sha256(asked.model.encode()).hexdigest()[:16]
    return asked.source, name, asked.batch


def family_of(model: str) -> str:
    """Leading letters of a model's name."""
    found = re.match(r"[a-z]+", model.lower())
    return found.group() if found else model


def _row(source: str, family: str, model: str, measured: float, code: str, asked: Configuration,
         *, clean: bool) -> Row:  # fmt: skip
    work = analyse(CodeBundle({"train.py": code}), ["python3", "train.py"])
    return Row(source, family, model, asked.batch, measured, tuple(work.vector()), work.parameter_mib, clean, asked)


def read_timm(path: Path) -> tuple[list[Row], Counter[str]]:
    """Rows of timm models measured on an A100-40GB, and what was left out with its reason."""
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    left_out: Counter[str] = Counter()
    by_model: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in records:
        by_model[record["model"]].append((int(record["batch_size"]), float(record["measured_mib"])))
    rows = []
    for model, points in by_model.items():
        entry = catalog.find("timm", model)
        if entry is None:
            left_out["model not in the catalog"] += len(points)
            continue
        grows = _grows(sorted(points))
        size = ", ".join(str(side) for side in entry["input"])
        for batch, measured in sorted(points):
            code = _TIMM.format(model=model, batch=batch, size=size)
            asked = Configuration("timm", model, batch, tuple(entry["input"]))
            rows.append(_row("timm_a100", family_of(model), model, measured, code, asked,
                             clean=grows and measured < FULL_CARD_MIB))  # fmt: skip
    return rows, left_out


def _grows(points: list[tuple[int, float]]) -> bool:
    """Whether memory follows the batch; where it does not, the run had failed."""
    values = [measured for _, measured in points]
    steps = pairwise(values)
    return all(after >= 0.98 * before for before, after in steps) and values[-1] > 1.02 * values[0]


def read_mlp(path: Path) -> tuple[list[Row], Counter[str]]:
    """Rows of GPUMemNet's fully connected networks, trained with Adam in float32."""
    left_out: Counter[str] = Counter()
    rows = []
    with gzip.open(path, "rt", newline="") as file:
        for record in csv.DictReader(file):
            made = _mlp_code(record)
            if made is None:
                left_out["layer list is not understood"] += 1
                continue
            code, shape, asked = made
            rows.append(_row("gpumemnet_mlp", f"mlp_{shape}", record["Filename"], float(record["Max GPU Memory (MiB)"]),
                             code, asked, clean=True))  # fmt: skip
    return rows, left_out


def _mlp_code(record: dict[str, str]) -> tuple[str, str, Configuration] | None:
    name = re.search(r"input:(\d+)_output:(\d+)_.*arch:([a-z]+)", record["Filename"])
    if name is None:
        return None
    width, classes, shape = int(name[1]), int(name[2]), name[3]
    layers: list[list[Any]] = []
    inner = width
    for kind, out, _ in ast.literal_eval(record["Activations-Params"]):
        if kind == "linear":
            layers.append(["Linear", inner, int(out)])
            inner = int(out)
        elif kind == "batch_normalization":
            layers.append(["BatchNorm1d", int(out)])
        elif kind == "dropout":
            layers.append(["Dropout", 0.3])
        else:
            layers.append([kind])
    written = ", ".join(f"nn.{layer}({', '.join(str(each) for each in arguments)})" for layer, *arguments in layers)
    code = _MLP.format(layers=written, batch=record["Batch Size"], width=width,
                       classes=max(2, classes))  # fmt: skip
    asked = Configuration("layers", json.dumps(layers), int(record["Batch Size"]), (width,), max(2, classes))
    return code, shape, asked


def read(folder: Path) -> tuple[list[Row], dict[str, dict[str, int]]]:
    """All measured rows of a data folder, and per file what was left out."""
    rows, left_out = read_timm(folder / "timm_a100_measured.csv")
    excluded = {"timm_a100_measured.csv": dict(left_out)}
    for name in ("gpumemnet_mlp_step1.csv.gz", "gpumemnet_mlp_step2.csv.gz"):
        more, why = read_mlp(folder / name)
        rows += more
        excluded[name] = dict(why)
    known = traces.read()
    return [_with_trace(row, known.get(row.key)) for row in rows], excluded


def _with_trace(row: Row, step: TracedStep | None) -> Row:
    if step is None:
        return row
    return replace(row, traced=tuple(step.vector()), alive_mib=step.allocated_mib)
