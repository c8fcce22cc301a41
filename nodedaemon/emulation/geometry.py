"""How each card model can be cut, as recorded on hardware.

The recordings are in ``geometry.json`` beside this module, each with its sources. A value that no
recording shows is null there and ``None`` here; whatever needs it refuses with NOT_SUPPORTED.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any, NamedTuple, TypeVar

from nodedaemon.emulation.refusal import Code, Refusal

T = TypeVar("T")


def known(cell: T | None) -> T:
    """Return a recorded value.

    Raises:
        Refusal: NOT_SUPPORTED, when no recording shows it.
    """
    if cell is None:
        raise Refusal(Code.NOT_SUPPORTED)
    return cell


class Placement(NamedTuple):
    """A run of slices: memory slices for a GPU instance, compute slices for a compute instance."""

    start: int
    size: int

    def overlaps(self, other: "Placement") -> bool:
        """Say whether the two share a slice."""
        return self.start < other.start + other.size and other.start < self.start + self.size


class Architecture(StrEnum):
    """GPU generations that differ in how MIG mode is switched."""

    AMPERE = "ampere"
    HOPPER = "hopper"
    BLACKWELL = "blackwell"


@dataclass(frozen=True, slots=True)
class GpuInstanceProfile:
    """One row of ``nvidia-smi mig -lgip``.

    Attributes:
        name: Such as ``1g.10gb``.
        id: What the create, placement and capacity calls take.
        enum: What the profile info call takes (``NVML_GPU_INSTANCE_PROFILE_*``).
        memory_mib: Memory of an instance, MiB.
        sm: Streaming multiprocessors.
        placements: Where an instance may sit on an empty card, in memory slices.
    """

    name: str
    id: int
    enum: int
    compute_slices: int
    memory_slices: int
    max_instances: int
    memory_mib: int | None
    sm: int | None
    copy_engines: int | None
    decoders: int | None
    encoders: int | None
    jpeg: int | None
    ofa: int | None
    placements: tuple[Placement, ...] | None


@dataclass(frozen=True, slots=True)
class CardModel:
    """One GPU model.

    Attributes:
        model: The name that Puhui's configuration uses, such as ``H100-80GB-SXM5``.
        name: What ``nvmlDeviceGetName`` reports on hardware.
        pci_device_id: Device id in the upper, vendor id in the lower 16 bits.
        memory_total_mib: Memory of the whole card, MiB.
        power_limit_watts: Board power, W.
        sm_per_compute_slice: Multiprocessors of a compute instance one slice wide inside a wider
            GPU instance.
    """

    model: str
    name: str
    architecture: Architecture
    compute_capability: tuple[int, int]
    pci_device_id: int | None
    memory_total_mib: int | None
    power_limit_watts: int | None
    memory_slices: int
    compute_slices: int
    sm_per_compute_slice: int | None
    profiles: tuple[GpuInstanceProfile, ...]

    def profile(self, profile_id: int) -> GpuInstanceProfile | None:
        """Return the profile with this id, or None."""
        return next((p for p in self.profiles if p.id == profile_id), None)

    def profile_by_enum(self, enum: int) -> GpuInstanceProfile | None:
        """Return the profile with this ``NVML_GPU_INSTANCE_PROFILE_*`` value, or None."""
        return next((p for p in self.profiles if p.enum == enum), None)

    @property
    def ofa_engines(self) -> int:
        """Optical flow engines of the whole card: those of the widest profile."""
        return max((p.ofa for p in self.profiles if p.ofa is not None), default=0)


def _profile(row: Mapping[str, Any]) -> GpuInstanceProfile:
    placements = row["placements"]
    return GpuInstanceProfile(
        **{key: value for key, value in row.items() if key != "placements"},
        placements=None if placements is None else tuple(Placement(*p) for p in placements),
    )


def _card(row: Mapping[str, Any]) -> CardModel:
    fields = {key: value for key, value in row.items() if key not in ("sources", "inferred")}
    pci = fields["pci_device_id"]
    fields["pci_device_id"] = None if pci is None else int(pci, 16)
    fields["architecture"] = Architecture(fields["architecture"])
    fields["compute_capability"] = tuple(fields["compute_capability"])
    fields["profiles"] = tuple(_profile(p) for p in fields["profiles"])
    return CardModel(**fields)


@cache
def _document() -> Mapping[str, Any]:
    text = resources.files(__package__).joinpath("geometry.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


@cache
def card_models() -> Mapping[str, CardModel]:
    """Return every known card model by its configuration name."""
    return {row["model"]: _card(row) for row in _document()["cards"]}


@cache
def compute_instance_limits() -> Mapping[int, Mapping[int, int]]:
    """Return how many compute instances fit.

    Returns:
        Compute slices of the GPU instance, to compute instance profile enum, to count.
    """
    table = _document()["compute_instances"]["max_instances"]
    return {int(slices): {int(enum): count for enum, count in row.items()} for slices, row in table.items()}
