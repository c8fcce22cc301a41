"""Whether processes can be moved off their cards while they live."""

from __future__ import annotations

from nodedaemon.checkpoint import Ability
from nodedaemon.doctor.findings import Finding, notice, ok

__all__ = ["judge_checkpoints"]

_CHECK = "checkpoint"


def judge_checkpoints(ability: Ability, *, emulated: bool) -> Finding:
    """Returns whether processes can be checkpointed.

    Args:
        ability: what can do it here.
        emulated: whether the cards are.
    """
    if not ability.name:
        text = f"{ability.notice}; shares are still reclaimed by detaching them"
        return notice(_CHECK, text, "uname -m" if emulated else "nvidia-smi mig -lgi")
    return ok(_CHECK, ability.notice or f"{ability.name} checkpoints CUDA processes")
