"""What a dry run found, as one line of JSON.

The line is written by a stranger's process: nothing in it is believed unread.
"""

from __future__ import annotations

import enum
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from predictor_onnx.traced_step import TracedStep

#: Bytes of a line beyond which it is no finding.
MOST_BYTES: Final = 1 << 16
_MOST: Final = 1e18
_MOST_REASON: Final = 300
_CATEGORIES: Final = frozenset({"parameter", "data", "activation", "gradient", "optimizer", "temporary"})


class Ending(enum.Enum):
    """How a dry run ended."""

    #: As many optimizer steps as were asked for were seen.
    STEPS_SEEN = "steps_seen"
    #: The program ended by itself after it had trained for fewer steps.
    PROGRAM_ENDED = "program_ended"
    #: The program ran a network, and trained none.
    INFERENCE_ONLY = "inference_only"
    #: The program used no card.
    NO_CARD_USED = "no_card_used"
    #: The program, or what runs it, failed.
    FAILED = "failed"


class NotAFindingError(ValueError):
    """A line is no finding; the message says what is wrong."""


@dataclass(frozen=True)
class Finding:
    """How a dry run ended, and what it saw.

    Attributes:
        ending: how it ended.
        reason: why, in a sentence; empty when there is nothing to say.
        steps: optimizer steps that were seen; forward passes, when there were none.
        step: what one of them needs and does; None when none was seen.
    """

    ending: Ending
    reason: str = ""
    steps: int = 0
    step: TracedStep | None = None

    def to_json(self) -> str:
        """One line."""
        step = None if self.step is None else asdict(self.step)
        line = {"ending": self.ending.value, "reason": self.reason[:_MOST_REASON], "steps": self.steps, "step": step}
        return json.dumps(line)

    @classmethod
    def from_json(cls, line: bytes | str) -> Finding:
        """The finding that a line tells.

        Raises:
            NotAFindingError: it is too long, of another form, or tells what no step can be.
        """
        if len(line) > MOST_BYTES:
            raise NotAFindingError(f"a finding of {len(line)} bytes is too long")
        try:
            told = json.loads(line)
            ending = Ending(told["ending"])
            steps, reason = told["steps"], told["reason"]
            step = None if told["step"] is None else _step(told["step"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise NotAFindingError(f"this is no finding: {error}") from error
        if type(steps) is not int or not 0 <= steps <= _MOST or not isinstance(reason, str):
            raise NotAFindingError("its steps or its reason are none")
        clean = "".join(letter if letter.isprintable() else " " for letter in reason[:_MOST_REASON])
        return cls(ending, clean, steps, step)


def _step(told: Any) -> TracedStep:
    if not isinstance(told, dict) or set(told) != {field.name for field in fields(TracedStep)}:
        raise NotAFindingError("a step has other fields")
    live = told["live_mib"]
    if not isinstance(live, dict) or set(live) != _CATEGORIES:
        raise NotAFindingError("what lives is told by other categories")
    for name, value in ({**told, **live}).items():
        whole = name in ("parameters", "convolutions", "pointwise", "depthwise", "kernels")
        kinds = (int,) if whole else (int, float)
        if name != "live_mib" and not (type(value) in kinds and math.isfinite(value) and 0 <= value <= _MOST):
            raise NotAFindingError(f"{name} is no number that it can be")
    if told["pointwise"] > told["convolutions"] or told["depthwise"] > told["convolutions"]:
        raise NotAFindingError("more kinds of convolutions than convolutions")
    if max(told["largest_mib"], told["update_mib"]) > 1.01 * told["allocated_mib"] + 1:
        raise NotAFindingError("a part is larger than the whole")
    if told["allocated_mib"] > 1.01 * min(told["reserved_mib"], told["plain_reserved_mib"]) + 1:
        raise NotAFindingError("more is allocated than reserved")
    return TracedStep(**told)
