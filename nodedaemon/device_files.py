"""What NVIDIA's kernel driver tells of its device files. Parsers, and the walk that finds what they parse.

Source: NVIDIA's MIG user guide, "Device Nodes and Capabilities", and the sources of nvidia-modprobe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CAPS_MAJOR",
    "CONFIG",
    "MONITOR",
    "Capability",
    "capabilities",
    "char_majors",
    "gpu_minors",
    "minors_of_gpus",
    "parse_capability",
]

CAPS_MAJOR = "nvidia-caps"
"""Name of the cap nodes' major in /proc/devices."""
CONFIG = "config"
"""The capability to create and destroy instances, as mig-minors calls it."""
MONITOR = "monitor"
"""The capability to watch instances, as mig-minors calls it."""


@dataclass(frozen=True)
class Capability:
    """One capability that exists now: config, monitor, or access to one instance."""

    name: str
    """As mig-minors calls it, such as "gpu0/gi1/ci0/access"."""
    minor: int
    mode: int
    """What the driver wants its node's permission bits to be."""
    modify: bool
    """Whether nvidia-modprobe, which any user may start, puts the node's owner and mode back to the driver's."""
    file: Path
    """The file below /proc that says so."""


def char_majors(devices: str) -> dict[str, int]:
    """Returns the major of each character device driver by name.

    Args:
        devices: content of /proc/devices.
    """
    characters = devices.partition("Character devices:")[2].partition("Block devices:")[0]
    pairs = (line.split(None, 1) for line in characters.splitlines() if line.strip())
    return {name.strip(): int(major) for major, name in pairs if major.isdecimal()}


def parse_capability(text: str) -> dict[str, int]:
    """Returns the fields of a capability file, such as {"DeviceFileMinor": 1, "DeviceFileMode": 256}."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): int(value) for name, _, value in pairs if value.strip().isdecimal()}


def capabilities(root: Path) -> list[Capability]:
    """Returns every MIG capability that exists now, by name.

    Args:
        root: where /proc is to be found; "/" but in tests.

    Raises:
        OSError: they cannot be read.
    """
    top = root / "proc/driver/nvidia/capabilities"
    found = []
    for file in sorted([*top.glob("mig/*"), *top.glob("gpu*/mig/gi*/access"), *top.glob("gpu*/mig/gi*/ci*/access")]):
        fields = parse_capability(file.read_text())
        if "DeviceFileMinor" in fields:
            found.append(
                Capability(
                    name=str(file.relative_to(top)).replace("/mig/", "/").removeprefix("mig/"),
                    minor=fields["DeviceFileMinor"],
                    mode=fields.get("DeviceFileMode", 0o444),
                    modify=fields.get("DeviceFileModify", 1) != 0,
                    file=file,
                )
            )
    return found


def gpu_minors(root: Path) -> list[int]:
    """Returns the device minor of each GPU that the driver has taken, ascending.

    Args:
        root: as `capabilities` takes it.

    Raises:
        OSError: they cannot be read.
    """
    minors = []
    for file in (root / "proc/driver/nvidia/gpus").glob("*/information"):
        fields = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        minor = fields.get("Device Minor", "").strip()
        if minor.isdecimal():
            minors.append(int(minor))
    return sorted(minors)


def minors_of_gpus(minors: Mapping[str, int], gpus: list[int]) -> dict[str, int]:
    """Returns the minors of every instance that these GPUs can ever have: they are the same whether it exists or not.

    Args:
        minors: as `nodedaemon.devices.read_minors` returns them.
        gpus: device minors of the GPUs.
    """
    wanted = {f"gpu{gpu}" for gpu in gpus}
    return {name: minor for name, minor in minors.items() if name.partition("/")[0] in wanted}
