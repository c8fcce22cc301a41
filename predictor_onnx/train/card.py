"""How good the model is, on families that it never saw, beside baselines from the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from predictor_onnx.prediction import OOM_COST, OVERSIZE_COST
from predictor_onnx.train.dataset import Row

Array = npt.NDArray[np.float64]

#: Usable MiB of each slice size, as recorded from the boards' drivers.
PROFILES_MIB: Final[dict[str, tuple[float, ...]]] = {
    "A100-SXM4-80GB": (9728, 19968, 40192, 80896),
    "H100-SXM5-80GB": (9984, 20096, 40448, 81152),
}
#: Largest share above the measured value that the margin adds, as ``required_mib`` does.
_MARGIN_MIB: Final = 64.0


@dataclass(frozen=True)
class Method:
    """Predictions of one method: a point estimate, and what it would ask for, in MiB."""

    name: str
    point: Array
    ask: Array


def slice_index(mib: Array, sizes: tuple[float, ...]) -> npt.NDArray[np.int64]:
    """Index of the smallest slice that holds each value; the largest where none does."""
    return np.minimum(np.searchsorted(np.array(sizes), mib), len(sizes) - 1)


def errors(measured: Array, point: Array) -> dict[str, float]:
    """Relative errors in percent, and the share of rows that are under by more than five percent."""
    relative = point / measured - 1
    size = np.abs(relative) * 100
    return {
        "mape_pct": float(size.mean()), "median_pct": float(np.median(size)),
        "p90_pct": float(np.quantile(size, 0.9)),
        "under_by_5_pct": float((relative < -0.05).mean() * 100),
    }  # fmt: skip


def slices(measured: Array, ask: Array, sizes: tuple[float, ...]) -> dict[str, float]:
    """Share of rows whose slice is exact, too small or oversized, in percent, and the mean cost."""
    right, chosen = slice_index(measured, sizes), slice_index(ask, sizes)
    small, large = float((chosen < right).mean()), float((chosen > right).mean())
    return {
        "slice_exact_pct": 100 * (1 - small - large), "slice_too_small_pct": 100 * small,
        "slice_oversized_pct": 100 * large,
        "expected_cost": OOM_COST * small + OVERSIZE_COST * large,
    }  # fmt: skip


def baselines(train: list[Row], test: list[Row]) -> list[Method]:
    """Always the largest slice, the most frequent slice, and four times the weights."""
    sizes = PROFILES_MIB["A100-SXM4-80GB"]
    usual = slice_index(np.array([row.measured_mib for row in train]), sizes)
    majority = sizes[int(np.bincount(usual).argmax())]
    full = np.full(len(test), sizes[-1])
    weights = np.array([4 * row.parameter_mib for row in test]) * 1.2
    return [
        Method("always the biggest", full, full),
        Method("majority slice", np.full(len(test), majority), np.full(len(test), majority)),
        Method("weights x 4 x 1.2 (accelerate-style)", weights, weights),
    ]


def evaluate(rows: list[Row], quantiles: Array, train: list[Row]) -> dict[str, Any]:
    """All figures of one set of rows."""
    measured = np.array([row.measured_mib for row in rows])
    model = Method("this model", quantiles[:, 0], quantiles[:, 1] + _MARGIN_MIB)
    table = {}
    for method in [model, *baselines(train, rows)]:
        table[method.name] = {
            **errors(measured, method.point),
            "slices": {board: slices(measured, method.ask, sizes)
                       for board, sizes in PROFILES_MIB.items()},
        }  # fmt: skip
    return {
        "rows": len(rows), "configurations": len({row.model for row in rows}),
        "coverage_p90_pct": float((measured <= quantiles[:, 1]).mean() * 100),
        "coverage_p99_pct": float((measured <= quantiles[:, 2]).mean() * 100),
        "methods": table,
    }  # fmt: skip


_WORDS: Final = """\
## What it is

One ONNX file (`memory.onnx`, onnxruntime, one thread) from {count} features of a training or inference step to
p50, p90 and p99 of peak device memory in MiB:
`context + resident + max(backward, update) x correction`. The physics is fitted by robust non-negative least
squares; weights and gradients count at least their own bytes. The correction (LightGBM, bounded to a factor of
e^-0.15 to e^0.5) and the quantile heads see the architecture only, never the batch, so the answer keeps growing
beyond the data. The quantiles are shifted by conformal residuals of families that their own fit had not seen.

## Data, and what is assumed about it

- timm models measured on an A100-40GB (GPUMemNet, 644 models x 5 batch sizes, device memory as nvidia-smi shows
  it). Assumed: float32, Adam, default input size of the model in timm {timm}, fused attention. The data do not say.
- GPUMemNet's fully connected networks, float32, Adam (its published script says so), same machine.
- Each row is turned into source code and read by the same static analysis as a submitted job.
- Labels are measured. No traced or simulated label is in training or in these figures.

*Filtered* drops the rows of a timm model whose memory does not follow the batch (the run had failed: the rows of
one model must not fall by more than 2 % and must rise by 2 % in all) and rows of {full:.0f} MiB or more (the 40 GB
card was full). Only filtered rows are trained on. Unfiltered figures stand beside the filtered ones.

## Split

Whole families (leading letters of the model's name; for the MLPs the shape of the network). A fifth of the families
was drawn by seed before any model was fitted with this code and is frozen in `train/split.json`: {held}.
Not wholly blind: while the features were designed, a first linear fit over *all* timm families was looked at, and it
led to the counting of fused attention and to the two phases (backward, update).
The bounds (saved activations count at least 0.9, the correction removes at most a seventh, the median head
shifts by at most 5 %) were set after the held-out figures of two earlier versions had been seen, because of an
under-predicted language model that nobody had measured. The figures of the three versions differ by less than
half a point of MAPE (8.0 to 8.2 %); treat them as slightly optimistic all the same.
"""
_WEAKNESSES: Final = """\
## Known weaknesses

- p90 covers fewer held-out rows than its name says (see the figures above): errors are correlated within a family,
  and families unlike the training ones spread wider than the calibration expects.
- Unfiltered rows hold runs that had failed (memory that falls, or stays, as the batch grows); against their labels the
  relative error is meaningless, which is why the unfiltered MAPE is so far from its median.
- One GPU model, one software stack, one optimizer, float32. Half precision, checkpointing, other optimizers and
  inference rest on physics alone (bytes per element), which no measured row checks.
- The context learnt here (1.4–1.8 GiB) includes whatever else that machine kept on its card; a current PyTorch alone
  takes about 0.5 GiB. Very small jobs are therefore over-predicted, on the safe side.
- No measured row is a language model. Transformers beyond vision models rest on the same physics.
- Text and detection models whose inputs come from files: sizes are guessed, which the answer says and widens for.
- The file is {kib:.0f} KiB; the quantile heads know {families} families. Coverage on a family unlike all of them can
  be far from nominal: the held-out coverage above is an average over rows, not a promise for each family.
"""


def markdown(card: dict[str, Any]) -> str:
    """The card for people, from the same figures as the JSON."""
    lines = ["# Model card: peak device memory", "", f"Model `{card['model_sha256'][:12]}`, "
             f"seed {card['seed']}. Rebuild: `python -m predictor_onnx.train --data DIR`.", ""]  # fmt: skip
    lines += [_WORDS.format(count=card["features"], timm=card["catalog_versions"]["timm"],
                            full=card["full_card_mib"],
                            held=", ".join(card["held_out_families"]))]  # fmt: skip
    lines += ["## Left out", ""]
    lines += [f"- {name}: {', '.join(f'{n} rows, {why}' for why, n in reasons.items()) or 'none'}"
              for name, reasons in card["excluded"].items()]  # fmt: skip
    lines += ["", "## Held-out figures", ""]
    for name, figures in card["held_out"].items():
        lines += [f"### {name} ({figures['rows']} rows, {figures['configurations']} models)", "",
                  f"At or under p90: {figures['coverage_p90_pct']:.1f} %. "
                  f"At or under p99: {figures['coverage_p99_pct']:.1f} %.", "",
                  "| method | MAPE % | median % | p90 % | under by > 5 % | board | exact % | too small % "
                  "| oversized % |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for method, e in figures["methods"].items():
            for board, s in e["slices"].items():
                lines.append(
                    f"| {method} | {e['mape_pct']:.1f} | {e['median_pct']:.1f} | {e['p90_pct']:.1f} "
                    f"| {e['under_by_5_pct']:.1f} | {board} | {s['slice_exact_pct']:.1f} "
                    f"| {s['slice_too_small_pct']:.1f} | {s['slice_oversized_pct']:.1f} |"
                )
        lines.append("")
    lines += ["## Physics", "", "| term | coefficient |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in card["physics"].items()]
    lines += ["", _WEAKNESSES.format(kib=card["model_bytes"] / 1024, families=card["train_families"])]
    return "\n".join(lines)
