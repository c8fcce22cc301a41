"""The warm slices of a fleet while a plan is made, and which of them a job takes over."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from controlplane.fleet import GpuView, Use
from controlplane.placement import Decision
from controlplane.reservations import AttemptKey
from puhui.v1.prediction_pb2 import ProfileChoice

__all__ = ["WarmSlices"]

_Warm = tuple[GpuView, Use]
_IsOpen = Callable[[GpuView, Use], bool]


class WarmSlices:
    """Warm slices, by tenant. Each is taken over once."""

    def __init__(self, gpus: Iterable[GpuView]) -> None:
        self._gpus = gpus
        self.taken: set[AttemptKey] = set()
        """Whose slice is taken over."""

    def take(self, key: AttemptKey) -> None:
        """Notes that a slice is taken over."""
        self.taken.add(key)

    def among(
        self,
        gpus: Iterable[GpuView],
        choices: Sequence[ProfileChoice],
        tenant: str,
        job_id: str,
        is_open: _IsOpen,
    ) -> Decision | None:
        """Returns the slice on one of `gpus` that a job takes over, see `Room.warm`."""
        return self._first(
            ((gpu, use) for gpu in gpus for use in gpu.warm if use.tenant == tenant), choices, job_id, is_open
        )

    def anywhere(self, choices: Sequence[ProfileChoice], tenant: str, job_id: str, is_open: _IsOpen) -> Decision | None:
        """Returns the slice in the whole fleet that a job takes over, see `Room.warm`."""
        heads = (self._head((tenant, choice.gpu_model, choice.profile), is_open) for choice in choices)
        found = (*self._by_job.get((tenant, job_id), ()), *(head for head in heads if head is not None))
        return self._first(found, choices, job_id, is_open)

    def _first(
        self, found: Iterable[_Warm], choices: Sequence[ProfileChoice], job_id: str, is_open: _IsOpen
    ) -> Decision | None:
        wanted = {(choice.gpu_model, choice.profile) for choice in choices}
        fitting = (
            (gpu, use)
            for gpu, use in found
            if (gpu.geometry.gpu_model, use.profile) in wanted and use.key not in self.taken and is_open(gpu, use)
        )
        best = min(fitting, key=lambda one: (not _is_of(one[1], job_id), *_soonest(one)), default=None)
        if best is None:
            return None
        gpu, use = best
        return Decision(gpu, gpu.geometry.by_profile[use.profile], use.start, use.key, use.slice_uuid)

    def _head(self, kind: tuple[str, str, str], is_open: _IsOpen) -> _Warm | None:
        queue = self._by_kind.get(kind)
        while queue:
            gpu, use = queue[0]
            # What is taken, leaves or is spoken for stays so for the rest of the plan; what is reserved is left to it.
            if use.key not in self.taken and is_open(gpu, use):
                return queue[0]
            queue.popleft()
        return None

    @functools.cached_property
    def _by_kind(self) -> dict[tuple[str, str, str], deque[_Warm]]:
        found: dict[tuple[str, str, str], list[_Warm]] = {}
        for gpu in self._gpus:
            for use in gpu.warm:
                found.setdefault((use.tenant, gpu.geometry.gpu_model, use.profile), []).append((gpu, use))
        return {kind: deque(sorted(slices, key=_soonest)) for kind, slices in found.items()}

    @functools.cached_property
    def _by_job(self) -> dict[tuple[str, str], list[_Warm]]:
        index: dict[tuple[str, str], list[_Warm]] = {}
        for gpu in self._gpus:
            for use in gpu.warm:
                if use.key is not None:
                    index.setdefault((use.tenant, use.key[0]), []).append((gpu, use))
        return index


def _is_of(use: Use, job_id: str) -> bool:
    return use.key is not None and use.key[0] == job_id


def _soonest(warm: _Warm) -> tuple[float, str, int, int]:
    """Returns what puts warm slices in the order in which they would be dropped."""
    gpu, use = warm
    return use.warm_until, gpu.node_name, gpu.gpu_index, use.start
