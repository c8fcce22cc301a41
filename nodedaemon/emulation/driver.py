"""The emulated driver of one node: its state on disk, and what every call needs of it."""

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodedaemon.emulation import mig_mode
from nodedaemon.emulation.caller import Caller, ThisProcess
from nodedaemon.emulation.caps import CONFIG_MINOR, CapNodes
from nodedaemon.emulation.cards import CardSpec, models_of
from nodedaemon.emulation.faults import FaultPlan, Latency
from nodedaemon.emulation.gpm import Samples
from nodedaemon.emulation.gpm_counters import GpmCounters
from nodedaemon.emulation.handles import Kind, decode_device, decode_serial
from nodedaemon.emulation.holders import Holders, ProcHolders
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.state import (
    ComputeInstance,
    Gpu,
    GpuInstance,
    Node,
    UuidPolicy,
    new_node,
)
from nodedaemon.emulation.store import StateStore, Transaction

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class CardsChangedError(ValueError):
    """The state directory belongs to a node with other cards."""


class CardBusyError(RuntimeError):
    """A process holds a slice of the card that is to be reset."""


@dataclass(frozen=True, slots=True)
class MigDevice:
    """A MIG device as a call sees it: a compute instance and what it is part of."""

    gpu: Gpu
    instance: GpuInstance
    compute: ComputeInstance


class EmulatedDriver:
    """One node's emulated driver, as seen by one process.

    Every process of the node that is given the same directory sees the same cards. Use
    `nodedaemon.emulation.install` to put it under pynvml.

    Args:
        state_dir: Made if missing; holds the state, the cap nodes and the minors file.
        cards: The cards, in index order; on a directory with state they must be those it has.
        mig_enabled: Whether MIG mode is on when the cards are first made, and again after the host
            was rebooted (a boot service enables it on real nodes).
        uuid_policy: Whether a MIG device created again gets a new UUID.
        latency: How slow each call is.
        caller: For whom this process passes.
        holders: How processes that hold a cap node are found.

    Attributes:
        state_dir: As given.
        caps: The cap nodes and the minors file.
        faults: Calls of this process that are to fail.
        uuid_policy: As given.
        samples: The GPM sample buffers of this process.
        gpm_counters: What GPM samples are filled from.

    Raises:
        CardsChangedError: The directory has the state of other cards.
        DamagedStateError: The directory's state cannot be read.
    """

    def __init__(
        self,
        state_dir: Path,
        cards: Sequence[CardSpec],
        *,
        mig_enabled: bool = True,
        uuid_policy: UuidPolicy = UuidPolicy.NEW,
        latency: Latency | None = None,
        caller: Caller | None = None,
        holders: Holders | None = None,
    ) -> None:
        self.state_dir = state_dir
        self.caps = CapNodes(state_dir)
        self.faults = FaultPlan()
        self.uuid_policy = uuid_policy
        self._latency = latency or Latency()
        self._caller = caller or ThisProcess()
        self._holders = holders or ProcHolders()
        self._store = StateStore(state_dir)
        self.samples = Samples()
        self.gpm_counters = GpmCounters(self._store, self.caps, self._holders)
        self._init_lock = threading.Lock()
        self._init_count = 0
        state_dir.mkdir(parents=True, exist_ok=True)
        self._power_on(models_of(cards), mig_enabled=mig_enabled)

    def _power_on(self, models: list[str], *, mig_enabled: bool) -> None:
        boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
        with self._store.locked():
            if not self._store.exists():
                node = new_node(models, boot_id=boot_id, mig_enabled=mig_enabled)
            else:
                node = self._store.read()
                present = [gpu.model for gpu in node.gpus]
                if present != models:
                    raise CardsChangedError(
                        f"{self.state_dir} holds the state of {', '.join(present)}, not of"
                        f" {', '.join(models)}. Start with the same cards, or use another"
                        " directory, or remove this one."
                    )
                if node.boot_id != boot_id:
                    mig_mode.reboot(node)
                    node.boot_id = boot_id
                    for gpu in node.gpus:
                        gpu.mig = gpu.mig_pending = mig_enabled
            self._store.write(node)
            self.caps.prepare(node)

    # What an operator does, not what NVML offers.

    def reboot(self) -> None:
        """Reboot the node: instances are gone, and MIG mode is off on Hopper and later."""
        with self._store.transaction() as change:
            mig_mode.reboot(change.node)
            change.after_commit(lambda: self.caps.prepare(change.node))

    def reset_gpu(self, index: int) -> None:
        """Reset one card: instances are gone, and a pending MIG mode holds.

        Raises:
            CardBusyError: A process holds one of its slices.
            IndexError: There is no such card.
        """
        with self._store.transaction() as change:
            gpu = change.node.gpus[index]
            for node in self.caps.of_gpu(gpu):
                if self._holders.is_held(node):
                    raise CardBusyError(f"GPU {index} is in use: a process holds {node}. End it, then reset.")
            mig_mode.reset(gpu)
            change.after_commit(lambda: self.caps.prepare(change.node))

    # What the calls are made of.

    def enter(self, function: str, *, needs_init: bool) -> None:
        """Begin a call: its latency, its fault, its need of nvmlInit.

        Raises:
            Refusal: The injected fault's code, or UNINITIALIZED.
        """
        name = function.removesuffix("_v2").removesuffix("_v3")
        seconds = self._latency.of(name)
        if seconds > 0:
            time.sleep(seconds)
        code = self.faults.take(name)
        if code is not None:
            raise Refusal(code)
        if needs_init and not self._init_count:
            raise Refusal(Code.UNINITIALIZED)

    def init(self) -> None:
        """Count one nvmlInit of this process."""
        with self._init_lock:
            self._init_count += 1

    def shutdown(self) -> None:
        """Count one nvmlShutdown of this process.

        Raises:
            Refusal: UNINITIALIZED, when there were as many shutdowns as inits.
        """
        with self._init_lock:
            if not self._init_count:
                raise Refusal(Code.UNINITIALIZED)
            self._init_count -= 1

    def read(self) -> Node:
        """Return the state of this moment, to look at."""
        return self._store.read()

    @contextmanager
    def change(self) -> Iterator[Transaction]:
        """Change the state, all or nothing; the lock is held meanwhile."""
        with self._store.transaction() as change:
            yield change

    def require_root(self) -> None:
        """Refuse with NO_PERMISSION whoever may not toggle MIG mode."""
        if not self._caller.is_root():
            raise Refusal(Code.NO_PERMISSION)

    def require_config(self) -> None:
        """Refuse with NO_PERMISSION whoever may not manage instances.

        That takes root, or read access to the ``config`` cap node.
        """
        if not (self._caller.is_root() or self._caller.may_read(self.caps.path(CONFIG_MINOR))):
            raise Refusal(Code.NO_PERMISSION)

    def refuse_if_held(self, node: Path) -> None:
        """Refuse with IN_USE while a process holds the cap node; call it inside a change."""
        if self._holders.is_held(node):
            raise Refusal(Code.IN_USE)

    def processes(self, nodes: Collection[Path]) -> dict[Path, list[int]]:
        """Return the pids that hold each cap node, none of them missing from the result."""
        with self._store.locked():
            return self._holders.processes(nodes)

    # From a handle to what it stands for, in one state.

    def device(self, node: Node, handle: Any) -> Gpu | MigDevice:
        """Return the card or the MIG device of a device handle.

        Raises:
            Refusal: INVALID_ARGUMENT, when it stands for nothing that exists now.
        """
        index, mig = decode_device(handle)
        if index >= len(node.gpus):
            raise Refusal(Code.INVALID_ARGUMENT)
        gpu = node.gpus[index]
        if mig is None:
            return gpu
        for instance, compute in gpu.mig_devices():
            if compute.mig_index == mig:
                return MigDevice(gpu, instance, compute)
        raise Refusal(Code.INVALID_ARGUMENT)

    def gpu(self, node: Node, handle: Any, *, on_mig: Code = Code.INVALID_ARGUMENT) -> Gpu:
        """Return the card of a device handle.

        Args:
            node: The state.
            handle: A device handle.
            on_mig: What to answer for the handle of a MIG device.
        """
        device = self.device(node, handle)
        if isinstance(device, MigDevice):
            raise Refusal(on_mig)
        return device

    def gpu_instance(self, node: Node, handle: Any) -> tuple[Gpu, GpuInstance]:
        """Return the GPU instance of a handle, and its card."""
        serial = decode_serial(handle, Kind.GPU_INSTANCE)
        for gpu in node.gpus:
            for instance in gpu.instances:
                if instance.serial == serial:
                    return gpu, instance
        raise Refusal(Code.INVALID_ARGUMENT)

    def compute_instance(self, node: Node, handle: Any) -> MigDevice:
        """Return the compute instance of a handle, and what it is part of."""
        serial = decode_serial(handle, Kind.COMPUTE_INSTANCE)
        for gpu in node.gpus:
            for instance, compute in gpu.mig_devices():
                if compute.serial == serial:
                    return MigDevice(gpu, instance, compute)
        raise Refusal(Code.INVALID_ARGUMENT)
