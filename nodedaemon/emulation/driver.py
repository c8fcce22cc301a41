"""The emulated driver of one node: its state on disk, and what every call needs of it."""

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodedaemon.emulation import mig_mode
from nodedaemon.emulation.caller import Caller, ThisProcess
from nodedaemon.emulation.caps import CONFIG_MINOR, MONITOR_MINOR, CapNodes
from nodedaemon.emulation.cards import CardSpec, models_of
from nodedaemon.emulation.events import EventSets
from nodedaemon.emulation.faults import FaultPlan, Latency
from nodedaemon.emulation.gpm import Samples
from nodedaemon.emulation.gpm_counters import GpmCounters
from nodedaemon.emulation.handles import Kind, concerned, decode_device, decode_serial
from nodedaemon.emulation.holders import Holders, ProcHolders
from nodedaemon.emulation.injection import Injection
from nodedaemon.emulation.operator import Operator
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
        uuid_policy: Whether a MIG device created again gets a new UUID; None leaves it as the state
            has it, which is new at first.
        latency: How slow each call of this process is; None for what the state says.
        caller: For whom this process passes.
        holders: How processes that hold a cap node are found.

    Attributes:
        state_dir: As given.
        caps: The cap nodes and the minors file.
        faults: What calls of this process alone are to meet.
        operator: What an operator does: faults for all processes, latency, resets, reboots.
        samples: The GPM sample buffers of this process.
        event_sets: The event sets of this process.
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
        uuid_policy: UuidPolicy | None = None,
        latency: Latency | None = None,
        caller: Caller | None = None,
        holders: Holders | None = None,
    ) -> None:
        self.state_dir = state_dir
        self.caps = CapNodes(state_dir)
        self._caller = caller or ThisProcess()
        self._holders = holders or ProcHolders()
        self._store = StateStore(state_dir)
        self.operator = Operator(state_dir, holders=self._holders)
        self._injection = Injection(self._store, latency)
        self.faults: FaultPlan = self._injection.plan
        self.samples = Samples()
        self.event_sets = EventSets()
        self.gpm_counters = GpmCounters(self._store, self.caps, self._holders)
        self._init_lock = threading.Lock()
        self._init_count = 0
        state_dir.mkdir(parents=True, exist_ok=True)
        self._power_on(models_of(cards), mig_enabled=mig_enabled, uuid_policy=uuid_policy)

    def _power_on(self, models: list[str], *, mig_enabled: bool, uuid_policy: UuidPolicy | None) -> None:
        boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
        with self._store.locked():
            if not self._store.exists():
                node = new_node(models, boot_id=boot_id, mig_enabled=mig_enabled)
            else:
                node = self._store.load()
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
            if uuid_policy is not None:
                node.uuid_policy = uuid_policy
            self._store.write(node)
            self.caps.prepare(node)

    # What an operator does, not what NVML offers.

    def reboot(self) -> None:
        """Reboot the node, as `Operator.reboot` does."""
        self.operator.reboot()

    def reset_gpu(self, index: int) -> None:
        """Reset one card, as `Operator.reset_gpu` does."""
        self.operator.reset_gpu(index)

    # What the calls are made of.

    @contextmanager
    def call(self, function: str, subject: Any, *, needs_init: bool) -> Iterator[None]:
        """Run one call inside its latency, its fault and its need of nvmlInit.

        Args:
            function: NVML function name, without ``_v2``.
            subject: Its first argument, which may be a handle, or None.
            needs_init: Whether it answers UNINITIALIZED before nvmlInit.

        Raises:
            Refusal: The injected fault's code, or UNINITIALIZED.
        """
        with self._injection.around(function, lambda: self._gpu_index(function, subject)):
            if needs_init and not self._init_count:
                raise Refusal(Code.UNINITIALIZED)
            yield

    def _gpu_index(self, function: str, subject: Any) -> int | None:
        """Return the index of the card that a call is about, or None."""
        if function == "nvmlDeviceGetHandleByIndex":
            return int(subject)
        about = concerned(subject)
        if about is None or about.gpu is not None:
            return None if about is None else about.gpu
        for gpu in self._store.read().gpus:
            for instance in gpu.instances:
                if about.serial in (instance.serial, *(c.serial for c in instance.compute_instances)):
                    return gpu.minor
        return None

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
        """Return the state of this moment, or as an injected fault shows it; only to look at."""
        return self._injection.view or self._store.read()

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

    def require_monitor(self, gpu: Gpu) -> None:
        """Refuse with NO_PERMISSION whoever may not see all instances of a card in MIG mode at once.

        That takes root, or read access to the ``monitor`` cap node.
        """
        if gpu.mig and not (self._caller.is_root() or self._caller.may_read(self.caps.path(MONITOR_MINOR))):
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
