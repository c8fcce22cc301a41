"""What a board reports beside its geometry: clocks, PCIe link, BAR1.

The recordings are in ``boards.json`` beside this module, each with its sources. As in `geometry`, a
value that no recording shows is ``None``, and whatever needs it refuses with NOT_SUPPORTED.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class Clocks:
    """Clock rates, in MHz; the SM clock is the graphics clock."""

    graphics: int
    memory: int
    video: int


@dataclass(frozen=True, slots=True)
class Board:
    """One board.

    Attributes:
        idle_clocks: What they are while nothing runs.
        max_clocks: The highest they can be.
        bar1_mib: Size of BAR1, MiB.
        power_min_watts: The lowest power limit that may be set, W.
        pcie_generation: Of the link, and the highest that it can be.
        pcie_width: Lanes of the link, and the most that it can have.
        remap_banks: Memory banks whose rows can be remapped.
    """

    idle_clocks: Clocks | None = None
    max_clocks: Clocks | None = None
    bar1_mib: int | None = None
    power_min_watts: int | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    remap_banks: int | None = None


_UNRECORDED = Board()


def board(model: str) -> Board:
    """Return the board of a card model; one that is not recorded knows nothing."""
    return _boards().get(model, _UNRECORDED)


@cache
def _boards() -> Mapping[str, Board]:
    text = resources.files(__package__).joinpath("boards.json").read_text(encoding="utf-8")
    return {row["model"]: _board(row) for row in json.loads(text)["boards"]}


def _board(row: Mapping[str, Any]) -> Board:
    cells = {key: value for key, value in row.items() if key not in ("model", "sources")}
    for clocks in ("idle_clocks", "max_clocks"):
        if cells[clocks] is not None:
            cells[clocks] = Clocks(**cells[clocks])
    return Board(**cells)
