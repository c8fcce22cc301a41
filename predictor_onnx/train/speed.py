"""Train slowdown and step time, and write ``slowdown.onnx``; called by ``python -m predictor_onnx.train``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from predictor_onnx.cards import CARDS, MEASURED, SLICED
from predictor_onnx.train import slowdown_data, speed_card, speed_export, split, step_time_data
from predictor_onnx.train.conformal import group_quantile
from predictor_onnx.train.step_time_fit import LEVEL, Array, StepTimeFit, fit, roofline_times, times, works_of


def train(data: Path, output: Path, seed: int) -> dict[str, Any]:
    """Fit, export and evaluate; returns the card's section.

    Args:
        data: folder with the measured rows.
        output: folder that ``slowdown.onnx`` is written to.
        seed: of the trees and of the groups of families.
    """
    rows = slowdown_data.read(data / slowdown_data.FILE)
    chosen = speed_card.choose_all(rows)
    measured, left_out = step_time_data.read(data / step_time_data.FILE)
    held = split.held_out((row.family for row in measured), seed)
    training = [row for row in measured if row.family not in held]
    step = fit(training, seed)
    carried = _carried_over(step, rows)
    static, observed = (chosen[name] for name in speed_card.VARIANTS)
    spread = max(step.spread, carried["spread"])
    path = output / "slowdown.onnx"
    speed_export.write(speed_export.Fits(static, observed, step, spread), path)
    content = path.read_bytes()
    unseen = [row for row in measured if row.family in held]
    return {
        "model_sha256": hashlib.sha256(content).hexdigest(), "model_bytes": len(content),
        "slowdown": speed_card.slowdown_figures(rows, chosen),
        "step_time": {**_step_figures(step, training, unseen), "left_out": left_out, "carried_over": carried},
    }  # fmt: skip


def _carried_over(step: StepTimeFit, rows: Sequence[slowdown_data.Row]) -> dict[str, float]:
    """How far data sheets carry the step time to MISO's whole card."""
    whole = list({(row.workload, row.batch): row for row in rows}.values())
    card, measured = CARDS[SLICED], CARDS[MEASURED]
    predicted = step.predict([row.work for row in whole], measured.half_tflops / card.single_tflops,
                             measured.bandwidth_gb_s / card.bandwidth_gb_s)  # fmt: skip
    ratio = np.array([row.full_step_s for row in whole]) / predicted
    return {
        "rows": float(len(whole)), "mape_pct": float(100 * np.abs(1 / ratio - 1).mean()),
        "median_ratio": float(np.median(ratio)),
        "spread": max(0.0, group_quantile(np.log(ratio), [row.workload for row in whole], LEVEL)),
    }  # fmt: skip


def _score(predicted: Array, y: Array) -> dict[str, float]:
    size = 100 * np.abs(predicted / y - 1)
    return {"mape_pct": float(size.mean()), "median_pct": float(np.median(size)),
            "p90_pct": float(np.quantile(size, 0.9))}  # fmt: skip


def _step_figures(
    step: StepTimeFit, training: Sequence[step_time_data.Row], unseen: Sequence[step_time_data.Row]
) -> dict[str, Any]:
    y, works = times(unseen), works_of(unseen)
    rate = np.median(times(training) / np.array([row.work.flops for row in training]))
    predicted = step.predict(works)
    names = np.array([row.family for row in unseen])
    with_trees, without = step.left_out_mape_pct
    return {
        "train_rows": len(training), "rows": len(unseen), "families": len(set(names)),
        "methods": {
            "this model": _score(predicted, y),
            "roofline without the correction": _score(roofline_times(works, step.roofline), y),
            "median time per flop": _score(np.array([rate * work.flops for work in works]), y),
        },
        "by_family_mape_pct": {str(name): _score(predicted[names == name], y[names == name])["mape_pct"]
                               for name in np.unique(names)},
        "coverage_p90_pct": float(100 * (y <= predicted * np.exp(step.spread)).mean()),
        "families_left_out_mape_pct": {"with correction": with_trees, "roofline": without},
        "rates": {"tflops": float(1e-12 / step.roofline[0]), "activation_gb_s": float(1e-9 / step.roofline[1]),
                  "state_gb_s": float(1e-9 / max(step.roofline[2], 1e-15))},
        "spread": step.spread,
    }  # fmt: skip
