"""What an operator of the emulation does, from any process of the node; NVML offers none of it."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from nodedaemon.emulation import mig_mode
from nodedaemon.emulation.caps import CapNodes
from nodedaemon.emulation.faults import Fault, Latency
from nodedaemon.emulation.holders import Holders, ProcHolders
from nodedaemon.emulation.refusal import Code
from nodedaemon.emulation.state import Node, UuidPolicy
from nodedaemon.emulation.store import StateStore


class CardBusyError(RuntimeError):
    """A process holds a slice of the card that is to be reset, or of the node that is to be rebooted."""


class UnknownSliceError(ValueError):
    """No slice has this UUID."""


class NoEmulationError(ValueError):
    """The directory has never held an emulated driver."""


class Operator:
    """The hands of whoever stands before the emulated machine.

    Args:
        state_dir: The emulated driver's directory.
        holders: How processes that hold a cap node are found.
    """

    def __init__(self, state_dir: Path, *, holders: Holders | None = None) -> None:
        self._store = StateStore(state_dir)
        self._caps = CapNodes(state_dir)
        self._holders = holders or ProcHolders()

    @classmethod
    def of_existing(cls, state_dir: Path) -> "Operator":
        """Return the operator of a directory that an emulated driver has used.

        Raises:
            NoEmulationError: It has not.
        """
        if not StateStore(state_dir).exists():
            raise NoEmulationError(
                f"{state_dir} holds no emulated driver. Name the state directory of a node daemon that was started"
                " with --emulate."
            )
        return cls(state_dir)

    def look(self) -> Node:
        """Return the state of this moment, to look at."""
        return self._store.read()

    def holders(self) -> dict[int, list[int]]:
        """Return who holds each GPU instance: its serial, to pids; those held by nobody are left out.

        Pid 0 stands for a holder that may not be seen from here.
        """
        with self._store.locked():
            node = self._store.read()
            found: dict[int, list[int]] = {}
            for gpu in node.gpus:
                for instance in gpu.instances:
                    nodes = list(self._caps.of_gpu(replace(gpu, instances=[instance])))
                    pids = self._pids(nodes)
                    if pids:
                        found[instance.serial] = pids
            return found

    def reboot(self, *, force: bool = True) -> list[int]:
        """Reboot the node: instances are gone, and MIG mode is off on Hopper and later.

        A real reboot ends every process; this one ends none.

        Args:
            force: Whether to go on although processes hold slices, which then hold nothing.

        Returns:
            The pids of those processes; 0 stands for one that may not be seen from here.

        Raises:
            CardBusyError: Processes hold slices, and it is not forced.
        """
        with self._store.transaction() as change:
            pids = self._pids([path for gpu in change.node.gpus for path in self._caps.of_gpu(gpu)])
            if pids and not force:
                raise CardBusyError(
                    f"Slices are held by {_name(pids)}. A real reboot would end them; this one ends no process."
                    " End them first, or use --force to take the slices away from under them."
                )
            mig_mode.reboot(change.node)
            change.after_commit(lambda: self._caps.prepare(change.node))
        return pids

    def reset_gpu(self, index: int) -> None:
        """Reset one card: instances are gone, and a pending MIG mode holds.

        Raises:
            CardBusyError: A process holds one of its slices.
            IndexError: There is no such card.
        """
        with self._store.transaction() as change:
            gpu = change.node.gpus[index]
            for path in self._caps.of_gpu(gpu):
                if self._holders.is_held(path):
                    raise CardBusyError(f"GPU {index} is in use: a process holds {path}. End it, then reset.")
            mig_mode.reset(gpu)
            change.after_commit(lambda: self._caps.prepare(change.node))

    def set_mig(self, index: int, *, enabled: bool) -> bool:
        """Ask for a MIG mode of one card, as `nvidia-smi -i INDEX -mig 1` does.

        Returns:
            Whether the card has it now. Otherwise, on Ampere, it has it after its reset.

        Raises:
            CardBusyError: The card has slices, and is later than Ampere.
            IndexError: There is no such card.
        """
        with self._store.transaction() as change:
            gpu = change.node.gpus[index]
            code = mig_mode.set_mode(gpu, enabled=enabled)
            if code is Code.IN_USE:
                raise CardBusyError(f"GPU {index} has slices. Have them destroyed first; `emulation show` lists them.")
            return code is Code.SUCCESS

    def inject(self, fault: Fault) -> None:
        """Add a fault that whichever process calls next will meet.

        A stale fault makes the state keep, from now on, how the cards were before their last change.
        """
        with self._store.transaction() as change:
            change.node.faults.append(fault)

    def clear_faults(self) -> int:
        """Forget every shared fault not yet used, and return how many there were."""
        with self._store.transaction() as change:
            count = len(change.node.faults)
            change.node.faults.clear()
        return count

    def set_latency(self, latency: Latency) -> None:
        """Make every call as slow as this, in each process that was given no latency of its own."""
        with self._store.transaction() as change:
            change.node.latency = latency

    def set_uuid_policy(self, policy: UuidPolicy) -> None:
        """Choose whether a MIG device that is created again gets a new UUID."""
        with self._store.transaction() as change:
            change.node.uuid_policy = policy

    def cap_node(self, uuid: str) -> Path:
        """Return the cap node of a slice's compute instance.

        Raises:
            UnknownSliceError: No slice has this UUID now.
        """
        for gpu in self._store.read().gpus:
            for instance, compute in gpu.mig_devices():
                if compute.uuid == uuid:
                    return self._caps.compute_instance(gpu, instance, compute)
        raise UnknownSliceError(f"No slice has the UUID {uuid!r}. `emulation show` lists those that exist.")

    def _pids(self, nodes: Collection[Path]) -> list[int]:
        if not nodes:
            return []
        by_node = self._holders.processes(nodes)
        pids = {pid for found in by_node.values() for pid in found}
        if any(not found and self._holders.is_held(path) for path, found in by_node.items()):
            pids.add(0)
        return sorted(pids)


def _name(pids: list[int]) -> str:
    seen = [str(pid) for pid in pids if pid]
    names = [f"process {', '.join(seen)}"] if seen else []
    if 0 in pids:
        names.append("a process that cannot be seen from here")
    return " and ".join(names)
