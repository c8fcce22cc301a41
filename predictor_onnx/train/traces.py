"""Traced steps: of the configurations that were measured, and of a survey of others; files beside this one.

Made by `build_traces`. A traced figure is no measurement: it says what the tracer makes of a configuration.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Final

from predictor_onnx.traced_step import TracedStep

PATH: Final = Path(__file__).with_name("traced.csv.gz")
SURVEYED: Final = Path(__file__).with_name("surveyed.csv.gz")

Key = tuple[str, str, int]
"""Source of the measurement, name of the network (of a surveyed step: all of its configuration, as JSON), batch."""

_LIVE: Final = ("parameter", "data", "activation", "gradient", "optimizer", "temporary")
_PLAIN: Final = tuple(field.name for field in fields(TracedStep) if field.name != "live_mib")
_COUNTS: Final = frozenset(["parameters", "convolutions", "pointwise", "depthwise", "kernels"])
_COLUMNS: Final = ("source", "model", "batch", *_PLAIN, *_LIVE)


def read(path: Path = PATH) -> dict[Key, TracedStep]:
    """All traced steps by what they are of; none when the file is not there.

    Raises:
        ValueError: the file is of another version.
    """
    if not path.exists():
        return {}
    found = {}
    with gzip.open(path, "rt", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise ValueError(
                f"{path.name} has other columns; make it anew with 'python -m predictor_onnx.train.build_traces'"
            )
        for line in reader:
            values = {name: int(line[name]) if name in _COUNTS else float(line[name]) for name in _PLAIN}
            live = {name: float(line[name]) for name in _LIVE}
            found[line["source"], line["model"], int(line["batch"])] = TracedStep(live_mib=live, **values)  # type: ignore[arg-type]
    return found


def write(steps: Mapping[Key, TracedStep], path: Path = PATH) -> None:
    """Write the file; the same steps give the same bytes."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    for key in sorted(steps):
        step = steps[key]
        table.writerow([*key, *(_short(getattr(step, name)) for name in _PLAIN),
                        *(_short(step.live_mib[name]) for name in _LIVE)])  # fmt: skip
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.7g}"
