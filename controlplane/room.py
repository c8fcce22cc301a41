"""The room of a fleet while a plan is made: what the plan gives away is no longer there for the rest of it.

A question about one node looks at that node's GPUs only. A question about the whole fleet looks at GPUs that are alike
together, or, for evictions and for room to keep, at a heap for each need that is brought up to date where the plan
changed something: many decisions of one plan do not cost more because the fleet is larger.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from controlplane.eviction import Eviction, Promise, way_on
from controlplane.fleet import Geometry, GpuKey, GpuView, Shape, Use, span
from controlplane.placement import Decision, fit
from controlplane.reservations import AttemptKey
from controlplane.warm_slices import WarmSlices
from puhui.v1.prediction_pb2 import ProfileChoice

__all__ = ["Room"]

_Found = TypeVar("_Found")
_Ranked = tuple[tuple[Any, ...], _Found]
"""The smallest rank is the best."""


class Room:
    """What is free, warm, or can be had by evicting, on the GPUs on which something may be placed.

    `node` is, throughout, the id of the only node that is asked about; "" for any. Room that is reserved, because
    shares leave it for a job, is not there for the others, unless they press: then who comes first takes it.
    """

    def __init__(self, gpus: Iterable[GpuView]) -> None:
        self._gpus: dict[GpuKey, GpuView] = {}
        self._of_node: dict[str, list[GpuView]] = {}
        self._alike: dict[tuple[Geometry, int], dict[GpuKey, GpuView]] = {}
        self._closed: dict[GpuKey, int] = {}
        """Memory slices that are not free, or are spoken for, or reserved."""
        self._spoken: dict[GpuKey, int] = {}
        """Memory slices that the plan has given away or keeps, whoever is on them now."""
        self._reserved: dict[GpuKey, dict[str, int]] = {}
        """Memory slices that are reserved, by the job that waits for them."""
        self._taken: dict[tuple[GpuKey, str], int] = {}
        self._leaving: set[AttemptKey] = set()
        self._wishes: dict[str, set[tuple[str, str]]] = {}
        self._best_of: dict[Hashable, _BestFirst[Any]] = {}
        for gpu in gpus:
            if gpu.usable:
                self._gpus[gpu.key] = gpu
                self._of_node.setdefault(gpu.node_id, []).append(gpu)
                self._closed[gpu.key] = gpu.held
                self._alike.setdefault((gpu.geometry, gpu.held), {})[gpu.key] = gpu
        self._warm = WarmSlices(self._gpus.values())

    def usable(self, node: str) -> bool:
        """Returns whether something may be placed on a node."""
        return node in self._of_node

    def held(self, gpu: GpuView) -> int:
        """Returns the bit mask of memory slices of a usable GPU that are not free for the rest of the plan."""
        return self._closed[gpu.key]

    def count(self, gpu: GpuView, shape: Shape) -> int:
        """Returns how many slices of a shape are held on a GPU, with those of the plan."""
        return gpu.count(shape.profile) + self._promised(gpu, shape)

    # -- where a slice could go

    def warm(
        self, choices: Sequence[ProfileChoice], tenant: str, job_id: str, node: str = "", *, rest: bool = False
    ) -> Decision | None:
        """Returns the warm slice that a job takes over; None when its tenant has none of a profile in `choices`.

        The job's own comes first. Then the one that would be dropped soonest: any job that can use it could use one
        that is kept for longer instead, so that this order loses the fewest slices.

        Args:
            choices: the profiles that satisfy the job.
            tenant: whose it is.
            job_id: the job.
            node: where.
            rest: not where a job that waits could go, see `wish`.
        """

        def is_open(gpu: GpuView, use: Use) -> bool:
            return use.key not in self._leaving and not use.mask & self._unavailable(gpu)

        def is_open_at_rest(gpu: GpuView, use: Use) -> bool:
            return is_open(gpu, use) and not use.mask & self._wished(gpu)

        if node or rest:
            return self._warm.among(self._on(node), choices, tenant, job_id, is_open_at_rest if rest else is_open)
        return self._warm.anywhere(choices, tenant, job_id, is_open)

    def best(self, choices: Sequence[ProfileChoice], node: str = "", *, press: bool = False) -> Decision | None:
        """Returns where a slice of the first choice that fits into free room goes; None when none fits.

        Args:
            choices: the profiles that satisfy the job, the best first.
            node: where.
            press: only where room is reserved for others, which they lose then.
        """
        for choice in choices:
            if press:
                found = self._best_on(self._reserved_on(node), choice, self._without_reserves)
            elif node:
                found = self._best_on(self._on(node), choice, self.held)
            else:
                found = self._best(choice)
            if found is not None:
                return found
        return None

    def at_rest(self, choices: Sequence[ProfileChoice], node: str = "") -> Decision | None:
        """Returns free room for a slice where no job that waits could go, see `wish`; None when there is none."""
        for choice in choices:
            found = self._best_on(self._on(node), choice, lambda gpu: self._closed[gpu.key] | self._wished(gpu))
            if found is not None:
                return found
        return None

    def eviction(self, choices: Sequence[ProfileChoice], node: str = "", *, press: bool = False) -> Eviction | None:
        """Returns the cheapest placement that becomes free when idle shares leave; None when there is none.

        Args:
            choices: the profiles that satisfy the job.
            node: where.
            press: only where room is reserved for others, which they lose then.
        """
        if press:
            found = [self._way(gpu, choices, self._spoken.get(gpu.key, 0)) for gpu in self._reserved_on(node)]
            return min((way for way in found if way is not None), key=lambda way: way[0], default=(None, None))[1]
        return self._cheapest("eviction", choices, node, lambda gpu: self._way(gpu, choices, self._unavailable(gpu)))

    def nearest(self, choices: Sequence[ProfileChoice], node: str = "") -> tuple[GpuView, int] | None:
        """Returns the GPU and mask at which one of `choices` is likely to fit soonest.

        That is where the fewest memory slices have still to become free: the fewest that nobody here can free, then
        the fewest that are in use. Room that the plan has given away or keeps is not counted on.
        """
        return self._cheapest("nearest", choices, node, lambda gpu: self._near(gpu, choices))

    # -- room that an earlier plan promised

    def reserve(self, job_id: str, promise: Promise) -> bool:
        """Reserves room that shares leave for a job; returns whether that can still be."""
        gpu = self._gpus.get(promise.gpu)
        shape = gpu.geometry.by_profile.get(promise.profile) if gpu is not None else None
        if gpu is None or shape is None or promise.start not in shape.starts:
            return False
        mask = span(promise.start, shape.size)
        # Whatever does not leave has made the promise void; a share that stays after all is one of them.
        if mask & (gpu.held & ~self._vacated(gpu)) or mask & self._unavailable(gpu):
            return False
        self._reserved.setdefault(gpu.key, {})[job_id] = mask
        self._refresh(gpu)
        return True

    def redeem(self, job_id: str, promise: Promise) -> Decision | Eviction | None:
        """Ends a job's reserve, and returns what has become of it: room, or room that shares still leave.

        None when it is neither, or when who came first has taken it.
        """
        gpu = self._gpus[promise.gpu]
        if self._reserved.get(gpu.key, {}).pop(job_id, None) is None:
            return None
        self._refresh(gpu)
        shape = gpu.geometry.by_profile[promise.profile]
        mask = span(promise.start, shape.size)
        if not mask & self._closed[gpu.key] and self.count(gpu, shape) < shape.max_instances:
            return Decision(gpu, shape, promise.start)
        spoken = self._unavailable(gpu)
        way = way_on(gpu, shape, spoken, self._promised(gpu, shape), self._leaving, self._warm.taken, (promise.start,))
        return way if way is not None and not way.shares else None

    # -- what the plan does with it

    def take(self, decision: Decision) -> None:
        """Takes the room of a decision."""
        if decision.take_over is not None:
            self._warm.take(decision.take_over)
        else:
            self._count(decision)
        self.keep(decision.gpu, span(decision.start, decision.shape.size))

    def promise(self, eviction: Eviction) -> None:
        """Lets shares leave, and keeps their room."""
        self._leaving.update(use.key for use in eviction.shares if use.key is not None)
        self._count(eviction.decision)
        self.keep(eviction.decision.gpu, span(eviction.decision.start, eviction.decision.shape.size))

    def keep(self, gpu: GpuView, mask: int) -> None:
        """Gives memory slices of a GPU to nobody else for the rest of the plan; reserves that need them end."""
        self._spoken[gpu.key] = self._spoken.get(gpu.key, 0) | mask
        reserves = self._reserved.get(gpu.key, {})
        for job_id in [job_id for job_id, reserved in reserves.items() if reserved & mask]:
            del reserves[job_id]
        self._refresh(gpu)

    def wish(self, choices: Iterable[ProfileChoice], node: str = "") -> None:
        """Notes that a job that waits could go wherever one of `choices` can be."""
        self._wishes.setdefault(node, set()).update((choice.gpu_model, choice.profile) for choice in choices)

    # -- how it is found

    def _best(self, choice: ProfileChoice) -> Decision | None:
        best: _Ranked[Decision] | None = None
        for (geometry, closed), gpus in self._alike.items():
            shape = _shape(geometry, choice)
            found = fit(geometry, shape, closed) if shape is not None else None
            if shape is None or found is None:
                continue
            gpu = next((gpu for gpu in gpus.values() if self.count(gpu, shape) < shape.max_instances), None)
            if gpu is None:
                continue
            rank = (found.free_after, -found.kept, gpu.node_name, gpu.gpu_index)
            if best is None or rank < best[0]:
                best = rank, Decision(gpu, shape, found.start)
        return best[1] if best is not None else None

    def _best_on(
        self, gpus: Iterable[GpuView], choice: ProfileChoice, closed: Callable[[GpuView], int]
    ) -> Decision | None:
        best: _Ranked[Decision] | None = None
        for gpu in gpus:
            shape = _shape(gpu.geometry, choice)
            if shape is None or self.count(gpu, shape) >= shape.max_instances:
                continue
            found = fit(gpu.geometry, shape, closed(gpu))
            if found is None:
                continue
            rank = (found.free_after, -found.kept, gpu.node_name, gpu.gpu_index)
            if best is None or rank < best[0]:
                best = rank, Decision(gpu, shape, found.start)
        return best[1] if best is not None else None

    def _on(self, node: str) -> Iterable[GpuView]:
        return self._of_node.get(node, ()) if node else self._gpus.values()

    def _reserved_on(self, node: str) -> Iterator[GpuView]:
        return (self._gpus[key] for key, reserves in self._reserved.items() if reserves and node in {"", key[0]})

    def _without_reserves(self, gpu: GpuView) -> int:
        return gpu.held | self._spoken.get(gpu.key, 0)

    def _unavailable(self, gpu: GpuView) -> int:
        """Returns the memory slices that are spoken for or reserved."""
        mask = self._spoken.get(gpu.key, 0)
        for reserved in self._reserved.get(gpu.key, {}).values():
            mask |= reserved
        return mask

    def _vacated(self, gpu: GpuView) -> int:
        return functools.reduce(lambda mask, use: mask | use.mask, (use for use in gpu.loose if use.leaving), 0)

    def _wished(self, gpu: GpuView) -> int:
        wanted = self._wishes.get("", set()) | self._wishes.get(gpu.node_id, set())
        mask = 0
        for shape in gpu.geometry.shapes:
            if (gpu.geometry.gpu_model, shape.profile) in wanted:
                mask |= _reach(shape)
        return mask

    def _promised(self, gpu: GpuView, shape: Shape) -> int:
        return self._taken.get((gpu.key, shape.profile), 0)

    def _count(self, decision: Decision) -> None:
        key = (decision.gpu.key, decision.shape.profile)
        self._taken[key] = self._taken.get(key, 0) + 1

    def _refresh(self, gpu: GpuView) -> None:
        before, after = self._closed[gpu.key], gpu.held | self._unavailable(gpu)
        if before != after:
            alike = self._alike[gpu.geometry, before]
            del alike[gpu.key]
            if not alike:
                del self._alike[gpu.geometry, before]
            self._closed[gpu.key] = after
            self._alike.setdefault((gpu.geometry, after), {})[gpu.key] = gpu
        for one in self._best_of.values():
            one.update(gpu)

    def _way(self, gpu: GpuView, choices: Sequence[ProfileChoice], spoken: int) -> _Ranked[Eviction] | None:
        best: _Ranked[Eviction] | None = None
        for at, choice in enumerate(choices):
            shape = _shape(gpu.geometry, choice)
            if shape is None:
                continue
            promised = self._promised(gpu, shape)
            way = way_on(gpu, shape, spoken, promised, self._leaving, self._warm.taken, shape.starts)
            if way is None:
                continue
            rank = (way.rank[0], at, *way.rank[1:])
            if best is None or rank < best[0]:
                best = rank, way
        return best

    def _near(self, gpu: GpuView, choices: Sequence[ProfileChoice]) -> _Ranked[tuple[GpuView, int]] | None:
        best: _Ranked[tuple[GpuView, int]] | None = None
        unavailable, closed = self._unavailable(gpu), self._closed[gpu.key]
        for choice in choices:
            shape = _shape(gpu.geometry, choice)
            if shape is None:
                continue
            for start in shape.starts:
                mask = span(start, shape.size)
                if mask & unavailable:
                    continue
                in_the_way = (mask & gpu.foreign, mask & gpu.firm, mask & closed)
                rank = (*(one.bit_count() for one in in_the_way), gpu.node_name, gpu.gpu_index, start)
                if best is None or rank < best[0]:
                    best = rank, (gpu, mask)
        return best

    def _cheapest(
        self,
        what: str,
        choices: Sequence[ProfileChoice],
        node: str,
        look: Callable[[GpuView], _Ranked[_Found] | None],
    ) -> _Found | None:
        if node:
            found = [one for gpu in self._on(node) if (one := look(gpu)) is not None]
            return min(found, key=lambda one: one[0])[1] if found else None
        need = (what, *((choice.gpu_model, choice.profile) for choice in choices))
        if need not in self._best_of:
            self._best_of[need] = _BestFirst(self._on(""), look)
        return self._best_of[need].first()


class _BestFirst(Generic[_Found]):
    """GPUs by how well they answer one question, the best first."""

    def __init__(self, gpus: Iterable[GpuView], look: Callable[[GpuView], _Ranked[_Found] | None]) -> None:
        self._look = look
        self._version: dict[GpuKey, int] = {}
        # No two entries are equal before the last part: the key tells GPUs apart, the version entries of one GPU.
        self._heap: list[tuple[tuple[Any, ...], GpuKey, int, _Found]] = []
        for gpu in gpus:
            found = look(gpu)
            if found is not None:
                self._heap.append((found[0], gpu.key, 0, found[1]))
        heapq.heapify(self._heap)

    def update(self, gpu: GpuView) -> None:
        version = self._version[gpu.key] = self._version.get(gpu.key, 0) + 1
        found = self._look(gpu)
        if found is not None:
            heapq.heappush(self._heap, (found[0], gpu.key, version, found[1]))

    def first(self) -> _Found | None:
        while self._heap:
            _, key, version, found = self._heap[0]
            if version == self._version.get(key, 0):
                return found
            heapq.heappop(self._heap)
        return None


def _shape(geometry: Geometry, choice: ProfileChoice) -> Shape | None:
    return geometry.by_profile.get(choice.profile) if geometry.gpu_model == choice.gpu_model else None


@functools.cache
def _reach(shape: Shape) -> int:
    """Returns every memory slice that a slice of `shape` could be on."""
    return functools.reduce(lambda mask, start: mask | span(start, shape.size), shape.starts, 0)
