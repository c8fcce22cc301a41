"""How much is asked of peers at most, and when again after a refusal. Pure: time comes in.

Whatever happens, a centre asks for so many offers a second, and for so many at once, of all peers and of each. Of
jobs with one need, one is asked for at first; each promise that comes lets one more be asked for at once, and a
refusal brings that back to one. After refusals in a row, the time until the next try doubles; it is spread over all
of that time ("full jitter": Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from controlplane.forwarding import Rules

__all__ = ["Budget"]

_MOST_REMEMBERED = 4096
_MOST_DOUBLINGS = 16


@dataclass
class _Line:
    """Jobs with one need, at one peer."""

    window: int = 1
    """Offers that may be asked for at once."""
    in_flight: int = 0
    refusals: int = 0
    """In a row."""
    not_before: float = 0.0
    promised_s: float = 0.0
    """What was promised last."""
    promised_until: float = 0.0
    """So long that is taken to hold."""
    no_room: bool = False
    """It was refused for want of room, about which a new word of the peer may say something else."""


class Budget:
    """What may be asked for now."""

    def __init__(self, rules: Rules, chance: random.Random) -> None:
        self._rules = rules
        self._chance = chance
        self._in_flight: Counter[str] = Counter()
        self._lines: dict[tuple[str, Hashable], _Line] = {}
        self._unreachable: dict[str, tuple[int, float]] = {}
        """Failures in a row, and when to try again, by peer."""
        self._tokens, self._filled_at = rules.offers_at_once, 0.0

    @property
    def in_flight(self) -> int:
        """Offers that are being asked for."""
        return self._in_flight.total()

    def in_flight_of(self, peer: str) -> int:
        """Offers that are being asked for of one peer."""
        return self._in_flight[peer]

    def wait_s(self, at: float) -> float:
        """Returns how long nothing more may be asked of anybody, in seconds; infinite: until something has come."""
        rules = self._rules
        if self.in_flight >= rules.offers_in_flight:
            return float("inf")
        if at > self._filled_at:
            filled = self._tokens + (at - self._filled_at) * rules.offers_a_second
            self._tokens, self._filled_at = min(rules.offers_at_once, filled), at
        return 0.0 if self._tokens >= 1 else (1 - self._tokens) / rules.offers_a_second

    def wait_for_s(self, at: float, peer: str, need: Hashable) -> float:
        """Returns how long a peer is not to be asked for a need; infinite: until something has come."""
        line = self._lines.get((peer, need))
        _, again_at = self._unreachable.get(peer, (0, 0.0))
        if self._in_flight[peer] >= self._rules.offers_in_flight_of_peer:
            return float("inf")
        if line is not None and line.in_flight >= line.window:
            return float("inf")
        return max(0.0, again_at - at, line.not_before - at if line is not None else 0.0)

    def promised_s(self, at: float, peer: str, need: Hashable) -> tuple[float, float] | None:
        """Returns what a peer is known to promise for a need, and how long that holds; None when it must be asked."""
        line = self._lines.get((peer, need))
        return (line.promised_s, line.promised_until - at) if line is not None and line.promised_until > at else None

    def ask(self, peer: str, need: Hashable) -> None:
        """An offer is asked for."""
        self._tokens -= 1
        self._in_flight[peer] += 1
        self._line(peer, need).in_flight += 1

    def accepted(self, peer: str, need: Hashable) -> None:
        """It was given."""
        line = self._answered(peer, need)
        self._unreachable.pop(peer, None)
        line.refusals, line.not_before, line.no_room = 0, 0.0, False
        line.window = min(line.window + 1, self._rules.offers_in_flight_of_peer)

    def too_late(self, at: float, peer: str, need: Hashable, promised_s: float) -> None:
        """What was promised is not worth it; for a while, the peer would promise the same again."""
        line = self._line(peer, need)
        holds_s = self._rules.promise_holds_s + self._rules.promise_holds_share * promised_s
        line.window, line.promised_s = 1, promised_s
        line.promised_until = at + min(self._rules.most_back_off_s, holds_s) * self._chance.uniform(0.5, 1.5)

    def refused(self, at: float, peer: str, need: Hashable, retry_after_s: float, *, no_room: bool) -> None:
        """It was refused, as it will be for every job with this need until `retry_after_s` have passed."""
        line = self._answered(peer, need)
        self._unreachable.pop(peer, None)
        line.window, line.no_room = 1, no_room
        line.not_before = at + max(retry_after_s, self._back_off_s(line.refusals))
        line.refusals += 1

    def refused_one(self, peer: str, need: Hashable) -> None:
        """It was refused for what only this job is."""
        self._answered(peer, need)
        self._unreachable.pop(peer, None)

    def failed(self, at: float, peer: str, need: Hashable, retry_after_s: float = 0.0) -> None:
        """The peer did not answer, or wants to be asked nothing for a while."""
        self._answered(peer, need).window = 1
        failures, _ = self._unreachable.get(peer, (0, 0.0))
        self._unreachable[peer] = failures + 1, at + max(retry_after_s, self._back_off_s(failures))

    def news(self, at: float, peer: str) -> None:
        """A peer has told its capacity: what it had no room for, it may have room for now."""
        for (name, _), line in self._lines.items():
            if name == peer and line.no_room:
                line.not_before = min(line.not_before, at + self._chance.uniform(0.0, self._rules.back_off_s))
                line.no_room = False
                line.promised_until = min(line.promised_until, line.not_before)

    def _back_off_s(self, refusals: int) -> float:
        rules = self._rules
        most_s = min(rules.most_back_off_s, rules.back_off_s * 2.0 ** min(refusals, _MOST_DOUBLINGS))
        return self._chance.uniform(0.0, most_s)

    def _answered(self, peer: str, need: Hashable) -> _Line:
        line = self._line(peer, need)
        line.in_flight -= 1
        self._in_flight[peer] -= 1
        return line

    def _line(self, peer: str, need: Hashable) -> _Line:
        line = self._lines.get((peer, need))
        if line is None:
            if len(self._lines) >= _MOST_REMEMBERED:
                self._lines = {key: one for key, one in self._lines.items() if one.in_flight}
            line = self._lines[peer, need] = _Line()
        return line
