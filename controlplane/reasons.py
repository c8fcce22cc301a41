"""Why a job waits, in sentences for people."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from controlplane.eviction import Eviction
from controlplane.fleet import Geometry, GpuView
from controlplane.placement import most_slices
from controlplane.queued_job import QueuedJob
from controlplane.room import Room
from controlplane.sizing import largest
from puhui.v1.prediction_pb2 import ProfileChoice

__all__ = ["Reasons", "ordinal", "suffix"]


class Reasons:
    """What jobs wait for. Those with the same need on the same nodes wait for the same."""

    def __init__(self, gpus: Sequence[GpuView], geometries: Sequence[Geometry], nodes_known: int) -> None:
        self._gpus = gpus
        self._geometries = geometries
        self._nodes_known = nodes_known
        self._made: dict[Hashable, str] = {}

    def of(self, job: QueuedJob, wanted: Sequence[ProfileChoice], room: Room) -> str:
        """Returns what a job waits for.

        Args:
            job: the job.
            wanted: the profiles that satisfy it, on the GPUs of this centre.
            room: what is free now.
        """
        key = (job.need, job.nodes)
        if key not in self._made:
            self._made[key] = self._make(job, wanted, room)
        return self._made[key]

    def away(self, node: str) -> str:
        """Returns what a job waits for whose container lives on a node on which nothing can be placed now."""
        name = next((gpu.node_name for gpu in self._gpus if gpu.node_id == node), node)
        return f"waits for {name}, where its container lives: nothing can be placed there until it is in contact again"

    def _make(self, job: QueuedJob, wanted: Sequence[ProfileChoice], room: Room) -> str:
        if not self._nodes_known:
            return "waits for a node: none has joined this centre yet"
        if not self._gpus:
            return "waits for a GPU: no node of this centre has one that can be cut; see `puhui nodes`"
        if not wanted:
            if job.gpu_model:
                return (
                    f"waits for {job.profile or f'{job.required_mib} MiB'} on a {job.gpu_model}, which is what it was "
                    "taken from and must go back to: no such GPU of this centre offers it now"
                )
            if job.profile:
                return f"waits for {job.profile}: no GPU of this centre offers it now"
            top = largest(self._geometries)
            most = f"{top.profile} with {top.memory_mib} MiB" if top is not None else "none"
            return f"waits for {job.required_mib} MiB: no card here is that large (the largest slice is {most})"
        said = [one for choice in wanted if (one := self._one(choice, job.nodes[-1], room))]
        if not said:
            names = " or ".join(dict.fromkeys(choice.profile for choice in wanted))
            return f"waits for {names}: no GPU of the node where its container lives offers it"
        return "waits for " + " or ".join(said)

    def _one(self, choice: ProfileChoice, node: str, room: Room) -> str:
        gpus = [
            gpu
            for gpu in self._gpus
            if gpu.geometry.gpu_model == choice.gpu_model
            and choice.profile in gpu.geometry.by_profile
            and node in {"", gpu.node_id}
        ]
        if not gpus:
            return ""
        usable = [(gpu, gpu.geometry.by_profile[choice.profile]) for gpu in gpus if gpu.usable]
        total = sum(most_slices(shape, 0) for _, shape in usable)
        free = sum(
            max(0, min(most_slices(shape, room.held(gpu)), shape.max_instances - room.count(gpu, shape)))
            for gpu, shape in usable
        )
        away = f" ({len(gpus) - len(usable)} more out of contact)" if len(usable) < len(gpus) else ""
        where = f" of {gpus[0].node_name}" if node else ""
        return f"{choice.profile}: {free} of {total} placements free on {len(usable)} {choice.gpu_model}{where}{away}"


def ordinal(number: int) -> str:
    """Returns a place in a queue: "1st", "2nd", "11th"."""
    ending = "th" if number % 100 in {11, 12, 13} else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def suffix(eviction: Eviction | None, *, kept: bool, rest: bool) -> str:
    """Returns what is being done about it, to be appended.

    Args:
        eviction: the shares that leave for it.
        kept: room is kept for it.
        rest: it goes on by itself.
    """
    if rest:
        return "; it goes on by itself when there is room that nobody else waits for"
    if eviction is not None:
        count = len(eviction.shares) + len(eviction.awaited)
        what = "one idle share is" if count == 1 else f"{count} idle shares are"
        where = f"GPU {eviction.decision.gpu.gpu_index} of {eviction.decision.gpu.node_name}"
        return f"; {what} being reclaimed for it on {where}"
    return "; the room that becomes free soonest is kept for it" if kept else ""
