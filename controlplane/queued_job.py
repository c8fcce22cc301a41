"""A job that waits, as far as a plan needs to know it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

__all__ = ["QueuedJob"]


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits, as far as the plan needs to know it."""

    id: str
    priority: int
    sequence: int
    profile: str
    """The profile that is wanted by name; "" for any with enough memory."""
    required_mib: int
    since: float
    """Waits since, in seconds since the epoch."""
    not_before: float = 0.0
    """Not to be placed before this time: the last try failed at its node."""
    tenant: str = ""
    """Whose it is; a warm slice goes only to a job of its own tenant."""
    person: bool = False
    """A person waits: for a run instruction, or for a resume that was asked for."""
    home: str = ""
    """Id of the node where its container lives; "" when it has none yet."""
    may_move: bool = False
    """It may go to another node when a person waits and its home has no room for it."""
    gpu_model: str = ""
    """Only on GPUs of this model, because what it had on one is restored from host memory; "" for any."""
    rest: bool = False
    """A reclaimed batch job that would go on by itself: takes only room that nobody else waits for, evicts nothing."""

    @property
    def rank(self) -> tuple[bool, bool, int, int]:
        """Position in the queue; the smallest is first: persons first, rest last."""
        return not self.person, self.rest, -self.priority, self.sequence

    @property
    def need(self) -> Hashable:
        """Jobs with the same need fit, or do not fit, together, on the same nodes."""
        return self.profile, self.required_mib, self.gpu_model

    @property
    def nodes(self) -> tuple[str, ...]:
        """Where it may go, first where it goes first: ids of nodes; "" for any."""
        if not self.home:
            return ("",)
        return (self.home, "") if self.person and self.may_move and not self.rest else (self.home,)
