"""The form of every benchmark's answer (docs/architecture.md, "Benchmarks")."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One thing that was measured."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class Aim:
    """One figure that was promised."""

    name: str
    value: float
    aim: float
    better: Literal["higher", "lower"]

    @property
    def met(self) -> bool:
        """Whether the value keeps the promise."""
        return self.value >= self.aim if self.better == "higher" else self.value <= self.aim


@dataclass(frozen=True)
class Report:
    """What a benchmark found."""

    bench: str
    figures: Sequence[Figure]
    aims: Sequence[Aim]
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def show(self, as_json: bool) -> None:
        """Prints it to standard output, as one JSON object or as tables for people."""
        if as_json:
            document = {
                "bench": self.bench,
                "machine": machine(),
                "versions": {"puhui": version("puhui"), "python": platform.python_version(), **self.versions},
                "figures": [asdict(figure) for figure in self.figures],
                "aims": [{**asdict(aim), "met": aim.met} for aim in self.aims],
                "notes": list(self.notes),
            }
            json.dump(document, sys.stdout, indent=2)
            print()
            return
        console = Console()
        table = Table("figure", "value", "unit", title=self.bench)
        for figure in self.figures:
            table.add_row(figure.name, f"{figure.value:.4g}", figure.unit)
        console.print(table)
        aims = Table("aim", "value", "wanted", "met")
        for aim in self.aims:
            sign = "≥" if aim.better == "higher" else "≤"
            aims.add_row(aim.name, f"{aim.value:.4g}", f"{sign} {aim.aim:g}", "yes" if aim.met else "NO")
        console.print(aims)
        for note in self.notes:
            console.print(note)


def machine() -> dict[str, str | int]:
    """Returns what a reader needs to judge the absolute figures by."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count() or 0,
        "memory_mib": memory,
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Returns the value below which `share` (0 to 1) of `values` lie: nearest rank.

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]
