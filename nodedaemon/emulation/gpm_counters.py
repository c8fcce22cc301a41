"""Where GPM readings come from: the processes that hold the slices of this node."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nodedaemon.emulation.caps import CapNodes
from nodedaemon.emulation.gpm import ProcessTime, Reading, Share, boot_clock, process_time
from nodedaemon.emulation.holders import Holders
from nodedaemon.emulation.state import Gpu, GpuInstance, Node
from nodedaemon.emulation.store import StateStore

_REFRESH_SECONDS = 0.02
"""How long one look at all processes serves. Hardware refreshes its counters about every 100 ms."""


@dataclass(frozen=True, slots=True)
class _Look:
    """Who held which GPU instance, by its serial, and how much CPU time they had used."""

    counted: float
    held: Mapping[int, Mapping[int, ProcessTime]]
    unseen: frozenset[int]


class GpmCounters:
    """Counts the CPU time of each GPU instance's processes.

    One look over ``/proc`` serves every slice of the node, so that sampling them all costs about
    as much as sampling one.

    Args:
        store: The node's state.
        caps: Its cap nodes.
        holders: Finds who holds them.
        clock: Seconds since boot.
    """

    def __init__(
        self, store: StateStore, caps: CapNodes, holders: Holders, *, clock: Callable[[], float] = boot_clock
    ) -> None:
        self._store = store
        self._caps = caps
        self._holders = holders
        self._clock = clock
        self._lock = threading.Lock()
        self._look: _Look | None = None

    def read(self, gpu: Gpu, instance: GpuInstance | None) -> Reading:
        """Return a reading of one GPU instance, or of a whole card."""
        taken = self._clock()
        instances = gpu.instances if instance is None else [instance]
        look = self._fresh({one.serial for one in instances}, taken)
        whole = gpu.card.compute_slices
        shares = tuple(
            Share(
                one.serial,
                1.0 if instance is not None else _compute_slices(gpu, one) / whole,
                look.held.get(one.serial, {}),
                one.serial in look.unseen,
            )
            for one in instances
        )
        return Reading(gpu.minor, None if instance is None else instance.serial, taken, look.counted, shares)

    def _fresh(self, serials: set[int], now: float) -> _Look:
        with self._lock:
            look = self._look
            if look is None or now - look.counted > _REFRESH_SECONDS or not serials <= look.held.keys():
                look = self._look = self._take()
            return look

    def _take(self) -> _Look:
        with self._store.locked():
            owners = self._owners(self._store.read())
            processes = self._holders.processes(owners)
            held: dict[int, dict[int, ProcessTime]] = {serial: {} for serial in owners.values()}
            for node, pids in processes.items():
                for pid in pids:
                    used = process_time(pid)
                    if used is not None:
                        held[owners[node]][pid] = used
            unseen = frozenset(
                serial
                for node, serial in owners.items()
                if not processes[node] and not held[serial] and self._holders.is_held(node)
            )
        return _Look(self._clock(), held, unseen)

    def _owners(self, node: Node) -> dict[Path, int]:
        """Return every cap node, with the serial of the GPU instance that it opens."""
        owners: dict[Path, int] = {}
        for gpu in node.gpus:
            for instance in gpu.instances:
                owners[self._caps.gpu_instance(gpu, instance)] = instance.serial
                for compute in instance.compute_instances:
                    owners[self._caps.compute_instance(gpu, instance, compute)] = instance.serial
        return owners


def _compute_slices(gpu: Gpu, instance: GpuInstance) -> int:
    profile = gpu.card.profile(instance.profile_id)
    return 0 if profile is None else profile.compute_slices
