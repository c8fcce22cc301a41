"""Small charts: predicted memory against the slices that a centre has, and figures over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from puhui.cli.words import mib, span
from puhui.rpc.moment import seconds
from puhui.v1.prediction_pb2 import Prediction, ProfileOutlook

__all__ = ["bar", "chance", "memory_chart", "strip"]

_WIDTH = 40
#: Characters that each column of figures takes from the bars.
_COLUMN = 6
#: Share of the whole from which on a part has a bar.
_LEAST_PART = 0.005
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = " ▁▂▃▄▅▆▇█"


def memory_chart(prediction: Prediction, profiles: Sequence[ProfileOutlook]) -> Group:
    """Returns the chart: what the memory is made of, how much it is, and what each profile would do.

    Args:
        prediction: what the code needs.
        profiles: what is expected on each profile, of one GPU model.
    """
    needs = [
        ("p50", prediction.memory.p50_mib, "cyan"),
        ("p90", prediction.memory.p90_mib, "cyan"),
        ("p99", prediction.memory.p99_mib, "cyan"),
        ("needs", float(prediction.required_mib), "yellow"),
    ]
    longest = max([size for _, size, _ in needs] + [float(one.memory_mib) for one in profiles] + [1.0])
    columns = _columns(profiles)
    width = _WIDTH - _COLUMN * len(columns)
    parts = [part for part in prediction.parts if part.mib >= _LEAST_PART * max(prediction.memory.p50_mib, 1.0)]
    shown: list[RenderableType] = []
    if len(parts) > 1:
        grid = _grid(width)
        for part in sorted(parts, key=lambda one: -one.mib):
            grid.add_row(part.category, Text(bar(part.mib / longest, width), style="magenta"), mib(part.mib))
        shown += [grid, Text()]
    grid = _grid(width)
    for name, size, colour in needs:
        grid.add_row(name, Text(bar(size / longest, width), style=colour), mib(size))
    return Group(*shown, grid, Text(), _profiles(profiles, columns, longest, width))


_FIELDS: Mapping[str, Literal["chance_of_fit", "slowdown_p50", "duration_p50"]] = {
    "fits": "chance_of_fit",
    "slower": "slowdown_p50",
    "takes": "duration_p50",
}


def _columns(profiles: Sequence[ProfileOutlook]) -> list[str]:
    """Returns the columns of which something is known."""
    return [name for name, field in _FIELDS.items() if any(one.HasField(field) for one in profiles)]


def _figure(column: str, one: ProfileOutlook) -> str:
    if not one.HasField(_FIELDS[column]):
        return ""
    if column == "fits":
        return chance(one.chance_of_fit)
    return f"{one.slowdown_p50:.1f}x" if column == "slower" else span(seconds(one.duration_p50))


def _profiles(profiles: Sequence[ProfileOutlook], columns: Sequence[str], longest: float, width: int) -> Table:
    """Returns a row for each profile."""
    grid = _grid(width)
    for _ in columns:
        grid.add_column(no_wrap=True, justify="right")
    grid.add_column(no_wrap=True)
    if columns:
        grid.add_row("", "", "", *(Text(name, style="dim") for name in columns), "")
    for one in profiles:
        colour = "bold green" if one.chosen else "green" if one.satisfies else "dim"
        said = "← chosen" if one.chosen else "too small" if one.reason == "too small" else ""
        share = Text(bar(one.memory_mib / longest, width), style=colour)
        grid.add_row(one.profile, share, mib(one.memory_mib), *(_figure(column, one) for column in columns), said)
    return grid


def chance(share: float) -> str:
    """Returns a chance (0 to 1) in percent; never a certainty that it is not."""
    percent = 100 * share
    if 0 < percent < 1:
        return "<1%"
    if 99 < percent < 100:
        return ">99%"
    return f"{percent:.0f}%"


def bar(share: float, width: int = _WIDTH) -> str:
    """Returns a bar of a share (0 to 1) of so many characters, to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def strip(values: Sequence[float], most: float) -> str:
    """Returns a chart of values over time, one character each; what is not nothing is seen.

    Args:
        values: none is negative.
        most: the value that fills a character.
    """
    return "".join(_LEVELS[min(max(round(8 * value / most), 1), 8) if value > 0 else 0] for value in values)


def _grid(width: int) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=11, no_wrap=True)
    grid.add_column(width=width, no_wrap=True)
    grid.add_column(no_wrap=True)
    return grid
