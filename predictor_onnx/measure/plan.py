"""What to measure, and in which order: what tells most for its time comes first.

Pure: a catalog, a size of card and a seed in, a list out; the same in, the same out.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from predictor_onnx.configuration import Configuration, Precision
from predictor_onnx.measure.rows import configuration_of
from predictor_onnx.train.dataset import family_of

MIB: Final = 2**20
#: Networks of a family that are measured.
_NETWORKS: Final = 3
#: From two: a batch norm in training refuses one value per channel.
_BATCHES: Final = (2, 4, 8, 16, 32, 64, 128, 256)
_BASES: Final = (8, 32)
_TOKENS: Final = 128
#: Seconds to start Python, torch and CUDA, and to build a network; the least that steps are timed for is in it.
_START_S: Final = 12.0
_STEPS: Final = 15
#: Multiply-adds a second that a step is taken to reach; only the order of the plan hangs on it.
_RATE: Final = 4e12
#: A network whose estimate is this many times the card says nothing by not fitting.
_HOPELESS: Final = 1.5
#: Weights, gradients and the two moments of Adam, of four bytes each.
_STATE_BYTES: Final = 16
#: What is new is worth: a family, a way to compute anywhere, a way in a family, a network, a way of a network.
_WORTH: Final = {"family": 8.0, "way": 4.0, "family's way": 2.0, "network": 1.0, "network's way": 0.5}


@dataclass(frozen=True)
class Planned:
    """A configuration to measure.

    Attributes:
        family: what must never be on both sides of a split.
        configuration: the step.
        expected_s: rough seconds that it takes.
    """

    family: str
    configuration: Configuration
    expected_s: float


@dataclass(frozen=True)
class _Network:
    family: str
    base: Configuration
    parameters: float
    saved: float
    macs: float

    def bytes_needed(self, asked: Configuration) -> float:
        kept = self.saved * asked.batch if asked.training else 0.0
        return _STATE_BYTES * self.parameters + 4 * kept

    def seconds(self, asked: Configuration) -> float:
        passes = (3 if asked.training else 1) * asked.accumulation
        return _START_S + _STEPS * passes * self.macs * asked.batch / _RATE


def family(configuration: Configuration) -> str:
    """The family of any configuration, for lists that somebody wrote."""
    if configuration.source == "layers":
        return "layers"
    return family_of(configuration.model.rpartition("/")[2])


def plan(catalog: Mapping[str, Mapping[str, Any]], card_mib: float, seed: int) -> list[Planned]:
    """Configurations of every family in the catalog, and of made-up layers.

    Args:
        catalog: entries by ``library/name``, as `predictor_onnx.catalog.load` gives them.
        card_mib: memory of the card.
        seed: chooses among a family's networks.
    """
    chance = random.Random(seed)  # noqa: S311 - reproducible, not secret
    candidates = []
    for network in [*_known(catalog, chance), *_made_up(chance)]:
        if network.bytes_needed(replace(network.base, batch=1)) > _HOPELESS * card_mib * MIB:
            continue
        for way, asked in _ways(network.base, chance):
            if network.bytes_needed(asked) <= _HOPELESS * card_mib * MIB:
                candidates.append((network.family, way, asked, network.seconds(asked)))
    return _most_telling_first(candidates)


def _known(catalog: Mapping[str, Mapping[str, Any]], chance: random.Random) -> Iterator[_Network]:
    families: dict[tuple[str, str], list[_Network]] = defaultdict(list)
    for key in sorted(catalog):
        source, _, name = key.partition("/")
        network = _from_entry(source, name, catalog[key])
        if network is not None:
            families[source, network.family].append(network)
    for _, networks in sorted(families.items()):
        yield from chance.sample(networks, min(_NETWORKS, len(networks)))


def _from_entry(source: str, name: str, entry: Mapping[str, Any]) -> _Network | None:
    shape = tuple(entry.get("input", (_TOKENS,)))
    if source == "transformers":
        at = entry if "input" in entry else entry[f"at_{_TOKENS}"]
        classes = 1000
    else:
        at, classes = entry, int(entry.get("classes", 0))
        # Others give no classes to one image: features, maps, films.
        if not classes or len(shape) != 3 or (source == "torchvision" and shape[1] > 300):
            return None
    base = Configuration(source, name, _BASES[0], shape, classes=classes)
    return _Network(family(base), base, entry["params"], at["saved"], at["macs"])


def _made_up(chance: random.Random) -> Iterator[_Network]:
    for _ in range(2 * _NETWORKS):
        widths = [2 ** chance.randint(6, 12) for _ in range(chance.randint(2, 7))]
        layers: list[list[Any]] = []
        for inner, out in itertools.pairwise(widths):
            layers += [["Linear", inner, out], [chance.choice(["ReLU", "GELU", "Tanh"])]]
        layers.append(["Linear", widths[-1], 10])
        weights = sum(inner * out for inner, out in zip(widths, [*widths[1:], 10], strict=True))
        base = Configuration("layers", json.dumps(layers), _BASES[0], (widths[0],), classes=10)
        yield _Network("layers-mlp", base, weights, 2 * sum(widths[1:]), weights)
    for _ in range(2 * _NETWORKS):
        side, channels = (
            chance.choice([32, 64, 128]),
            [3, *(2 ** chance.randint(4, 8) for _ in range(chance.randint(2, 6)))],
        )
        layers, saved, weights = [], 0, 0
        for inner, out in itertools.pairwise(channels):
            layers += [["Conv2d", inner, out, 3, 1, 1], ["BatchNorm2d", out], ["ReLU"]]
            saved += 3 * out * side * side
            weights += 9 * inner * out
        layers += [["AdaptiveAvgPool2d", 1], ["Flatten"], ["Linear", channels[-1], 10]]
        base = Configuration("layers", json.dumps(layers), _BASES[0], (3, side, side), classes=10)
        yield _Network("layers-convolutions", base, weights, saved, weights * side * side)


_WAYS: Final[dict[str, Callable[[Configuration], Configuration]]] = {
    "tf32": lambda base: replace(base, precision=Precision.TF32),
    "amp-float16": lambda base: replace(base, precision=Precision.AMP_FLOAT16),
    "amp-bfloat16": lambda base: replace(base, precision=Precision.AMP_BFLOAT16),
    "bfloat16": lambda base: replace(base, precision=Precision.BFLOAT16),
    "sgd": lambda base: replace(base, optimizer="sgd"),
    "momentum": lambda base: replace(base, optimizer="sgd", momentum=0.9),
    "adamw": lambda base: replace(base, optimizer="adamw"),
    "accumulation": lambda base: replace(base, accumulation=4),
    "inference": lambda base: replace(base, training=False, optimizer=""),
}
_IMAGE_WAYS: Final[dict[str, Callable[[Configuration], Configuration]]] = {
    "channels-last": lambda base: replace(base, channels_last=True),
    "channels-last amp": lambda base: replace(base, channels_last=True, precision=Precision.AMP_FLOAT16),
}
_LIBRARY_WAYS: Final[dict[str, Callable[[Configuration], Configuration]]] = {
    "eager": lambda base: replace(base, attention="eager"),
    "checkpointing": lambda base: replace(base, checkpointing=True),
}


def _ways(base: Configuration, chance: random.Random) -> Iterator[tuple[str, Configuration]]:
    """Every batch, and every other way to compute at one of two batches."""
    for batch in _BATCHES:
        yield f"batch {batch}", replace(base, batch=batch)
    ways = dict(_WAYS)
    if len(base.shape) == 3:
        ways |= _IMAGE_WAYS
    if base.source in ("timm", "transformers"):
        ways |= _LIBRARY_WAYS
    if len(base.shape) == 1 and base.source == "transformers":
        ways["long"] = lambda short: replace(short, shape=(4 * _TOKENS,))
    for way, change in ways.items():
        yield way, replace(change(base), batch=chance.choice(_BASES))


_Candidate = tuple[str, str, Configuration, float]


def _news(candidate: _Candidate) -> list[tuple[str, ...]]:
    kin, way, asked, _ = candidate
    return [
        ("family", kin), ("way", way), ("family's way", kin, way), ("network", asked.source, asked.model),
        ("network's way", asked.source, asked.model, way),
    ]  # fmt: skip


def _worth(news: tuple[str, ...], times: int) -> float:
    """What is known is worth nothing once more, but a way to compute, which is to be seen in many networks."""
    if news[0] == "way":
        return _WORTH["way"] / (1 + times)
    return 0.0 if times else _WORTH[news[0]]


def _most_telling_first(candidates: Sequence[_Candidate]) -> list[Planned]:
    """Greedy: always what is worth most per second beside what was chosen before.

    What a candidate is worth never grows, so the top of the heap is brought up to date only.
    """
    known: Counter[tuple[str, ...]] = Counter()

    def rank(number: int) -> tuple[float, int]:
        worth = sum(_worth(news, known[news]) for news in _news(candidates[number]))
        return -worth / candidates[number][3], number

    heap = [rank(number) for number in range(len(candidates))]
    heapq.heapify(heap)
    chosen = []
    while heap:
        now = rank(heap[0][1])
        if now > heap[0]:
            heapq.heapreplace(heap, now)
            continue
        number = heapq.heappop(heap)[1]
        known.update(_news(candidates[number]))
        kin, _, asked, seconds = candidates[number]
        chosen.append(Planned(kin, asked, seconds))
    return chosen


class ListRefusedError(Exception):
    """A list of configurations cannot be read; the message names the line."""


def read_list(lines: Sequence[str]) -> list[Planned]:
    """A list that somebody wrote: one JSON object per line, with the fields of `Configuration`; ``#`` begins a comment.

    Raises:
        ListRefusedError: a line is no configuration.
    """
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            configuration = configuration_of(json.loads(line))
        except ValueError as error:
            raise ListRefusedError(f"line {number}: {error}") from error
        found.append(Planned(family(configuration), configuration, _START_S))
    return found
