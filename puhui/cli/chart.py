"""Small charts: predicted memory against the slices that a centre has, and figures over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from puhui.cli.words import mib
from puhui.v1.prediction_pb2 import Prediction

__all__ = ["memory_chart", "strip"]

_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = " ▁▂▃▄▅▆▇█"


def memory_chart(prediction: Prediction, profiles: Mapping[str, float], chosen: str) -> Group:
    """Returns the chart.

    Args:
        prediction: what the code needs.
        profiles: memory of each profile, in MiB, by its name.
        chosen: the profile that the job would get; "" for none.
    """
    needs = [
        ("p50", prediction.memory.p50_mib, "cyan"),
        ("p90", prediction.memory.p90_mib, "cyan"),
        ("p99", prediction.memory.p99_mib, "cyan"),
        ("needs", float(prediction.required_mib), "yellow"),
    ]
    slices = sorted(profiles.items(), key=lambda item: (item[1], item[0]))
    longest = max([size for _, size, _ in needs] + [size for _, size in slices] + [1.0])
    need_rows, slice_rows = _grid(), _grid()
    for name, size, colour in needs:
        need_rows.add_row(name, Text(bar(size / longest), style=colour), mib(size))
    for name, size in slices:
        fits = size >= prediction.required_mib
        colour = "bold green" if name == chosen else "green" if fits else "dim"
        said = mib(size) + ("  ← chosen" if name == chosen else "" if fits else "  too small")
        slice_rows.add_row(name, Text(bar(size / longest), style=colour), said)
    return Group(need_rows, Text(), slice_rows)


def bar(share: float) -> str:
    """Returns a bar of a share (0 to 1) of the chart's width, to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * _WIDTH * 8)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def strip(values: Sequence[float], most: float) -> str:
    """Returns a chart of values over time, one character each; what is not nothing is seen.

    Args:
        values: none is negative.
        most: the value that fills a character.
    """
    return "".join(_LEVELS[min(max(round(8 * value / most), 1), 8) if value > 0 else 0] for value in values)


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=11, no_wrap=True)
    grid.add_column(width=_WIDTH, no_wrap=True)
    grid.add_column(no_wrap=True)
    return grid
