"""Models known by name: how much they weigh and what one sample costs, traced ahead of time.

The file is made by ``predictor_onnx.train.build_catalog``; its figures are elements of four bytes per
sample at a stated input size. Images of another size scale with their area; texts of another length by
the line and parabola through two traced lengths.
"""

from __future__ import annotations

import gzip
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from predictor_onnx.errors import ModelUnavailableError

PATH: Final = Path(__file__).with_name("catalog.json.gz")
_LONGEST_NAME: Final = 200
_BILLIONS: Final = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z0-9])", re.IGNORECASE)
Entry = dict[str, Any]


@lru_cache(maxsize=1)
def load() -> dict[str, Entry]:
    """The catalog, by ``library/name``.

    Raises:
        ModelUnavailableError: the file is missing or damaged.
    """
    try:
        content = json.loads(gzip.decompress(PATH.read_bytes()))
    except (OSError, ValueError) as error:
        raise ModelUnavailableError(
            f"the catalog {PATH.name} cannot be read ({error}); rebuild it with "
            "'python -m predictor_onnx.train.build_catalog'"
        ) from error
    models: dict[str, Entry] = content["models"]
    return models


def find(library: str, name: str) -> Entry | None:
    """Entry of a model; tags, hub prefixes and upper case are forgiven."""
    if len(name) > _LONGEST_NAME:
        return None
    models = load()
    plain = name.removeprefix("hf_hub:timm/").removeprefix("hf-hub:timm/").removeprefix("timm/")
    for candidate in (name, plain, plain.partition(".")[0], plain.lower()):
        entry = models.get(f"{library}/{candidate}")
        if entry is not None:
            return entry
    if library == "transformers":
        short = name.rpartition("/")[2].lower()
        known = _by_short_name()
        # A fine-tuned checkpoint is called after what it was made from.
        stems = (short.rsplit("-", cut)[0] for cut in range(short.count("-")))
        return next((known[stem] for stem in stems if stem in known), None)
    return None


@lru_cache(maxsize=1)
def _by_short_name() -> dict[str, Entry]:
    """Entries of transformers by the part of their name behind the owner's."""
    found: dict[str, Entry] = {}
    for key, entry in load().items():
        if key.startswith("transformers/"):
            found.setdefault(key.rpartition("/")[2].lower(), entry)
    return found


def parameters_in_name(name: str) -> float | None:
    """Parameters that a checkpoint's name claims (``…-7b``, ``opt-350m``), or None."""
    found = _BILLIONS.search(name[-_LONGEST_NAME:].rpartition("/")[2])
    if found is None:
        return None
    return float(found[1]) * (1e9 if found[2].lower() == "b" else 1e6)
