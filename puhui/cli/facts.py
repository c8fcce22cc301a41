"""What was read from the code, as people say it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from puhui.cli.words import size
from puhui.v1.prediction_pb2 import CodeFact

__all__ = ["facts_line", "number"]


def facts_line(facts: Iterable[CodeFact]) -> str:
    """Returns the facts in one line, with units; what is zero, false or empty is left out."""
    known = list(facts)
    values = {fact.name: fact.value for fact in known}
    if values.get("trained_parameters") == values.get("parameters"):
        known = [fact for fact in known if fact.name != "trained_parameters"]
    return ", ".join(filter(None, map(_said, known)))


def number(value: float) -> str:
    """Returns a number, readable: "932 k", "25.6 M", "1.0 T"."""
    for unit in ("", " k", " M", " G", " T"):
        if value < 999.5:
            return (f"{value:.0f}" if value >= 100 or not unit else f"{value:.1f}") + unit
        value /= 1000
    return f"{value:.1f} P"


_SAYERS: dict[str, Callable[[float], str]] = {
    "parameters": lambda value: f"{number(value)} parameters",
    "trained_parameters": lambda value: f"{number(value)} of them trained",
    "activation_bytes": lambda value: f"activations {size(value)}",
    "data_bytes": lambda value: f"data {size(value)}",
    "macs_per_step": lambda value: f"{number(value)} MAC per step",
    "guesses": lambda value: f"{value:.0f} guessed sizes" if value != 1 else "1 guessed size",
    "batch": lambda value: f"batch {value:.0f}",
}
_FLAGS = {"training": "training", "gradient_checkpointing": "gradient checkpointing", "beyond_training": ""}


def _said(fact: CodeFact) -> str:
    if fact.name in _FLAGS:
        return _FLAGS[fact.name] if fact.value == "True" else ""
    try:
        value = float(fact.value)
    except ValueError:
        known = fact.value not in ("", "False", "None")
        return f"{fact.name.replace('_', ' ')} {fact.value}".removesuffix(" True") if known else ""
    if not value:
        return ""
    say = _SAYERS.get(fact.name)
    return say(value) if say is not None else f"{fact.name.replace('_', ' ')} {fact.value}"
