"""The room of a fleet while a plan is made: what the plan gives away is no longer there for the rest of it.

A question about one node looks at that node's GPUs only. A question about the whole fleet looks at GPUs that are alike
together, or, for evictions and for room to keep, at a heap for each need that is brought up to date where the plan
changed something: a decision does not cost more because the fleet is larger.
"""

from __future__ import annotations

import functools
import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from controlplane.eviction import Eviction, way_on
from controlplane.fleet import Geometry, GpuKey, GpuView, Shape, Use, span
from controlplane.placement import Decision, fit
from controlplane.reservations import AttemptKey
from puhui.v1.prediction_pb2 import ProfileChoice

__all__ = ["Room"]

_Found = TypeVar("_Found")
_Ranked = tuple[tuple[Any, ...], _Found]
"""The smallest rank is the best."""
_Warm = tuple[GpuView, Use]


class Room:
    """What is free, warm, or can be had by evicting, on the GPUs on which something may be placed.

    `node` is, throughout, the id of the only node that is asked about; "" for any.
    """

    def __init__(self, gpus: Iterable[GpuView]) -> None:
        self._held: dict[GpuKey, int] = {}
        self._alike: dict[tuple[Geometry, int], dict[GpuKey, GpuView]] = {}
        self._of_node: dict[str, list[GpuView]] = {}
        self._taken: dict[tuple[GpuKey, str], int] = {}
        self._spoken: dict[GpuKey, int] = {}
        """Memory slices that the plan has given away or keeps, whoever is on them now."""
        self._leaving: dict[AttemptKey, str] = {}
        self._taken_over: set[AttemptKey] = set()
        self._wishes: dict[str, set[tuple[str, str]]] = {}
        self._best_of: dict[Hashable, _BestFirst[Any]] = {}
        for gpu in gpus:
            if gpu.usable:
                self._held[gpu.key] = gpu.held
                self._alike.setdefault((gpu.geometry, gpu.held), {})[gpu.key] = gpu
                self._of_node.setdefault(gpu.node_id, []).append(gpu)

    def usable(self, node: str) -> bool:
        """Returns whether something may be placed on a node."""
        return node in self._of_node

    def held(self, gpu: GpuView) -> int:
        """Returns the bit mask of memory slices of a usable GPU that are not free for the rest of the plan."""
        return self._held[gpu.key]

    def count(self, gpu: GpuView, shape: Shape) -> int:
        """Returns how many slices of a shape are held on a GPU, with those of the plan."""
        return gpu.count(shape.profile) + self._promised(gpu, shape)

    # -- where a slice could go

    def best(self, choices: Sequence[ProfileChoice], node: str = "") -> Decision | None:
        """Returns where a slice of the first choice that fits into free room goes; None when none fits."""
        search = functools.partial(self._best_on, node=node) if node else self._best
        return next((found for choice in choices if (found := search(choice)) is not None), None)

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
        wanted = [(choice.gpu_model, choice.profile) for choice in choices]
        if node or rest:
            found: Iterable[_Warm] = ((gpu, use) for gpu in self._on(node) for use in gpu.warm if use.tenant == tenant)
        else:
            heads = (self._first_warm(tenant, *kind) for kind in wanted)
            found = (*self._warm_of_job.get((tenant, job_id), ()), *(head for head in heads if head is not None))
        best: _Ranked[_Warm] | None = None
        for gpu, use in found:
            if (gpu.geometry.gpu_model, use.profile) not in wanted or not self._is_open(gpu, use):
                continue
            if rest and use.mask & self._wished(gpu):
                continue
            rank = (not _is_of(use, job_id), *_soonest(gpu, use))
            if best is None or rank < best[0]:
                best = rank, (gpu, use)
        if best is None:
            return None
        gpu, use = best[1]
        return Decision(gpu, gpu.geometry.by_profile[use.profile], use.start, use.key, use.slice_uuid)

    def at_rest(self, choices: Sequence[ProfileChoice], node: str = "") -> Decision | None:
        """Returns free room for a slice where no job that waits could go, see `wish`; None when there is none."""
        for choice in choices:
            found = self._best_on(choice, node=node, rest=True)
            if found is not None:
                return found
        return None

    def eviction(self, choices: Sequence[ProfileChoice], job_id: str, node: str = "") -> Eviction | None:
        """Returns the cheapest placement that becomes free when idle shares leave; None when nothing could leave.

        Room that is being vacated for this job already comes before anything else.
        """
        own = [gpu for gpu in self._leaving_for.get(job_id, ()) if not node or gpu.node_id == node]
        ways = [way[1] for gpu in own if (way := self._way(gpu, choices, job_id)) is not None]
        vacated = [
            way for way in ways if not way.shares and all(self._waiter(use) in {"", job_id} for use in way.awaited)
        ]
        if vacated:
            return min(vacated, key=lambda way: way.rank)
        return self._cheapest("eviction", choices, node, lambda gpu: self._way(gpu, choices, ""))

    def nearest(self, choices: Sequence[ProfileChoice], node: str = "") -> tuple[GpuView, int] | None:
        """Returns the GPU and mask at which one of `choices` is likely to fit soonest.

        That is where the fewest memory slices have still to become free: the fewest that nobody here can free, then
        the fewest that are in use. Room that the plan has given away or keeps is not counted on.
        """
        return self._cheapest("nearest", choices, node, lambda gpu: self._near(gpu, choices))

    # -- what the plan does with it

    def take(self, decision: Decision) -> None:
        """Takes the room of a decision."""
        mask = span(decision.start, decision.shape.size)
        if decision.take_over is not None:
            self._taken_over.add(decision.take_over)
        else:
            self._count(decision)
        self.keep(decision.gpu, mask)

    def promise(self, eviction: Eviction, job_id: str) -> None:
        """Lets shares leave for a job, and keeps their room for it."""
        self._leaving.update({use.key: job_id for use in (*eviction.shares, *eviction.awaited) if use.key is not None})
        self._count(eviction.decision)
        self.keep(eviction.decision.gpu, span(eviction.decision.start, eviction.decision.shape.size))

    def keep(self, gpu: GpuView, mask: int) -> None:
        """Gives memory slices of a GPU to nobody else for the rest of the plan."""
        before = self._held[gpu.key]
        if before | mask != before:
            alike = self._alike[gpu.geometry, before]
            del alike[gpu.key]
            if not alike:
                del self._alike[gpu.geometry, before]
            self._held[gpu.key] = before | mask
            self._alike.setdefault((gpu.geometry, before | mask), {})[gpu.key] = gpu
        self._spoken[gpu.key] = self._spoken.get(gpu.key, 0) | mask
        for one in self._best_of.values():
            one.update(gpu)

    def wish(self, choices: Iterable[ProfileChoice], node: str = "") -> None:
        """Notes that a job that waits could go wherever one of `choices` can be."""
        self._wishes.setdefault(node, set()).update((choice.gpu_model, choice.profile) for choice in choices)

    # -- how it is found

    def _best(self, choice: ProfileChoice) -> Decision | None:
        best: _Ranked[Decision] | None = None
        for (geometry, held), gpus in self._alike.items():
            shape = _shape(geometry, choice)
            found = fit(geometry, shape, held) if shape is not None else None
            if shape is None or found is None:
                continue
            gpu = next((gpu for gpu in gpus.values() if self.count(gpu, shape) < shape.max_instances), None)
            if gpu is None:
                continue
            rank = (found.free_after, -found.kept, gpu.node_name, gpu.gpu_index)
            if best is None or rank < best[0]:
                best = rank, Decision(gpu, shape, found.start)
        return best[1] if best is not None else None

    def _best_on(self, choice: ProfileChoice, node: str, *, rest: bool = False) -> Decision | None:
        best: _Ranked[Decision] | None = None
        for gpu in self._on(node):
            shape = _shape(gpu.geometry, choice)
            if shape is None or self.count(gpu, shape) >= shape.max_instances:
                continue
            found = fit(gpu.geometry, shape, self._held[gpu.key] | (self._wished(gpu) if rest else 0))
            if found is None:
                continue
            rank = (found.free_after, -found.kept, gpu.node_name, gpu.gpu_index)
            if best is None or rank < best[0]:
                best = rank, Decision(gpu, shape, found.start)
        return best[1] if best is not None else None

    def _on(self, node: str) -> Iterable[GpuView]:
        if node:
            return self._of_node.get(node, ())
        return (gpu for gpus in self._of_node.values() for gpu in gpus)

    def _is_open(self, gpu: GpuView, use: Use) -> bool:
        """Returns whether a warm slice can still be taken over; once it cannot, it cannot for the rest of the plan."""
        return (
            use.key not in self._taken_over
            and use.key not in self._leaving
            and not use.mask & self._spoken.get(gpu.key, 0)
        )

    def _first_warm(self, tenant: str, gpu_model: str, profile: str) -> _Warm | None:
        queue = self._warm_queues.get((tenant, gpu_model, profile))
        while queue:
            if self._is_open(*queue[0]):
                return queue[0]
            queue.popleft()
        return None

    @functools.cached_property
    def _warm_queues(self) -> dict[tuple[str, str, str], deque[_Warm]]:
        found: dict[tuple[str, str, str], list[_Warm]] = {}
        for gpu in self._on(""):
            for use in gpu.warm:
                found.setdefault((use.tenant, gpu.geometry.gpu_model, use.profile), []).append((gpu, use))
        return {kind: deque(sorted(all_, key=lambda one: _soonest(*one))) for kind, all_ in found.items()}

    @functools.cached_property
    def _warm_of_job(self) -> dict[tuple[str, str], list[_Warm]]:
        index: dict[tuple[str, str], list[_Warm]] = {}
        for gpu in self._on(""):
            for use in gpu.warm:
                if use.key is not None:
                    index.setdefault((use.tenant, use.key[0]), []).append((gpu, use))
        return index

    @functools.cached_property
    def _leaving_for(self) -> dict[str, list[GpuView]]:
        index: dict[str, list[GpuView]] = {}
        for gpu in self._on(""):
            for waiter in sorted({use.leaving_for for use in gpu.loose if use.leaving_for}):
                index.setdefault(waiter, []).append(gpu)
        return index

    def _waiter(self, use: Use) -> str:
        return self._leaving.get(use.key, use.leaving_for) if use.key is not None else ""

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

    def _way(self, gpu: GpuView, choices: Sequence[ProfileChoice], job_id: str) -> _Ranked[Eviction] | None:
        best: _Ranked[Eviction] | None = None
        spoken = self._spoken.get(gpu.key, 0)
        for at, choice in enumerate(choices):
            shape = _shape(gpu.geometry, choice)
            if shape is None:
                continue
            promised = self._promised(gpu, shape)
            way = way_on(gpu, shape, spoken, promised, self._leaving, self._taken_over, job_id)
            if way is None:
                continue
            rank = (way.rank[0], at, *way.rank[1:])
            if best is None or rank < best[0]:
                best = rank, way
        return best

    def _near(self, gpu: GpuView, choices: Sequence[ProfileChoice]) -> _Ranked[tuple[GpuView, int]] | None:
        best: _Ranked[tuple[GpuView, int]] | None = None
        held, spoken = self._held[gpu.key], self._spoken.get(gpu.key, 0)
        for choice in choices:
            shape = _shape(gpu.geometry, choice)
            for start in shape.starts if shape is not None else ():
                mask = span(start, shape.size) if shape is not None else 0
                if mask & spoken:
                    continue
                in_the_way = (mask & gpu.foreign, mask & gpu.firm, mask & held)
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


def _is_of(use: Use, job_id: str) -> bool:
    return use.key is not None and use.key[0] == job_id


def _soonest(gpu: GpuView, use: Use) -> tuple[float, str, int, int]:
    """Returns what puts warm slices in the order in which they would be dropped."""
    return use.warm_until, gpu.node_name, gpu.gpu_index, use.start


def _shape(geometry: Geometry, choice: ProfileChoice) -> Shape | None:
    return geometry.by_profile.get(choice.profile) if geometry.gpu_model == choice.gpu_model else None


@functools.cache
def _reach(shape: Shape) -> int:
    """Returns every memory slice that a slice of `shape` could be on."""
    return functools.reduce(lambda mask, start: mask | span(start, shape.size), shape.starts, 0)
