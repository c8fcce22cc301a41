"""How faults and latency reach a call: those of this process, and those that all processes share."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from nodedaemon.emulation.faults import Fault, FaultPlan, Latency, When
from nodedaemon.emulation.faults import strike as strike_one
from nodedaemon.emulation.refusal import Refusal
from nodedaemon.emulation.state import Node
from nodedaemon.emulation.store import StateStore


class Injection:
    """Makes calls slow, wrong or out of date, as asked.

    Shared faults stand in the state, which a call reads anyway: without any, they cost one look at
    a list. The state is changed only by a call that meets one.

    Args:
        store: The node's state.
        latency: How slow each call of this process is; None for what the state says.

    Attributes:
        plan: The faults of this process alone; they strike before the shared ones.
    """

    def __init__(self, store: StateStore, latency: Latency | None) -> None:
        self.plan = FaultPlan()
        self._store = store
        self._latency = latency
        self._local = threading.local()

    @property
    def view(self) -> Node | None:
        """The state as the running call is to see it, when that is not the present one."""
        return getattr(self._local, "view", None)

    @contextmanager
    def around(self, function: str, gpu: Callable[[], int | None]) -> Iterator[None]:
        """Run one call inside its latency and the fault that it meets.

        Args:
            function: NVML function name, without ``_v2``.
            gpu: Returns the index of the card that the call is about, None for none.

        Raises:
            Refusal: The fault's code, before or after the call ran.
        """
        state = self._store.read()
        seconds = (self._latency or state.latency).of(function)
        if seconds > 0:
            time.sleep(seconds)
        fault, view = self.plan.take(function, gpu), None
        if fault is None and any(one.function == function for one in state.faults):
            fault, view = self._take_shared(function, gpu)
        if fault is None:
            yield
            return
        if fault.when is When.BEFORE:
            _answer(fault)
        self._local.view = view
        try:
            yield
        finally:
            self._local.view = None
        if fault.when is When.AFTER:
            _answer(fault)

    def _take_shared(self, function: str, gpu: Callable[[], int | None]) -> tuple[Fault | None, Node | None]:
        with self._store.transaction() as change:
            before = change.node.before
            fault = strike_one(change.node.faults, function, gpu)
        if fault is None or not fault.stale or before is None:
            return fault, None
        return fault, replace(change.node, gpus=before)


def _answer(fault: Fault) -> None:
    if fault.delay_seconds:
        time.sleep(fault.delay_seconds)
    if fault.code:
        raise Refusal(fault.code)
