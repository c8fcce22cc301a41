"""timm's published training throughput on an RTX 3090, each model read by the same static analysis as a job.

The figures are timm's own (github.com/huggingface/pytorch-image-models, ``results/``): PyTorch 1.12, CUDA 11.3,
autocast in float16, memory laid out channels first, which is PyTorch's default. Models are known by their name in
this package's catalog; names that timm has since dropped are left out and counted.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from predictor_onnx import catalog
from predictor_onnx.source import CodeBundle
from predictor_onnx.static.analysis import analyse
from predictor_onnx.step_work import StepWork
from predictor_onnx.train.dataset import family_of

FILE: Final = "timm_benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv"
#: Another architecture has taken the name since when its parameters differ by more than this share.
_SAME_MODEL: Final = 0.02
_PROGRAM: Final = """\
import timm
import torch

model = timm.create_model("{model}").cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scaler = torch.amp.GradScaler("cuda")
images = torch.randn({batch}, 3, {side}, {side}, device="cuda")
labels = torch.randint(0, 1000, ({batch},), device="cuda")
for step in range(10):
    optimizer.zero_grad()
    with torch.autocast("cuda", dtype=torch.float16):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
"""


@dataclass(frozen=True)
class Row:
    """One measured model.

    Attributes:
        family: what must never be on both sides of a split.
        model: its name.
        step_s: measured time of one training step, in seconds.
        work: one step, by static analysis.
    """

    family: str
    model: str
    step_s: float
    work: StepWork


def read(path: Path) -> tuple[list[Row], dict[str, int]]:
    """The measured rows, and how many were left out for which reason."""
    rows: list[Row] = []
    left_out = {"model not in the catalog": 0, "another model has the name now": 0}
    with path.open(newline="") as file:
        for record in csv.DictReader(file):
            name = record["model"]
            if catalog.find("timm", name) is None:
                left_out["model not in the catalog"] += 1
                continue
            code = _PROGRAM.format(model=name, batch=record["train_batch_size"], side=record["train_img_size"])
            found = analyse(CodeBundle({"train.py": code}), ["python3", "train.py"])
            if abs(found.parameters / (1e6 * float(record["param_count"])) - 1) > _SAME_MODEL:
                left_out["another model has the name now"] += 1
                continue
            rows.append(Row(family_of(name), name, float(record["train_step_time"]) / 1e3, StepWork.of(found)))
    return rows, left_out
