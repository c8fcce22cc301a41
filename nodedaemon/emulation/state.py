"""What the emulated silicon remembers: plain data, and its JSON form."""

import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from nodedaemon.emulation.faults import Fault, Latency
from nodedaemon.emulation.geometry import CardModel, Placement, card_models


class UuidPolicy(StrEnum):
    """Whether a MIG device that is created again at the same ids gets its old UUID.

    Hardware has been seen to do either, so software must accept both.
    """

    NEW = "new"
    REUSED = "reused"


@dataclass(slots=True)
class ComputeInstance:
    """A compute instance, which is also one MIG device.

    Attributes:
        serial: Unique on this node for ever, so that a stale handle is recognised.
        start: First compute slice inside its GPU instance.
        size: Compute slices.
        mig_index: Index of the MIG device under its GPU.
    """

    id: int
    serial: int
    profile_id: int
    start: int
    size: int
    mig_index: int
    uuid: str

    @property
    def placement(self) -> Placement:
        """Where it sits, in compute slices of its GPU instance."""
        return Placement(self.start, self.size)


@dataclass(slots=True)
class GpuInstance:
    """A GPU instance and the compute instances in it.

    Attributes:
        serial: Unique on this node for ever, so that a stale handle is recognised.
        start: First memory slice.
        size: Memory slices.
    """

    id: int
    serial: int
    profile_id: int
    start: int
    size: int
    compute_instances: list[ComputeInstance] = field(default_factory=list)

    @property
    def placement(self) -> Placement:
        """Where it sits, in memory slices of its GPU."""
        return Placement(self.start, self.size)


@dataclass(slots=True)
class Gpu:
    """One card.

    Attributes:
        minor: Device minor number, equal to the NVML index.
        mig: Whether MIG mode is on now.
        mig_pending: Whether it is to be on after the next reset.
        gpm_streaming: Whether GPM streaming is on.
    """

    minor: int
    model: str
    uuid: str
    mig: bool
    mig_pending: bool
    instances: list[GpuInstance] = field(default_factory=list)
    gpm_streaming: bool = False

    @property
    def card(self) -> CardModel:
        """What this model can do."""
        return card_models()[self.model]

    def mig_devices(self) -> Iterator[tuple[GpuInstance, ComputeInstance]]:
        """Yield each MIG device as its GPU instance and compute instance."""
        for instance in self.instances:
            for compute in instance.compute_instances:
                yield instance, compute


@dataclass(slots=True)
class Node:
    """Every card of the node.

    Attributes:
        boot_id: The kernel's boot that this state belongs to.
        last_serial: The highest serial given out; it only grows.
        uuid_policy: Whether a MIG device created again gets a new UUID.
        latency: How slow each call is.
        faults: What calls are to meet, whichever process makes them.
        before: The cards before their last change; kept only while a stale fault waits.
    """

    boot_id: str
    last_serial: int
    gpus: list[Gpu]
    uuid_policy: UuidPolicy = UuidPolicy.NEW
    latency: Latency = field(default_factory=Latency)
    faults: list[Fault] = field(default_factory=list)
    before: list[Gpu] | None = None

    def next_serial(self) -> int:
        """Give out a serial that no instance has ever had."""
        self.last_serial += 1
        return self.last_serial

    def to_json(self) -> str:
        """Return the JSON text."""
        return json.dumps(self, default=_fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Node":
        """Read the JSON form back.

        Raises:
            KeyError: A field is missing.
            TypeError: A field is too many or of the wrong shape.
            ValueError: A value is none of those that are possible.
        """
        before = document.get("before")
        return cls(
            document["boot_id"],
            document["last_serial"],
            _gpus(document["gpus"]),
            UuidPolicy(document.get("uuid_policy", UuidPolicy.NEW)),
            Latency(**document.get("latency", {})),
            [Fault.from_json(fault) for fault in document.get("faults", [])],
            None if before is None else _gpus(before),
        )


def _fields(record: Any) -> dict[str, Any]:
    # Each is a dataclass with slots; dataclasses.asdict takes ten times as long.
    return {name: getattr(record, name) for name in record.__slots__}


def _gpus(documents: list[dict[str, Any]]) -> list[Gpu]:
    return [Gpu(**{**gpu, "instances": [_gpu_instance(i) for i in gpu["instances"]]}) for gpu in documents]


def _gpu_instance(document: dict[str, Any]) -> GpuInstance:
    compute = [ComputeInstance(**c) for c in document["compute_instances"]]
    return GpuInstance(**{**document, "compute_instances": compute})


def new_node(models: Iterable[str], *, boot_id: str, mig_enabled: bool) -> Node:
    """Return a node with empty cards and fresh, random GPU UUIDs."""
    gpus = [Gpu(minor, model, f"GPU-{uuid.uuid4()}", mig_enabled, mig_enabled) for minor, model in enumerate(models)]
    return Node(boot_id, 0, gpus)


def mig_uuid(gpu: Gpu, instance: GpuInstance, ci_id: int, serial: int, policy: UuidPolicy) -> str:
    """Return the UUID of a MIG device: its ids alone decide it, or its serial as well."""
    seed = f"{gpu.uuid}/{instance.id}/{ci_id}"
    if policy is UuidPolicy.NEW:
        seed += f"/{serial}"
    return f"MIG-{uuid.uuid5(uuid.NAMESPACE_OID, seed)}"
