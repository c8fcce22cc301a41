"""What a container must be given to see its slices, and no others.

A process may use a slice when it can open the cap nodes of its GPU instance and of its compute instance. Pure, but for
reading where the nodes are: facts in, mounts out.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nodedaemon.runtime import Mount

__all__ = ["CAPS_PATH", "CardDevices", "SliceIds", "library_mounts", "mounts_for", "read_minors"]

CAPS_PATH = "/dev/nvidia-caps"
"""Where a container looks for cap nodes."""

# What CUDA programs load of the driver; the rest of CUDA comes with the image.
_LIBRARIES = re.compile(
    r"lib(cuda|nvidia-ml|nvidia-ptxjitcompiler|nvidia-nvvm|nvidia-gpucomp|cudadebugger|nvidia-cfg)\.so"
)
_LISTED = re.compile(r"\s*(\S+) \(([^)]*)\) => (\S+)")


@dataclass(frozen=True)
class SliceIds:
    """A slice, as the device files name it."""

    gpu_minor: int
    gi: int
    ci: int


@dataclass(frozen=True)
class CardDevices:
    """Where a driver keeps its device files."""

    caps: Path
    """Directory of the cap nodes."""
    minors: Path
    """The file that tells the minor of each cap node."""
    emulated: bool
    libraries: tuple[Path, ...] = ()
    """The driver's libraries, which a container gets to see where the host has them."""

    @classmethod
    def real(cls) -> CardDevices:
        """Returns where the real driver of this host keeps them.

        Raises:
            OSError: ldconfig is not there.
        """
        listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
        return cls(Path("/dev/nvidia-caps"), Path("/proc/driver/nvidia-caps/mig-minors"), False, library_mounts(listed))


def read_minors(text: str) -> dict[str, int]:
    """Returns the minor of each cap node by its name, such as "gpu0/gi1/ci0/access".

    Args:
        text: content of mig-minors.
    """
    return {name: int(minor) for name, _, minor in (line.rpartition(" ") for line in text.splitlines()) if name}


def mounts_for(slices: Sequence[SliceIds], cards: CardDevices, minors: Mapping[str, int]) -> list[Mount]:
    """Returns what a container must be given to see these slices.

    Args:
        slices: the slices; none is nothing.
        cards: where the device files are.
        minors: as `read_minors` returns them.

    Raises:
        KeyError: the driver knows no cap node of a slice.
    """
    mounts: dict[str, Mount] = {}
    for one in slices:
        name = f"gpu{one.gpu_minor}/gi{one.gi}"
        for cap in (f"{name}/access", f"{name}/ci{one.ci}/access"):
            node = f"nvidia-cap{minors[cap]}"
            _add(mounts, Mount(cards.caps / node, f"{CAPS_PATH}/{node}", device=not cards.emulated))
    if slices and not cards.emulated:
        for node in ("nvidiactl", "nvidia-uvm", *sorted({f"nvidia{one.gpu_minor}" for one in slices})):
            _add(mounts, Mount(Path("/dev", node), f"/dev/{node}", read_only=False, device=True))
        for library in cards.libraries:
            _add(mounts, Mount(library, str(library)))
    return list(mounts.values())


def _add(mounts: dict[str, Mount], mount: Mount) -> None:
    mounts[mount.target] = mount


def library_mounts(listed: str) -> tuple[Path, ...]:
    """Returns the driver's 64-bit libraries.

    Args:
        listed: what `ldconfig -p` prints.
    """
    found = []
    for line in listed.splitlines():
        match = _LISTED.match(line)
        if match and _LIBRARIES.match(match[1]) and "64" in match[2]:
            found.append(Path(match[3]))
    return tuple(dict.fromkeys(found))
