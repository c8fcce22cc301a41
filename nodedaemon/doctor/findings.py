"""What was found on this host, and what that means for serving. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Ability", "Finding", "Level", "Verdict", "advice", "notice", "ok", "problem", "unknown", "verdict"]


class Level(StrEnum):
    """How a check came out."""

    OK = "ok"
    NOTICE = "notice"
    """Works, but with something missing or worth knowing."""
    PROBLEM = "problem"
    UNKNOWN = "unknown"
    """It could not be looked at: neither ok nor a problem."""


class Ability(StrEnum):
    """What a daemon on this host may be able to do."""

    SERVE = "serve"
    """Run at all."""
    CARDS = "cards"
    """Cut real GPUs."""
    EMULATION = "emulation"
    """Emulate the cards that were asked for."""
    CONTAINERS = "containers"
    """Run rootless containers."""
    PROCESSES = "processes"
    """Run plain processes beside emulated cards."""


@dataclass(frozen=True)
class Finding:
    """How one check came out.

    Raises:
        ValueError: it is not ok and does not say what to do.
    """

    check: str
    """Name of the check, for programs."""
    level: Level
    text: str
    """One sentence."""
    command: str = ""
    """What to type next; empty only when all is well."""
    needed_for: tuple[Ability, ...] = ()
    """What does not work when this is a problem, and cannot be promised when it is unknown."""

    def __post_init__(self) -> None:
        if self.level is not Level.OK and not self.command:
            raise ValueError(f"{self.check}: say what to do about it")


def ok(check: str, text: str) -> Finding:
    """Returns that all is well."""
    return Finding(check, Level.OK, text)


def notice(check: str, text: str, command: str) -> Finding:
    """Returns something worth knowing that stops nothing."""
    return Finding(check, Level.NOTICE, text, command)


def problem(check: str, text: str, command: str, *needed_for: Ability) -> Finding:
    """Returns that something does not work."""
    return Finding(check, Level.PROBLEM, text, command, needed_for)


def unknown(check: str, text: str, command: str, *needed_for: Ability) -> Finding:
    """Returns that something could not be looked at."""
    return Finding(check, Level.UNKNOWN, text, command, needed_for)


def advice(message: str, otherwise: str) -> tuple[str, str]:
    """Splits an error's sentence into what is wrong and the command in backticks that mends it.

    Args:
        message: the sentence.
        otherwise: what to type when it names no command.

    Returns:
        What is wrong, and what to type.
    """
    parts = message.split("`")
    if len(parts) < 3:
        return message, otherwise
    return parts[0].rpartition(":")[0] or message, parts[-2]


@dataclass(frozen=True)
class Verdict:
    """Whether this host can serve as asked."""

    can_serve: bool
    text: str
    """One sentence."""


def verdict(findings: Sequence[Finding], *, emulated: bool) -> Verdict:
    """Says whether a daemon can serve on this host.

    Args:
        findings: all of them.
        emulated: whether emulated cards were asked for, rather than the real ones.
    """
    if emulated:
        return _emulated(findings)
    ways = (Ability.SERVE, Ability.CARDS, Ability.CONTAINERS)
    broken, unseen = _checks(findings, Level.PROBLEM, ways), _checks(findings, Level.UNKNOWN, ways)
    if broken:
        return Verdict(False, f"This host cannot serve real cards: see {_names(broken)}.")
    if unseen:
        return Verdict(False, f"It cannot be said whether this host can serve real cards: see {_names(unseen)}.")
    return Verdict(True, "This host can serve real cards.")


def _emulated(findings: Sequence[Finding]) -> Verdict:
    base = (Ability.SERVE, Ability.EMULATION)
    broken = _checks(findings, Level.PROBLEM, base)
    if broken:
        return Verdict(False, f"This host cannot serve emulated cards: see {_names(broken)}.")
    why_no_containers = _checks(findings, Level.PROBLEM, (Ability.CONTAINERS,))
    unseen = _checks(findings, Level.UNKNOWN, (*base, Ability.CONTAINERS))
    if not why_no_containers:
        if unseen:
            return Verdict(
                False,
                f"It cannot be said whether this host can serve emulated cards with containers: see {_names(unseen)}.",
            )
        return Verdict(True, "This host can serve emulated cards with containers.")
    why_no_processes = _checks(findings, Level.PROBLEM, (Ability.PROCESSES,))
    if why_no_processes:
        return Verdict(
            False, f"This host cannot serve emulated cards: see {_names([*why_no_containers, *why_no_processes])}."
        )
    unseen = _checks(findings, Level.UNKNOWN, (*base, Ability.PROCESSES))
    if unseen:
        return Verdict(
            False, f"It cannot be said whether this host can serve emulated cards with processes: see {_names(unseen)}."
        )
    return Verdict(
        True,
        f"This host can serve emulated cards with processes only, without isolation: see {_names(why_no_containers)}.",
    )


def _checks(findings: Iterable[Finding], level: Level, abilities: Iterable[Ability]) -> list[str]:
    wanted = set(abilities)
    return [one.check for one in findings if one.level is level and wanted & set(one.needed_for)]


def _names(checks: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(checks))
