"""A daemon that can be killed at any point: between any two of its steps on the driver, the journal or the runtime.

A real kill -9 ends a process between two system calls. What matters of that is which of its effects are there and that
nothing runs afterwards: no rollback, no `finally`. Here every step first crosses a line, has its effect, and crosses
another; at the chosen line, and at every one from then on, `Killed` is raised and nothing has any effect any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodedaemon.driver import Driver
from nodedaemon.driver_facts import Span
from nodedaemon.exec_process import ExecProcess
from nodedaemon.hotplug import LinkPlug
from nodedaemon.journal import Journal
from nodedaemon.runtime import (
    ContainerExit,
    ContainerGone,
    ContainerPhase,
    ContainerSpec,
    ContainerStatus,
    ExecSpec,
    Mount,
)
from puhui.v1.node_pb2 import Runtime, RuntimeKind


class Killed(BaseException):
    """The daemon is dead. Not an Exception, so that nothing handles it."""


class Doom:
    """When a daemon dies.

    Attributes:
        crossed: lines that were crossed so far.
        dead: whether it has died.
    """

    def __init__(self) -> None:
        self.crossed = 0
        self.dead = False
        self._last: int | None = None

    def strike_after(self, lines: int) -> None:
        """Lets it cross that many more lines, and no further."""
        self._last = self.crossed + lines

    def spare(self) -> None:
        """Lets it live on, if it still does."""
        self._last = None

    def cross(self) -> None:
        """Crosses a line.

        Raises:
            Killed: it is dead.
        """
        if self.dead or (self._last is not None and self.crossed >= self._last):
            self.dead = True
            raise Killed
        self.crossed += 1


class MortalDriver(Driver):
    """The daemon's driver; the silicon below it lives on."""

    def __init__(self, doom: Doom) -> None:
        super().__init__()
        self._doom = doom

    def create_gpu_instance(self, gpu_uuid: str, profile_id: int, span: Span) -> int:
        with steps(self._doom):
            return super().create_gpu_instance(gpu_uuid, profile_id, span)

    def create_compute_instance(self, gpu_uuid: str, gi: int, compute_slices: int) -> int:
        with steps(self._doom):
            return super().create_compute_instance(gpu_uuid, gi, compute_slices)

    def destroy_compute_instance(self, gpu_uuid: str, gi: int, ci: int) -> None:
        with steps(self._doom):
            super().destroy_compute_instance(gpu_uuid, gi, ci)

    def destroy_gpu_instance(self, gpu_uuid: str, gi: int) -> None:
        with steps(self._doom):
            super().destroy_gpu_instance(gpu_uuid, gi)


class MortalJournal(Journal):
    """The daemon's journal; the file below it lives on."""

    def __init__(self, path: Path, doom: Doom) -> None:
        self._doom = doom
        self._depth = 0
        super().__init__(path)

    @contextlib.contextmanager
    def atomic(self) -> Iterator[None]:
        self._doom.cross()
        self._depth += 1
        try:
            with super().atomic():
                yield
        finally:
            self._depth -= 1
        self._doom.cross()

    def _write(self, statement: str, values: Iterable[Any]) -> sqlite3.Cursor:
        if self._depth:
            return super()._write(statement, values)  # all or nothing: the lines are around the transaction
        with steps(self._doom):
            return super()._write(statement, values)


@dataclass
class Container:
    """A container, which outlives the daemon."""

    id: str
    name: str
    labels: Mapping[str, str]
    phase: ContainerPhase = ContainerPhase.CREATED
    exit_code: int | None = None

    def end(self, exit_code: int | None) -> None:
        """Its command ends; None when the host's power did."""
        self.phase = ContainerPhase.EXITED
        self.exit_code = 137 if exit_code is None else exit_code

    def status(self) -> ContainerStatus:
        """Returns it as a runtime lists it."""
        ended = self.phase is ContainerPhase.EXITED
        return ContainerStatus(
            self.id,
            self.labels,
            self.phase,
            pid=1 if self.phase is ContainerPhase.RUNNING else 0,
            exit_code=self.exit_code,
            start_time=1.0,
            end_time=2.0 if ended else None,
        )


Running = dict[str, Container]
"""Every container of a host by its id."""

_numbers = itertools.count(1)


class MortalRuntime:
    """The daemon's way to the runtime; the containers below it live on."""

    def __init__(self, running: Running, doom: Doom) -> None:
        self._running = running
        self._doom = doom
        self._exits: asyncio.Queue[ContainerExit] = asyncio.Queue()

    async def create(self, spec: ContainerSpec) -> str:
        with steps(self._doom):
            container = Container(f"{next(_numbers):012x}", spec.name, dict(spec.labels))
            self._running[container.id] = container
        return container.id

    async def initialize(self, container_id: str) -> int:
        return 0

    async def start(self, container_id: str) -> ContainerStatus:
        with steps(self._doom):
            self._running[container_id].phase = ContainerPhase.RUNNING
        return self._running[container_id].status()

    async def signal(self, container_id: str, signal: int) -> None:
        with steps(self._doom):
            container = self._running.get(container_id)
            if container is not None and container.phase is not ContainerPhase.EXITED:
                container.end(128 + signal)
                self._exits.put_nowait(ContainerExit(container_id, 128 + signal, False, 2.0))

    async def remove(self, container_id: str) -> None:
        with steps(self._doom):
            for one in list(self._running.values()):
                if container_id in (one.id, one.name):
                    del self._running[one.id]

    async def start_exec(self, container_id: str, spec: ExecSpec) -> ExecProcess | None:
        raise NotImplementedError  # no rule of the machine comes here

    async def suspend(self, container_id: str) -> None:
        with steps(self._doom):
            self._running[container_id].phase = ContainerPhase.SUSPENDED

    async def resume(self, container_id: str) -> None:
        with steps(self._doom):
            self._running[container_id].phase = ContainerPhase.RUNNING

    async def containers(self) -> list[ContainerStatus]:
        return [one.status() for one in self._running.values()]

    async def exits(self) -> AsyncIterator[ContainerExit | ContainerGone | None]:
        yield None
        while True:
            yield await self._exits.get()

    async def make_removable(self, folder: Path) -> None:
        """Everything is this user's own."""

    def describe(self) -> Runtime:
        return Runtime(kind=RuntimeKind.RUNTIME_KIND_PROCESS)

    async def close(self) -> None:
        """Holds nothing."""


class MortalPlug(LinkPlug):
    """The daemon's way to what containers see; that stays as it is when the daemon dies."""

    def __init__(self, doom: Doom) -> None:
        self._doom = doom

    async def prepare(self, folder: Path, nodes: Mapping[str, Path]) -> list[Mount]:
        with steps(self._doom):
            return await super().prepare(folder, nodes)

    async def show(self, folder: Path, nodes: Mapping[str, Path], pid: int) -> bool:
        with steps(self._doom):
            return await super().show(folder, nodes, pid)


@contextlib.contextmanager
def steps(doom: Doom) -> Iterator[None]:
    """Puts a line before a step and one after it."""
    doom.cross()
    yield
    doom.cross()
