"""MISO's step times per MIG slice of an A100-40GB, each workload read by the same static analysis as a job.

The file (SoCC 2022, github.com/boringlee24/socc22-miso) has the median step time, and the utilization that was seen
while the workload had the whole card. What the workloads do is in ``miso_programs``.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from predictor_onnx.shares import Share, shares
from predictor_onnx.source import CodeBundle
from predictor_onnx.static.analysis import analyse
from predictor_onnx.step_work import StepWork
from predictor_onnx.train.miso_programs import program

FILE: Final = "miso_mig_steptime.csv"
FULL: Final = "7g.40gb"
#: The slowest steps of this workload are TensorFlow trying out convolution algorithms for each new length of sound:
#: the published logs have steps of two durations, six times apart. The smaller the slice, the fewer steps had run.
UNSETTLED: Final = "deepspeech2"


@dataclass(frozen=True)
class Row:
    """One workload at one batch size on one slice smaller than the card.

    Attributes:
        workload: what must never be on both sides of a split.
        batch: samples per step.
        profile: the slice.
        share: of the whole card.
        slowdown: median step time over that on the whole card.
        full_step_s: median step time on the whole card.
        work: one step, by static analysis.
        sm_utilization: on the whole card, 0 to 1.
        bandwidth_utilization: on the whole card, 0 to 1.
    """

    workload: str
    batch: int
    profile: str
    share: Share
    slowdown: float
    full_step_s: float
    work: StepWork
    sm_utilization: float
    bandwidth_utilization: float


@cache
def step_work(workload: str, batch: int) -> StepWork:
    """What one training step of a MISO workload does."""
    found = analyse(CodeBundle({"train.py": program(workload, batch)}), ["python3", "train.py"])
    return StepWork.of(found)


def read(path: Path) -> list[Row]:
    """All rows but those of the whole card, whose slowdown is 1 by definition."""
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    by_job: dict[tuple[str, int], dict[str, dict[str, str]]] = defaultdict(dict)
    for record in records:
        by_job[record["workload"], int(record["batch"])][record["slice"]] = record
    cut = shares({record["slice"] for record in records} | {FULL})
    rows = []
    for (workload, batch), found in by_job.items():
        full = float(found[FULL]["median_step_s"])
        for profile, record in found.items():
            if profile == FULL:
                continue
            rows.append(
                Row(
                    workload, batch, profile, cut[profile], float(record["median_step_s"]) / full, full,
                    step_work(workload, batch), float(record["sm_util_pct"]) / 100,
                    float(record["mem_bw_util_pct"]) / 100,
                )
            )  # fmt: skip
    return rows
