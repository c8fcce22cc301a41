"""The seam between the daemon and what checkpoints processes: it moves them off their cards, and onto cards again.

A process that is checkpointed lives on, with its memory, its threads and its process id. It holds no card, and what it
asks of one blocks until it is restored.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["Ability", "CheckpointError", "Checkpoints", "Move", "Process", "living", "start_time"]


class CheckpointError(Exception):
    """Processes cannot be checkpointed or restored; the text says which and why."""


@dataclass(frozen=True)
class Ability:
    """What can checkpoint processes here."""

    name: str
    """As `Runtime.checkpoint` tells it; empty when nothing can."""
    notice: str = ""
    """Why nothing can, and what would help; or what is emulated."""


@dataclass(frozen=True)
class Process:
    """A process. Its id and when it began are together never used again."""

    pid: int
    started: str
    """In clock ticks since the host was started, as /proc/PID/stat has it."""


@dataclass(frozen=True)
class Move:
    """One card that processes are moved to, and which one they were taken off."""

    old_uuid: str
    new_uuid: str
    paths: Mapping[str, str]
    """Where the processes find each node of the new card, by the name of the node of the old one."""


class Checkpoints(Protocol):
    """Checkpoints and restores processes. Every operation may be repeated: what is so already stays so."""

    def probe(self) -> Ability:
        """Returns what can checkpoint processes of this node's slices, without touching any."""

    async def checkpoint(self, init: int, processes: Collection[Process], nodes: Mapping[str, Path]) -> None:
        """Takes processes off their cards. A process that has ended is none.

        Args:
            init: init process of their container.
            processes: those that hold cards.
            nodes: where each node of the cards is on the host, by name.

        Raises:
            CheckpointError: it cannot be done. `restore` with the same cards makes all be as before.
        """

    async def restore(self, init: int, processes: Collection[Process], moves: Sequence[Move]) -> None:
        """Moves checkpointed processes onto cards. A process that has ended, or that is on its card, is none.

        Args:
            init: init process of their container.
            processes: those that were checkpointed.
            moves: where to.

        Raises:
            CheckpointError: it cannot be done; what is not restored stays checkpointed.
        """

    async def wanted(self, init: int, processes: Collection[Process]) -> Process | None:
        """Waits until a checkpointed process asks for its card, and returns it.

        Returns:
            The process; None when all have ended, or when this cannot be told here.
        """


def start_time(pid: int) -> str:
    """Returns when a process began, in clock ticks since the host was started.

    Raises:
        OSError: it has ended.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(errno.ESRCH, "it has ended, and nobody has waited for it yet")
    return fields[19]


def living(processes: Collection[Process]) -> list[Process]:
    """Returns those that have not ended."""
    found = []
    for one in processes:
        try:
            if start_time(one.pid) == one.started:
                found.append(one)
        except OSError:
            continue
    return found
