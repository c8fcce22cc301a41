"""What this node has, for its control plane."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from nodedaemon.checkpoint import Ability
from nodedaemon.driver_facts import GpuFacts, Mig
from nodedaemon.gpus import Gpus, mig_command
from nodedaemon.host import boot_id, memory_bytes
from nodedaemon.runtime import ContainerRuntime
from nodedaemon.slices import Slices
from puhui.rpc.errors import Refusal
from puhui.v1.card_pb2 import Gpu, MigMode, Placement, Profile
from puhui.v1.node_pb2 import NodeInventory, NodeVersions, Runtime

__all__ = ["Inventory", "Revision"]


class Revision:
    """Counts the changes of GPUs and slices."""

    def __init__(self) -> None:
        self.number = 1
        self.changed = asyncio.Event()
        """Set with every change; whoever waits for it clears it."""

    def grow(self) -> None:
        """Notes a change."""
        self.number += 1
        self.changed.set()


class Inventory:
    """Reads what this node has.

    Args:
        name: the node's name.
        daemon_id: what tells this daemon from any other, for as long as its state is kept.
        gpus: the node's GPUs.
        slices: the node's slices.
        runtime: what runs its containers.
        revision: counts its changes.
    """

    def __init__(
        self,
        name: str,
        daemon_id: str,
        gpus: Gpus,
        slices: Slices,
        runtime: ContainerRuntime,
        revision: Revision,
    ) -> None:
        self._name = name
        self._daemon_id = daemon_id
        self._gpus = gpus
        self._slices = slices
        self._runtime = runtime
        self.revision = revision
        self.checkpoints: Callable[[], Ability] = lambda: Ability("")
        """Tells what can checkpoint processes here."""

    async def read(self) -> NodeInventory:
        """Returns what this node has now.

        Raises:
            Refusal: INTERNAL with DRIVER_REFUSED.
        """
        revision = self.revision.number
        gpus = [await self._describe(gpu) for gpu in await self._gpus.refresh()]
        return NodeInventory(
            name=self._name,
            gpus=gpus,
            slices=await self._slices.book.describe_all(foreign=True),
            runtime=self._describe_runtime(),
            versions=NodeVersions(
                puhui=importlib.metadata.version("puhui"),
                driver=self._gpus.driver_version,
                nvml=self._gpus.nvml_version,
                kernel=platform.release(),
            ),
            host_cpus=os.cpu_count() or 0,
            host_memory_mib=memory_bytes() // 2**20,
            boot_id=boot_id(),
            revision=revision,
            daemon_id=self._daemon_id,
        )

    def _describe_runtime(self) -> Runtime:
        runtime, ability = self._runtime.describe(), self.checkpoints()
        return Runtime(
            kind=runtime.kind,
            version=runtime.version,
            oci_runtime=runtime.oci_runtime,
            storage_driver=runtime.storage_driver,
            cgroup_layout=runtime.cgroup_layout,
            enforced_limits=runtime.enforced_limits,
            user=runtime.user,
            notices=[*runtime.notices, *([ability.notice] if ability.notice else [])],
            checkpoint=ability.name,
        )

    async def _describe(self, gpu: GpuFacts) -> Gpu:
        profiles: list[Profile] = []
        if gpu.mig is Mig.ENABLED:
            try:
                profiles = await self._gpus.read(gpu, partial(self._profiles, gpu))
            except Refusal as error:
                gpu = replace(gpu, mig=Mig.UNKNOWN, notice=error.message)
        return Gpu(
            uuid=gpu.uuid or f"unknown-{gpu.index}",
            index=gpu.index,
            model=gpu.model,
            memory_mib=gpu.memory_mib,
            pci_bus_id=gpu.pci_bus_id,
            mig_mode=MigMode.ValueType(gpu.mig),
            profiles=profiles,
            emulated=self._gpus.emulated,
            notice=_notice(gpu, emulated=self._gpus.emulated),
        )

    def _profiles(self, gpu: GpuFacts) -> list[Profile]:
        driver = self._gpus.driver
        return [
            Profile(
                name=profile.name,
                profile_id=profile.profile_id,
                memory_mib=profile.memory_mib,
                compute_slices=profile.compute_slices,
                multiprocessors=profile.multiprocessors,
                max_instances=profile.max_instances,
                placements=[Placement(start=span.start, size=span.size) for span in profile.placements],
                remaining_instances=driver.remaining(gpu.uuid, profile.profile_id),
            )
            for profile in driver.profiles(gpu.uuid)
        ]


def _notice(gpu: GpuFacts, *, emulated: bool) -> str:
    if gpu.notice:
        return gpu.notice
    if gpu.mig is Mig.DISABLED:
        command = mig_command(gpu.index, emulated=emulated)
        return f"MIG mode is off: enable it with `{command}`, as root, while nothing uses the GPU"
    if gpu.mig is Mig.NOT_SUPPORTED:
        return f"{gpu.model} cannot be cut: MIG needs an A30, an A100 or a later data-centre GPU"
    return ""
