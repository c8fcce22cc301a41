"""How well memory and slowdown are predicted, on families that were never trained on, beside baselines of the same run.

    python -m bench.predictor [--json] [--data FOLDER] [--verbose]

FOLDER holds the public measurements that training reads (see `predictor_onnx.train`); no GPU is needed. The figures
that are aimed at are those of the shipped ``memory.onnx`` as a centre asks it: every row gets one answer, of the half
for traced steps where its step was traced and of the half that reads code elsewhere. Cross-fitted figures are of the
same method fitted anew without each fifth of all families; they are not of the shipped file.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import predictor_speed
from bench.report import Aim, Figure, Report, quantile
from predictor_onnx import CodeBundle, Predictor, Request
from predictor_onnx.model import MemoryModel
from predictor_onnx.train import baselines, card, dataset, split
from predictor_onnx.train.baselines import Method
from predictor_onnx.train.dataset import Row
from predictor_onnx.train.fit import Fitted, folds_of
from predictor_onnx.train.learned_baselines import PlainTrees, physics_alone
from predictor_onnx.train.physics import Array
from predictor_onnx.train.program import program
from predictor_onnx.train.ways import STATIC, TRACED, Way, measured, weights

DATA: Final = Path("../shared/data/predictor")
SEED: Final = 20
#: The board whose slices the aims are about; the others are in the table.
BOARD: Final = "A100-SXM4-80GB"
_LARGEST: Final = 0.8
_CALLS: Final = 2000
_OURS: Final = "this model"


def ways_of(rows: Sequence[Row]) -> list[tuple[Way, list[Row]]]:
    """Each row by the best way of knowing it."""
    traced = [row for row in rows if row.traced is not None]
    static = [row for row in rows if row.traced is None]
    return [(way, part) for way, part in ((TRACED, traced), (STATIC, static)) if part]


def table_of(
    rows: Sequence[Row],
    training: list[Row],
    answers: Callable[[Way, list[Row]], Array],
    fitted: Callable[[Way, list[Row]], Fitted],
) -> dict[str, Any]:
    """Our answers and those of the baselines about the same rows, each known in the best way there is for it.

    Args:
        rows: what is asked.
        training: what the baselines learn from.
        answers: p50, p90 and p99 of ours.
        fitted: ours, fitted on those rows; its physics is one of the baselines.
    """
    order: list[Row] = []
    quantiles: list[Array] = []
    others: dict[str, list[Method]] = {}
    for way, part in ways_of(rows):
        seen = way.known(training)
        x, y, test = way.matrix(seen), measured(seen), way.matrix(part)
        methods = [
            physics_alone(fitted(way, seen).physics, x, y, test),
            PlainTrees(x, y, weights([row.family for row in seen]), SEED).method(test),
            *(baselines.traced(part) if way is TRACED else []),
            *baselines.unlearned(seen, part),
        ]
        for method in methods:
            others.setdefault(method.name, []).append(method)
        order += part
        quantiles.append(answers(way, part))
    whole = [
        Method(name, np.concatenate([one.point for one in parts]), np.concatenate([one.ask for one in parts]))
        for name, parts in others.items()
        if sum(len(one.point) for one in parts) == len(order)
    ]
    return card.evaluate(order, np.concatenate(quantiles), whole)


def crossed(rows: list[Row], learnt: list[Row]) -> dict[str, Any]:
    """The same method about the rows of each fifth of the families, fitted without them."""
    folds = folds_of([row.family for row in [*rows, *learnt]], SEED)
    fold_of = {row.family: fold for row, fold in zip([*rows, *learnt], folds, strict=True)}
    parts: list[tuple[Row, Array]] = []
    for fold in range(folds.max() + 1):
        training = [row for row in learnt if fold_of[row.family] != fold]
        for way, part in ways_of([row for row in rows if fold_of[row.family] == fold]):
            found = way.fit(way.known(training), SEED).quantiles(way.matrix(part))
            parts += zip(part, found, strict=True)
    return card.evaluate([row for row, _ in parts], np.array([found for _, found in parts]), [])


def extrapolated(rows: list[Row]) -> dict[str, Any]:
    """Fully connected networks: fitted without the largest fifth, asked about it."""
    values = measured(rows)
    border = float(np.quantile(values, _LARGEST))
    small = [row for row in rows if row.measured_mib <= border]
    large = [row for row in rows if row.measured_mib > border]

    def fitted(way: Way, seen: list[Row]) -> Fitted:
        return way.fit(seen, SEED)

    def answers(way: Way, part: list[Row]) -> Array:
        return way.fit(way.known(small), SEED).quantiles(way.matrix(part))

    return table_of(large, small, answers, fitted)


def latencies_ms(model: MemoryModel, rows: Sequence[Row]) -> list[Figure]:
    """Times of the model alone, and of reading the code with it, in milliseconds."""
    vectors = [row.vector for row in rows]
    predictor = Predictor()
    programs = [CodeBundle({"train.py": program(row.configuration)}) for row in rows]
    request = Request(("python3", "train.py"))
    asks: dict[str, Callable[[int], object]] = {
        "inference.read": lambda number: model.estimate(list(vectors[number])),
        "inference.traced": lambda number: model.estimate_traced(list(rows[number].traced or ())),
        "prediction.read": lambda number: predictor.predict(programs[number], request),
    }
    figures = []
    for name, ask in asks.items():
        wall, processor = [], []
        for call in range(_CALLS):
            number = call % len(rows)
            started, busy = time.perf_counter(), time.thread_time()
            ask(number)
            wall.append(1e3 * (time.perf_counter() - started))
            processor.append(1e3 * (time.thread_time() - busy))
        figures += [
            Figure(f"{name}_p50_ms", quantile(wall, 0.5), "ms"),
            Figure(f"{name}_p99_ms", quantile(wall, 0.99), "ms"),
            Figure(f"{name}_processor_p99_ms", quantile(processor, 0.99), "ms"),
        ]
    return figures


def worst(rows: list[Row], answers: Callable[[Way, list[Row]], Array], count: int = 15) -> list[str]:
    """The rows that are furthest off, and the bias of each family, a line each."""
    known = [(row, found) for way, part in ways_of(rows) for row, found in zip(part, answers(way, part), strict=True)]
    errors = [(100 * (found[0] / row.measured_mib - 1), row, found) for row, found in known]
    lines = [
        f"{row.model} batch {row.batch}: {row.measured_mib:.0f} MiB measured, {found[0]:.0f} predicted ({error:+.0f} %)"
        for error, row, found in sorted(errors, key=lambda one: -abs(one[0]))[:count]
    ]
    families: dict[str, list[float]] = {}
    for error, row, _ in errors:
        families.setdefault(row.family, []).append(error)
    biased = sorted(families.items(), key=lambda one: -abs(float(np.median(one[1]))))
    lines += [f"family {name}: {np.median(part):+.1f} % in the median of {len(part)} rows" for name, part in biased]
    return lines


def _figures(title: str, table: dict[str, Any]) -> list[Figure]:
    found = [
        Figure(f"{title}.rows", float(table["rows"]), "rows"),
        Figure(f"{title}.{_OURS}.coverage90_pct", table["coverage_p90_pct"], "%"),
        Figure(f"{title}.{_OURS}.coverage90_by_family_pct", table["coverage_p90_by_family_pct"], "%"),
        Figure(f"{title}.{_OURS}.coverage99_pct", table["coverage_p99_pct"], "%"),
    ]
    for method, one in table["methods"].items():
        found += [
            Figure(f"{title}.{method}.{name}", one[name], "%")
            for name in ("mape_pct", "median_pct", "p90_pct", "under_by_5_pct")
        ]
        for board, slices in one["slices"].items():
            found += [
                Figure(f"{title}.{method}.{board}.{name}", value, "%" if name.endswith("_pct") else "")
                for name, value in slices.items()
            ]
    return found


def _aims(filtered: dict[str, Any], mlp: dict[str, Any]) -> list[Aim]:
    ours = filtered["methods"][_OURS]
    slices = ours["slices"][BOARD]
    return [
        Aim("mape_pct", ours["mape_pct"], 6.0, "lower"),
        Aim("median_pct", ours["median_pct"], 2.0, "lower"),
        Aim("slice_exact_pct", slices["slice_exact_pct"], 95.0, "higher"),
        Aim("slice_too_small_pct", slices["slice_too_small_pct"], 1.5, "lower"),
        Aim("slice_oversized_pct", slices["slice_oversized_pct"], 6.0, "lower"),
        Aim("coverage90_pct", filtered["coverage_p90_pct"], 88.0, "higher"),
        Aim("coverage90_at_most_pct", filtered["coverage_p90_pct"], 93.0, "lower"),
        Aim("mlp_extrapolation_pct", mlp["methods"][_OURS]["mape_pct"], 3.0, "lower"),
    ]


def _print_tables(tables: dict[str, dict[str, Any]]) -> None:
    console = Console()
    for title, table in tables.items():
        shown = Table("method", "MAPE", "median", "p90", "under > 5", "exact", "too small", "oversized",
                      title=f"{title}: {table['rows']} rows; p90 covers {table['coverage_p90_pct']:.1f} %; in %; "
                            f"slices of {BOARD}")  # fmt: skip
        for method, one in table["methods"].items():
            slices = one["slices"][BOARD]
            values = [one[name] for name in ("mape_pct", "median_pct", "p90_pct", "under_by_5_pct")]
            values += [slices[f"slice_{name}_pct"] for name in ("exact", "too_small", "oversized")]
            shown.add_row(method, *(f"{value:.1f}" for value in values))
        console.print(shown)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.predictor", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the public measurements")
    parser.add_argument("--verbose", action="store_true", help="name the worst rows and families as well")
    arguments = parser.parse_args()
    if not (arguments.data / "timm_a100_measured.csv").exists():
        sys.exit(f"there are no measurements in {arguments.data}; `python -m predictor_onnx.train --help` says which")
    rows, _ = dataset.read(arguments.data)
    held = split.held_out((row.family for row in rows), SEED)
    training = [row for row in rows if row.clean and row.family not in held]
    unseen = [row for row in rows if row.family in held and row.source == "timm_a100"]
    mlps = [row for row in rows if row.source == "gpumemnet_mlp"]
    model = MemoryModel()
    ours: dict[str, Fitted] = {}

    def shipped(way: Way, part: list[Row]) -> Array:
        return way.answers(model, part)

    def fitted(way: Way, seen: list[Row]) -> Fitted:
        if way.name not in ours:
            ours[way.name] = way.fit(seen, SEED)
        return ours[way.name]

    clean = [row for row in unseen if row.clean]
    tables = {
        "held out, filtered": table_of(clean, training, shipped, fitted),
        "held out, unfiltered": table_of(unseen, training, shipped, fitted),
        "held out, filtered, never traced": table_of(
            [dataclasses.replace(row, traced=None) for row in clean],
            [dataclasses.replace(row, traced=None) for row in training], shipped, fitted,
        ),
        "MLPs, the largest fifth, fitted without it": extrapolated(mlps),
        "all families, cross-fitted, filtered": crossed(
            [row for row in rows if row.clean and row.source == "timm_a100"], [row for row in rows if row.clean]
        ),
    }  # fmt: skip
    speed = predictor_speed.measure(arguments.data)
    figures = [figure for title, table in tables.items() for figure in _figures(title, table)]
    figures += [*latencies_ms(model, clean[:100]), *speed.figures]
    aims = [*_aims(tables["held out, filtered"], tables["MLPs, the largest fifth, fitted without it"]), *speed.aims]
    traced = sum(row.traced is not None for row in clean)
    content = model.path.read_bytes()
    notes = [
        f"memory.onnx {hashlib.sha256(content).hexdigest()[:12]}: {traced} of {len(clean)} filtered rows are answered "
        f"from traces, the others from reading; slices of the aims are those of {BOARD}.",
        *speed.notes,
        *(worst(clean, shipped) if arguments.verbose else []),
    ]
    if not arguments.json:
        _print_tables(tables)
    Report("predictor", figures, aims, notes=notes).show(arguments.json)


if __name__ == "__main__":
    main()
