"""What a container must be given to see its slices, and no others.

A process may use a slice when it can open the cap nodes of its GPU instance and of its compute instance. Pure, but for
reading where the nodes are: facts in, nodes and mounts out.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from nodedaemon.runtime import Mount
from puhui.rpc.errors import Refusal

__all__ = [
    "CAPS_PATH",
    "CardDevices",
    "SliceIds",
    "cap_nodes",
    "card_mounts",
    "library_mounts",
    "read_minors",
    "require_cap_nodes",
    "require_card_node",
]

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
            OSError: ldconfig is not there, or fails.
        """
        done = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"`/sbin/ldconfig -p` fails, so the driver's libraries are not found: {done.stderr.strip()}")
        listed = done.stdout
        return cls(Path("/dev/nvidia-caps"), Path("/proc/driver/nvidia-caps/mig-minors"), False, library_mounts(listed))


def read_minors(text: str) -> dict[str, int]:
    """Returns the minor of each cap node by its name, such as "gpu0/gi1/ci0/access".

    Args:
        text: content of mig-minors.
    """
    return {name: int(minor) for name, _, minor in (line.rpartition(" ") for line in text.splitlines()) if name}


def cap_nodes(slices: Sequence[SliceIds], cards: CardDevices, minors: Mapping[str, int]) -> dict[str, Path]:
    """Returns where the cap nodes of slices are on the host, by the name that a container finds them under.

    Args:
        slices: the slices; none is nothing.
        cards: where the device files are.
        minors: as `read_minors` returns them.

    Raises:
        Refusal: FAILED_PRECONDITION with CAP_NODE_MISSING, the driver has no cap node of a slice.
    """
    nodes: dict[str, Path] = {}
    for one in slices:
        name = f"gpu{one.gpu_minor}/gi{one.gi}"
        for cap in (f"{name}/access", f"{name}/ci{one.ci}/access"):
            if cap not in minors:
                raise _cap_node_missing(
                    f"the driver's list of minors has no {cap}: destroy the slice and make it anew", cap
                )
            node = f"nvidia-cap{minors[cap]}"
            nodes[node] = cards.caps / node
    return nodes


def card_mounts(gpu_minors: Iterable[int], cards: CardDevices) -> list[Mount]:
    """Returns what a container must be given to use any slice that it sees now or later.

    That is the driver's control nodes and libraries, and the node of every GPU that is cut. The node of such a GPU
    gives nothing to compute with by itself: that takes the cap nodes of a slice. A GPU that is not cut is all
    behind its node, and must never be given so.

    Args:
        gpu_minors: minors of the GPUs that have MIG mode on.
        cards: where the device files are; emulated cards have none but the cap nodes.
    """
    if cards.emulated:
        return []
    nodes = ["nvidiactl", "nvidia-uvm", *(f"nvidia{minor}" for minor in sorted(gpu_minors))]
    return [
        *(Mount(Path("/dev", node), f"/dev/{node}", read_only=False, device=True) for node in nodes),
        *(Mount(library, str(library)) for library in cards.libraries),
    ]


def require_cap_nodes(nodes: Mapping[str, Path], minors: Mapping[str, int]) -> None:
    """Refuses when a cap node is missing on this host: Podman would only say that some file is.

    Args:
        nodes: as `cap_nodes` returns them.
        minors: as `read_minors` returns them.

    Raises:
        Refusal: FAILED_PRECONDITION with CAP_NODE_MISSING.
    """
    names = {f"nvidia-cap{minor}": name for name, minor in minors.items()}
    for node, source in nodes.items():
        if not source.exists():
            gpu, _, rest = names[node].partition("/")
            raise _cap_node_missing(
                f"this host has no {source}: make it, as root, with "
                f"`nvidia-modprobe -f /proc/driver/nvidia/capabilities/{gpu}/mig/{rest}`",
                node,
            )


def require_card_node(gpu_minor: int, root: Path) -> None:
    """Refuses a GPU whose node a living container was not given when it was made: MIG mode was off then.

    Args:
        gpu_minor: minor of the GPU.
        root: the container's root directory, as the host sees it. One that may not be looked into is not refused.

    Raises:
        Refusal: FAILED_PRECONDITION with HOTPLUG_UNAVAILABLE.
    """
    node = f"/dev/nvidia{gpu_minor}"
    try:
        there = (root / node[1:]).exists()
    except PermissionError:
        return
    if not there:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "HOTPLUG_UNAVAILABLE",
            f"this container was made when {node} was not cut into slices, and cannot be given it now; use a slice of "
            "another GPU, or create the container anew",
            node=node,
        )


def _cap_node_missing(message: str, node: str) -> Refusal:
    return Refusal(grpc.StatusCode.FAILED_PRECONDITION, "CAP_NODE_MISSING", message, node=node)


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
