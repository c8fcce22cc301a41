"""Where the nodes of slices are on the host, and which processes of a container hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import grpc
import structlog

from nodedaemon.devices import CardDevices, SliceIds, cap_nodes, read_minors, require_cap_nodes
from nodedaemon.driver_facts import GpuFacts, Mig
from nodedaemon.gpus import Gpus
from nodedaemon.holders import Holder, holder
from nodedaemon.hotplug import HotPlug
from nodedaemon.records import ContainerRecord, SliceRecord
from puhui.rpc.errors import Refusal

__all__ = ["CutSlice", "SliceNodes", "in_use"]

_log = structlog.get_logger(__name__)

_MOST_NAMED = 8

CutSlice = tuple[SliceRecord, GpuFacts]
"""A slice, and the GPU that it is cut from."""


class SliceNodes:
    """The device nodes of the slices of this node.

    Args:
        gpus: the GPUs that the slices are on.
        cards: where the driver keeps its device files.
        hotplug: what knows which files processes have open.
    """

    def __init__(self, gpus: Gpus, cards: CardDevices, hotplug: HotPlug) -> None:
        self._gpus = gpus
        self._cards = cards
        self._hotplug = hotplug

    def sources(self, slices: Sequence[CutSlice]) -> dict[str, Path]:
        """Returns where the cap nodes of slices should be on the host, by name.

        Raises:
            Refusal: FAILED_PRECONDITION with CAP_NODE_MISSING; INTERNAL with DRIVER_REFUSED.
        """
        for _, gpu in slices:
            if gpu.mig is Mig.UNKNOWN:
                raise Refusal(
                    grpc.StatusCode.INTERNAL,
                    "DRIVER_REFUSED",
                    f"GPU {gpu.index} does not answer, so which nodes are its slices' is not known: {gpu.notice}",
                    gpu_uuid=gpu.uuid,
                )
        ids = [SliceIds(gpu.minor, one.gi or 0, one.ci or 0) for one, gpu in slices]
        return cap_nodes(ids, self._cards, self._minors()) if ids else {}

    def require(self, slices: Sequence[CutSlice]) -> dict[str, Path]:
        """Returns where the cap nodes of slices are on the host, by name.

        Raises:
            Refusal: FAILED_PRECONDITION with CAP_NODE_MISSING.
        """
        nodes = self.sources(slices)
        if nodes:
            require_cap_nodes(nodes, self._minors())
        return nodes

    async def holders(self, record: ContainerRecord, one: SliceRecord, gpu: GpuFacts) -> list[Holder]:
        """Returns the processes of a container that hold a slice, as the driver says or as their open files do.

        Raises:
            Refusal: FAILED_PRECONDITION with HOLDERS_UNKNOWN; as `HotPlug.holders` does.
        """
        files = [source for source in self.sources([(one, gpu)]).values() if source.exists()]
        found: dict[int, Holder] = {}
        try:
            listed = await self._gpus.holders(gpu, one.gi or 0)
            found = {held.pid: held for held in listed if held.container == record.container_id}
        except Refusal as error:
            # NVML does not show processes to every user. A process that computes has the GPU itself open, on whichever
            # of its slices; what cannot be told apart counts as held.
            _log.info("the driver does not name who holds a slice", gpu=gpu.index, error=error.message)
            if not self._cards.emulated:
                files.append(Path(f"/dev/nvidia{gpu.minor}"))
        for pid in await self._hotplug.holders(record.pid, files):
            found.setdefault(pid, replace(holder(pid), container=record.container_id))
        return [found[pid] for pid in sorted(found)]

    async def all_holders(self, record: ContainerRecord, slices: Sequence[CutSlice]) -> list[Holder]:
        """Returns the processes of a container that hold any of these slices, by process id.

        Raises:
            Refusal: as `holders` does.
        """
        found: dict[int, Holder] = {}
        for one, gpu in slices:
            found |= {held.pid: held for held in await self.holders(record, one, gpu)}
        return [found[pid] for pid in sorted(found)]

    def _minors(self) -> dict[str, int]:
        return read_minors(self._cards.minors.read_text())


def in_use(record: ContainerRecord, one: SliceRecord, holders: Sequence[Holder]) -> Refusal:
    """Returns the refusal to detach a slice that is held, naming who holds it."""
    who = ", ".join(str(held) for held in holders[:_MOST_NAMED])
    more = f" and {len(holders) - _MOST_NAMED} more" if len(holders) > _MOST_NAMED else ""
    return Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "SLICE_IN_USE",
        f"slice {one.uuid} is held by process {who}{more}; end it, or have it close the card, then detach again",
        slice_uuid=one.uuid,
        container_id=record.container_id,
        holders=who,
    )
