"""Which families are held out: drawn once by seed, frozen in ``split.json``, never tuned on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Final

PATH: Final = Path(__file__).with_name("split.json")
#: Share of families held out.
SHARE: Final = 0.2


def draw(families: Iterable[str], seed: int) -> list[str]:
    """A fifth of the timm families, and one shape of MLP."""
    ordered = sorted(set(families))
    chooser = random.Random(seed)  # noqa: S311 - a reproducible draw, no secret
    vision = [family for family in ordered if not family.startswith("mlp_")]
    dense = [family for family in ordered if family.startswith("mlp_")]
    held = chooser.sample(vision, max(1, round(SHARE * len(vision))))
    return sorted(held + ([chooser.choice(dense)] if dense else []))


def draw_surveyed(families: Iterable[str], measured: Iterable[str], seed: int) -> list[str]:
    """A fifth of the families that only the survey has."""
    ordered = sorted(set(families) - set(measured))
    chooser = random.Random(seed)  # noqa: S311 - as above
    return sorted(chooser.sample(ordered, max(1, round(SHARE * len(ordered)))))


def held_out(families: Iterable[str], seed: int) -> frozenset[str]:
    """The frozen held-out families; drawn and written only when the file does not exist."""
    if not PATH.exists():
        content = {"seed": seed, "held_out_families": draw(families, seed)}
        PATH.write_text(json.dumps(content, indent=1) + "\n")
    return frozenset(json.loads(PATH.read_text())["held_out_families"])


def held_out_surveyed(families: Iterable[str], measured: Iterable[str], seed: int) -> frozenset[str]:
    """The frozen held-out families among those that nobody has measured; likewise."""
    content = json.loads(PATH.read_text())
    if "held_out_surveyed_families" not in content:
        content["held_out_surveyed_families"] = draw_surveyed(families, measured, seed)
        PATH.write_text(json.dumps(content, indent=1) + "\n")
    return frozenset(content["held_out_surveyed_families"])
