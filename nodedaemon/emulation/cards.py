"""Which cards an emulated node has, and how to write that down: ``H100-80GB-SXM5:4,A30-24GB``."""

from collections.abc import Iterable
from dataclasses import dataclass

from nodedaemon.emulation.geometry import card_models

_MOST_CARDS = 16


class UnknownCardError(ValueError):
    """The text names a card that is not known, or a number of them that makes no sense."""


@dataclass(frozen=True, slots=True)
class CardSpec:
    """Some cards of one model.

    Attributes:
        model: A configuration name of ``geometry.json``, such as ``A100-80GB``.
        count: How many, at least 1.
    """

    model: str
    count: int = 1

    def __post_init__(self) -> None:
        if self.model not in card_models():
            known = ", ".join(card_models())
            raise UnknownCardError(f"No card model is called {self.model!r}. Known models: {known}.")
        if not 1 <= self.count <= _MOST_CARDS:
            raise UnknownCardError(
                f"{self.count} cards of {self.model} cannot be emulated;"
                f" ask for 1 to {_MOST_CARDS}, such as {self.model}:2."
            )


def parse_cards(text: str) -> tuple[CardSpec, ...]:
    """Read a list of cards.

    Args:
        text: ``MODEL`` or ``MODEL:COUNT``, separated by commas.

    Returns:
        The cards, in the order of the text, which is the order of their NVML indices.

    Raises:
        UnknownCardError: A ValueError whose sentence lists the known models.
    """
    specs = []
    for part in text.split(","):
        model, colon, count = part.strip().partition(":")
        if colon and not count.isdecimal():
            raise UnknownCardError(
                f"{part.strip()!r} has no count after the colon; write {model or 'MODEL'}:2,"
                f" where MODEL is one of {', '.join(card_models())}."
            )
        specs.append(CardSpec(model, int(count) if colon else 1))
    if sum(spec.count for spec in specs) > _MOST_CARDS:
        raise UnknownCardError(f"One emulated node has at most {_MOST_CARDS} cards.")
    return tuple(specs)


def models_of(cards: Iterable[CardSpec]) -> list[str]:
    """Return one model name per card, in index order."""
    return [spec.model for spec in cards for _ in range(spec.count)]
