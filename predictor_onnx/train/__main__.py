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
from typing import Any

import numpy as np

from predictor_onnx import catalog
from predictor_onnx.features import FEATURES, PHYSICS
from predictor_onnx.model import MemoryModel
from predictor_onnx.train import baselines, card, dataset, export, speed, speed_card, split
from predictor_onnx.train.dataset import Row
from predictor_onnx.train.fit import Array, Fitted, fit
from predictor_onnx.train.learned_baselines import PlainTrees, physics_alone

_PACKAGE = Path(__file__).parents[1]


def _matrix(rows: list[Row]) -> tuple[Array, Array]:
    return np.array([row.vector for row in rows]), np.array([row.measured_mib for row in rows])


def _weights(rows: list[Row]) -> Array:
    """A family weighs as the root of its rows; the thousands of MLPs must not drown the rest."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.family] = counts.get(row.family, 0) + 1
    weight = np.array([counts[row.family] ** -0.5 for row in rows])
    result: Array = weight / weight.mean()
    return result


def _answers(model: MemoryModel, rows: list[Row]) -> Array:
    return np.array([model.estimate(list(row.vector)).quantiles for row in rows])


def _population(rows: list[Row]) -> list[float]:
    """p50, p90, p99 of measured memory, one value per configuration's network and batch."""
    values = [row.measured_mib for row in rows if row.source == "timm_a100"]
    return [float(np.quantile(values, level)) for level in (0.5, 0.9, 0.99)]


def _physics(fitted: Fitted) -> dict[str, float]:
    p = fitted.physics
    names = ("context_mib", "convolutions_mib", *PHYSICS[1:])
    return dict(zip(names, (p.context, p.convolutions, p.resident, p.update,
                            *(float(value) for value in p.backward)), strict=True))  # fmt: skip


def train(data: Path, output: Path, seed: int) -> dict[str, Any]:
    """Fit, export, evaluate what was exported; returns the card."""
    _say("reading the measured rows through the static analysis")
    rows, excluded = dataset.read(data)
    held = split.held_out((row.family for row in rows), seed)
    training = [row for row in rows if row.clean and row.family not in held]
    _say(f"fitting {len(training)} rows")
    x, y = _matrix(training)
    fitted = fit(x, y, _weights(training), [row.family for row in training], seed)
    path = output / "memory.onnx"
    population = _population([row for row in rows if row.family not in held])
    shape = x[:, len(PHYSICS) :]
    export.write(fitted, population, (shape.min(axis=0), shape.max(axis=0)), path)
    _say("evaluating the exported model on the held-out families")
    model = MemoryModel(path)
    unseen = [row for row in rows if row.family in held]
    sets = {
        "timm, filtered": [r for r in unseen if r.source == "timm_a100" and r.clean],
        "timm, unfiltered": [r for r in unseen if r.source == "timm_a100"],
        "MLP, one shape of network": [r for r in unseen if r.source == "gpumemnet_mlp"],
    }
    trees = PlainTrees(x, y, _weights(training), seed)

    def evaluated(part: list[Row]) -> dict[str, Any]:
        test, _ = _matrix(part)
        others = [physics_alone(fitted.physics, x, y, test), trees.method(test), *baselines.unlearned(training, part)]
        return card.evaluate(part, _answers(model, part), others)

    small = [row for row in training if row.batch <= card.SMALL_BATCH]
    large = [row for row in sets["timm, filtered"] if row.batch >= card.LARGE_BATCH]
    content = path.read_bytes()
    return {
        "model_sha256": hashlib.sha256(content).hexdigest(), "model_bytes": len(content),
        "seed": seed, "features": len(FEATURES), "full_card_mib": dataset.FULL_CARD_MIB,
        "catalog_versions": json.loads(gzip.decompress(catalog.PATH.read_bytes()))["versions"],
        "held_out_families": sorted(held), "train_rows": len(training),
        "train_families": len({row.family for row in training}), "excluded": excluded,
        "physics": _physics(fitted),
        "held_out": {name: evaluated(part) for name, part in sets.items() if part},
        "beyond_training": {
            f"timm, filtered, batch {card.LARGE_BATCH} and more; fitted on batches up to {card.SMALL_BATCH}":
            _refitted(small, large, seed)},
        "unfiltered_error": card.audit(sets["timm, unfiltered"], _answers(model, sets["timm, unfiltered"])[:, 0]),
        "training_fit": evaluated(training),
    }  # fmt: skip


def _refitted(known: list[Row], asked: list[Row], seed: int) -> dict[str, Any]:
    """All learning methods fitted on ``known`` and asked about rows beyond it (not through ONNX)."""
    (x, y), weight, test = _matrix(known), _weights(known), _matrix(asked)[0]
    fitted = fit(x, y, weight, [row.family for row in known], seed)
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
