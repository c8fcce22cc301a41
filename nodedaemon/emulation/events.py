"""Event sets: which process waits for what of which card.

One kind of event comes about: a change of a card's MIG configuration, which is its MIG mode or its
instances. No emulated card ever has an Xid error; whoever waits for one waits until the timeout.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pynvml

from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.state import Gpu, Node

SUPPORTED = pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventMigConfigChange

_Configuration = tuple[object, ...]


class Event(NamedTuple):
    """Something that happened to a card."""

    gpu: int
    kind: int


@dataclass(slots=True)
class EventSet:
    """What one event set waits for.

    Attributes:
        kinds: GPU index to event types, as a bit mask.
        seen: GPU index to the MIG configuration that was last told.
    """

    kinds: dict[int, int] = field(default_factory=dict)
    seen: dict[int, _Configuration] = field(default_factory=dict)

    def register(self, gpu: Gpu, kinds: int) -> None:
        """Wait for events of a card from now on."""
        self.kinds[gpu.minor] = self.kinds.get(gpu.minor, 0) | kinds
        self.seen[gpu.minor] = configuration(gpu)

    def next_event(self, node: Node) -> Event | None:
        """Return an event that was not told yet, if the state shows one."""
        for gpu in node.gpus:
            if not self.kinds.get(gpu.minor, 0) & pynvml.nvmlEventMigConfigChange:
                continue
            now = configuration(gpu)
            if now != self.seen[gpu.minor]:
                self.seen[gpu.minor] = now
                return Event(gpu.minor, pynvml.nvmlEventMigConfigChange)
        return None


class EventSets:
    """The event sets of this process, by number; a number is never given out twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self._sets: dict[int, EventSet] = {}

    def create(self) -> int:
        """Return the number of a new set that waits for nothing."""
        with self._lock:
            self._last += 1
            self._sets[self._last] = EventSet()
            return self._last

    def free(self, number: int) -> None:
        """Forget a set; who waits on it gets INVALID_ARGUMENT."""
        with self._lock:
            self._get(number)
            del self._sets[number]

    def change(self, number: int, action: Callable[[EventSet], Event | None]) -> Event | None:
        """Do something to a set, alone.

        Raises:
            Refusal: INVALID_ARGUMENT, when there is none of that number.
        """
        with self._lock:
            return action(self._get(number))

    def _get(self, number: int) -> EventSet:
        sets: Mapping[int, EventSet] = self._sets
        if number not in sets:
            raise Refusal(Code.INVALID_ARGUMENT)
        return sets[number]


def configuration(gpu: Gpu) -> _Configuration:
    """Return what a change of MIG configuration changes."""
    instances = tuple((i.serial, tuple(c.serial for c in i.compute_instances)) for i in gpu.instances)
    return gpu.mig, gpu.mig_pending, instances
