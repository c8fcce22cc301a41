"""Silicon, containers, journal and the people around them, over many lives of one daemon."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pynvml

from nodedaemon.attachments import Attachments
from nodedaemon.bundles import Bundles
from nodedaemon.container_leases import ContainerLeases
from nodedaemon.containers import Containers
from nodedaemon.devices import CardDevices
from nodedaemon.driver import Driver
from nodedaemon.driver_facts import GpuInstance, Mig, ProfileFacts, Span
from nodedaemon.emulation import EmulatedDriver, Fault
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.inventory import Inventory, Revision
from nodedaemon.owner import Owner
from nodedaemon.records import SliceRecord
from nodedaemon.recovery import Recovery
from nodedaemon.slice_recovery import SliceRecovery
from nodedaemon.slice_transfers import SliceTransfers
from nodedaemon.slices import Slices
from nodedaemon.workspace import Attempts
from puhui.rpc.lease_clock import LeaseClock
from puhui.v1.node_pb2 import NodeEvent, NodeEventKind, NodeInventory, RuntimeKind
from puhui.v1.node_service_pb2 import CreateContainerRequest
from tests.contract.slices.mortal import Doom, Killed, MortalDriver, MortalJournal, MortalPlug, MortalRuntime, Running

T = TypeVar("T")


@dataclass
class Life:
    """One daemon, from its start to its death."""

    doom: Doom
    journal: MortalJournal
    gpus: Gpus
    slices: Slices
    containers: Containers
    attachments: Attachments
    transfers: SliceTransfers
    recovery: SliceRecovery
    inventory: Inventory
    watching: asyncio.Task[None]

    def die(self) -> None:
        """Ends: nothing of it has any effect from now on."""
        self.doom.dead = True
        self.journal.close()


@dataclass
class World:
    """What outlives every daemon.

    Attributes:
        emulated: the silicon.
        folder: where journal, bundles and attempts are.
        operator: somebody with a shell on the node.
        bundle_id: some code that the node has.
        running: the runtime's containers.
        foreign: (GPU UUID, GPU instance id) of the instances that others made.
        held: descriptors that outsiders hold cap nodes open with, by slice UUID.
        boots: how often the host has booted.
        told: cursor of the last event that was read.
        there: what the events told, replayed: UUIDs of the slices that are there.
        faults: what the next deed meets, and nobody else.
    """

    emulated: EmulatedDriver
    folder: Path
    operator: Driver
    runner: asyncio.Runner
    bundle_id: str
    running: Running = field(default_factory=dict)
    foreign: set[tuple[str, int]] = field(default_factory=set)
    held: dict[str, int] = field(default_factory=dict)
    boots: int = 1
    told: int = 0
    there: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    _life: Life | None = None

    # The daemon ------------------------------------------------------------------------------------------

    @property
    def life(self) -> Life:
        """The living daemon."""
        assert self._life is not None
        return self._life

    def start(self, *, lines: int | None = None) -> None:
        """Starts a daemon, which recovers. One that dies of that, after so many lines, is started again."""
        doom = Doom()
        if lines is not None:
            doom.strike_after(lines)
        journal = MortalJournal(self.folder / "node.db", doom)
        try:
            self._life = self.runner.run(self._born(doom, journal))
        except Killed:
            journal.close()
            self.start()
        else:
            doom.spare()

    async def _born(self, doom: Doom, journal: MortalJournal) -> Life:
        events = EventLog(journal)
        gpus = Gpus(MortalDriver(doom), emulated=True)
        boot = f"boot-{self.boots}"
        slices = Slices(gpus, journal, events, changed=lambda: None, release_s=0, boot=boot)
        runtime = MortalRuntime(self.running, doom)
        attempts = Attempts(self.folder / "attempts", os.geteuid(), os.getegid())
        caps = self.emulated.caps
        cards = CardDevices(caps.directory, caps.minors_file, True)
        bundles = Bundles(self.folder / "bundles")
        kind = RuntimeKind.RUNTIME_KIND_PROCESS
        plug = MortalPlug(doom)
        attachments = Attachments(journal, events, gpus, slices, attempts, cards, plug, kind, changed=lambda: None)
        slices.on_vanished = attachments.let_go
        inventory = Inventory("node", "n-1", gpus, slices, runtime, Revision())
        leases = ContainerLeases(LeaseClock(self.folder / "clock.json"), runtime, journal, self.folder / "leases")
        containers = Containers(
            runtime, journal, events, slices, bundles, attempts, cards, "image", attachments, leases
        )
        recovery = SliceRecovery(journal, events, gpus, slices, boot=boot, settle=attachments.settle)
        await Recovery(journal, events, containers, runtime, recovery).run()
        await attachments.restore()
        watching = asyncio.create_task(containers.ends.watch())
        transfers = SliceTransfers(journal, gpus, slices, attachments, containers.holder_of)
        return Life(doom, journal, gpus, slices, containers, attachments, transfers, recovery, inventory, watching)

    def do(self, act: Callable[[Life], Awaitable[T]], *, lines: int | None = None) -> T | None:
        """Has the daemon do something.

        Args:
            act: what.
            lines: None lets it live. Otherwise it dies after so many lines, or right after the deed, and starts again.

        Returns:
            What came of it; None when the daemon died of it.
        """
        life = self.life
        if lines is not None:
            life.doom.strike_after(lines)

        async def deed() -> T:
            return await act(life)

        for fault in self.faults:
            self.emulated.faults.add(fault)
        try:
            return self.runner.run(deed())
        except Killed:
            assert lines is not None, "it died though nobody killed it"
            return None
        finally:
            if lines is not None:
                self.kill()
            self.emulated.faults.clear()
            self.faults.clear()

    def kill(self) -> None:
        """Kills the daemon between two deeds, and starts it again."""
        self.end()
        self.start()

    def end(self) -> None:
        """Ends the daemon, and what is left of it in this process."""
        life = self.life
        life.die()
        life.gpus.close()

        async def bury() -> None:
            life.watching.cancel()
            # It may have died of the very thing that killed the daemon.
            await asyncio.gather(life.watching, return_exceptions=True)

        self.runner.run(bury())

    def look(self) -> None:
        """Has the daemon compare journal and driver once, as it does every few seconds."""
        self.do(lambda life: life.recovery.look())

    # People ----------------------------------------------------------------------------------------------

    def reboot(self) -> None:
        """Reboots the host: processes and instances are gone, and a boot service enables MIG mode again."""
        self.end()
        for descriptor in self.held.values():
            os.close(descriptor)
        self.held.clear()
        for container in self.running.values():
            container.end(None)
        self.foreign.clear()
        self.emulated.reboot()
        for index in range(self.operator.count()):
            pynvml.nvmlDeviceSetMigMode(pynvml.nvmlDeviceGetHandleByIndex(index), 1)
        self.boots += 1
        self.start()

    def hold(self, record: SliceRecord) -> None:
        """An outsider opens a slice's cap node."""
        if record.uuid in self.held:
            return
        node = max(self.nodes_of(record), key=lambda name: int(name.removeprefix("nvidia-cap")))
        self.held[record.uuid] = os.open(self.emulated.caps.directory / node, os.O_RDONLY)

    def let_go(self, uuid: str) -> None:
        """The outsider closes it again."""
        os.close(self.held.pop(uuid))

    def cut_by_hand(self, gpu_uuid: str, profile: ProfileFacts, span: Span) -> None:
        """Somebody makes an instance with nvidia-smi."""
        gi = self.operator.create_gpu_instance(gpu_uuid, profile.profile_id, span)
        self.operator.create_compute_instance(gpu_uuid, gi, profile.compute_slices)
        self.foreign.add((gpu_uuid, gi))

    def destroy_by_hand(self, instance: GpuInstance, *, half: bool = False) -> None:
        """Somebody destroys an instance with nvidia-smi, theirs or the daemon's, or only its compute instance."""
        for compute in instance.compute_instances:
            self.operator.destroy_compute_instance(instance.gpu_uuid, instance.id, compute.id)
        if half:
            return
        self.operator.destroy_gpu_instance(instance.gpu_uuid, instance.id)
        self.foreign.discard((instance.gpu_uuid, instance.id))

    # What is so ------------------------------------------------------------------------------------------

    def instances(self) -> list[GpuInstance]:
        """Every instance of the node, as the silicon has it."""
        return [
            one for gpu in self.operator.gpus() if gpu.mig is Mig.ENABLED for one in self.operator.instances(gpu.uuid)
        ]

    def records(self) -> list[SliceRecord]:
        """Every slice of the journal that is not destroyed."""
        return self.life.journal.slices()

    def news(self) -> list[NodeEvent]:
        """Reads the events that came since the last time, and replays them."""
        events = []
        for cursor, message in self.life.journal.events(self.told, 10_000):
            event = NodeEvent.FromString(message)
            assert cursor > self.told
            self.told = cursor
            if event.kind == NodeEventKind.NODE_EVENT_KIND_SLICE_CREATED:
                self.there.add(event.slice.uuid)
            elif event.kind == NodeEventKind.NODE_EVENT_KIND_SLICE_DESTROYED and event.slice.uuid:
                self.there.remove(event.slice.uuid)  # told once
            events.append(event)
        return events

    def inventory(self) -> NodeInventory:
        """Returns what the daemon says that this node has."""
        return self.runner.run(self.life.inventory.read())

    def seen(self, owner: Owner) -> set[str]:
        """Returns the names of the cap nodes that an attempt's container sees."""
        folder = Attempts(self.folder / "attempts", os.geteuid(), os.getegid()).folder(owner).caps
        return {link.name for link in folder.iterdir()} if folder.exists() else set()

    def nodes_of(self, record: SliceRecord) -> set[str]:
        """Returns the names of a slice's cap nodes."""
        minor = next(gpu.minor for gpu in self.operator.gpus() if gpu.uuid == record.gpu_uuid)
        first = 3 + 135 * minor + 9 * (record.gi or 0)
        return {f"nvidia-cap{first}", f"nvidia-cap{first + 1 + (record.ci or 0)}"}

    def request(self, slices: list[str]) -> CreateContainerRequest:
        """Returns the request for a container on these slices."""
        return CreateContainerRequest(command=["sleep"], bundle_id=self.bundle_id, slice_uuids=slices)
