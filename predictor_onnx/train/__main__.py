"""Train the memory and the speed model: ``python -m predictor_onnx.train --data DIR``.

DIR holds the measured rows (``timm_a100_measured.csv``, ``gpumemnet_mlp_step1.csv.gz``, ``…step2.csv.gz``,
``miso_mig_steptime.csv``, ``timm_benchmark-train-amp-nchw-….csv``). Writes ``memory.onnx``, ``slowdown.onnx``,
``model_card.json`` and ``model_card.md`` beside the package's code.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

from predictor_onnx import catalog
from predictor_onnx.features import FEATURES, PHYSICS
from predictor_onnx.model import MemoryModel
from predictor_onnx.traced_step import TRACED_FEATURES, TRACED_PHYSICS
from predictor_onnx.train import baselines, card, dataset, export, speed, speed_card, split, survey
from predictor_onnx.train.dataset import Row
from predictor_onnx.train.fit import Examples
from predictor_onnx.train.learned_baselines import PlainTrees, physics_alone
from predictor_onnx.train.physics import Array, Physics
from predictor_onnx.train.survey import Surveyed
from predictor_onnx.train.ways import STATIC, TRACED, Way, measured, weights

#: What a step that was traced only weighs beside a measured one.
LESSON_WEIGHT: Final = 0.3
_PACKAGE = Path(__file__).parents[1]


def _lesson(surveyed: list[Surveyed], traced: Physics, weight: float) -> Examples | None:
    """What the physics of traced steps says of steps that nobody measured; None where there are none.

    Args:
        surveyed: the steps.
        traced: that physics, fitted on what was measured.
        weight: of one step, on average; of a measured row it is one.
    """
    if not surveyed:
        return None
    fixed, work = traced.terms(np.array([one.traced for one in surveyed]))
    families = [one.family for one in surveyed]
    return Examples(np.array([one.vector for one in surveyed]), fixed + work, weight * weights(families), families)


def _population(rows: list[Row]) -> list[float]:
    """p50, p90, p99 of measured memory, one value per configuration's network and batch."""
    values = [row.measured_mib for row in rows if row.source == "timm_a100"]
    return [float(np.quantile(values, level)) for level in (0.5, 0.9, 0.99)]


def _reach(matrix: Array, width: int) -> tuple[Array, Array]:
    shape = matrix[:, width:]
    return shape.min(axis=0), shape.max(axis=0)


def train(data: Path, output: Path, seed: int) -> dict[str, Any]:
    """Fit, export, evaluate what was exported; returns the card."""
    _say("reading the measured rows through the static analysis")
    rows, excluded = dataset.read(data)
    held = split.held_out((row.family for row in rows), seed)
    training = [row for row in rows if row.clean and row.family not in held]
    fitted = {}
    seen = TRACED.known(training)
    _say(f"fitting {len(seen)} rows, {TRACED.name}")
    fitted[TRACED] = TRACED.fit(seen, seed)
    surveyed = survey.read()
    unseen_families = held | split.held_out_surveyed(survey.families(), (row.family for row in rows), seed)
    taught = [one for one in surveyed if one.family not in unseen_families]
    lesson = _lesson(taught, fitted[TRACED].physics, LESSON_WEIGHT)
    _say(f"fitting {len(training)} rows, {STATIC.name}, and {len(taught)} that were traced only")
    fitted[STATIC] = STATIC.fit(training, seed, lesson)
    path = output / "memory.onnx"
    export.write(
        export.Model(
            fitted[STATIC], fitted[TRACED], _population([row for row in rows if row.family not in held]),
            _reach(STATIC.matrix(training), len(PHYSICS)),
            _reach(TRACED.matrix(TRACED.known(training)), len(TRACED_PHYSICS)),
        ),
        path,
    )  # fmt: skip
    _say("evaluating the exported model on the held-out families")
    model = MemoryModel(path)
    unseen = [row for row in rows if row.family in held]
    sets = {
        "timm, filtered": [r for r in unseen if r.source == "timm_a100" and r.clean],
        "timm, unfiltered": [r for r in unseen if r.source == "timm_a100"],
        "MLP, one shape of network": [r for r in unseen if r.source == "gpumemnet_mlp"],
    }
    figures: dict[str, Any] = {}
    beyond: dict[str, Any] = {}
    for way in (TRACED, STATIC):
        seen = way.known(training)
        x, y = way.matrix(seen), measured(seen)
        trees = PlainTrees(x, y, weights([row.family for row in seen]), seed)
        for name, rows_of in sets.items():
            part = way.known(rows_of)
            if not part:
                continue
            test = way.matrix(part)
            others = [physics_alone(fitted[way].physics, x, y, test), trees.method(test)]
            others += baselines.traced(part) if way is TRACED else []
            figures[f"{way.name}: {name}"] = card.evaluate(
                part, way.answers(model, part), [*others, *baselines.unlearned(seen, part)], len(rows_of) - len(part)
            )
        small = [row for row in seen if row.batch <= card.SMALL_BATCH]
        large = [row for row in way.known(sets["timm, filtered"]) if row.batch >= card.LARGE_BATCH]
        title = f"timm, filtered, batch {card.LARGE_BATCH} and more; fitted on batches up to {card.SMALL_BATCH}"
        beyond[f"{way.name}: {title}"] = _refitted(way, small, large, seed)
    _say("comparing both halves on the survey")
    content = path.read_bytes()
    worst = TRACED.known(sets["timm, unfiltered"])
    return {
        "model_sha256": hashlib.sha256(content).hexdigest(), "model_bytes": len(content),
        "seed": seed, "features": len(FEATURES), "traced_features": len(TRACED_FEATURES),
        "full_card_mib": dataset.FULL_CARD_MIB,
        "catalog_versions": json.loads(gzip.decompress(catalog.PATH.read_bytes()))["versions"],
        "held_out_families": sorted(held), "train_rows": len(training),
        "train_families": len({row.family for row in training}), "excluded": excluded,
        "physics": {way.name: _plain(fitted[way].physics) for way in fitted},
        "held_out": figures, "beyond_training": beyond,
        "taught_rows": len(taught), "lesson_weight": LESSON_WEIGHT,
        "surveyed": survey.compared(model, surveyed, unseen_families),
        "unfiltered_error": card.audit(worst, TRACED.answers(model, worst)[:, 0]),
    }  # fmt: skip


def _plain(physics: Physics) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(physics).items()}


def _refitted(way: Way, known: list[Row], asked: list[Row], seed: int) -> dict[str, Any]:
    """All learning methods fitted on ``known`` and asked about rows beyond it (not through ONNX)."""
    x, y, weight, test = way.matrix(known), measured(known), weights([row.family for row in known]), way.matrix(asked)
    fitted = way.fit(known, seed)
    others = [physics_alone(fitted.physics, x, y, test), PlainTrees(x, y, weight, seed).method(test)]
    return card.evaluate(asked, fitted.quantiles(test), others)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m predictor_onnx.train", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the measured rows")
    parser.add_argument("--output", type=Path, default=_PACKAGE, help="where the model is written")
    parser.add_argument("--seed", type=int, default=20)
    arguments = parser.parse_args()
    made = train(arguments.data, arguments.output, arguments.seed)
    _say("fitting slowdown and step time")
    made["speed"] = speed.train(arguments.data, arguments.output, arguments.seed)
    (arguments.output / "model_card.json").write_text(json.dumps(made, indent=1) + "\n")
    (arguments.output / "model_card.md").write_text(f"{card.markdown(made)}\n{speed_card.markdown(made['speed'])}")
    sys.stderr.write(json.dumps(made["held_out"], indent=1) + "\n")


if __name__ == "__main__":
    main()
