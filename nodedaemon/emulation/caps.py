"""The cap nodes: who may use a slice is who may open its node.

On hardware they are character devices in ``/dev/nvidia-caps``; here they are empty regular files.
Their minors are looked up by path in ``mig-minors``, as in ``/proc/driver/nvidia-caps/mig-minors``.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from nodedaemon.emulation.state import ComputeInstance, Gpu, GpuInstance, Node

CONFIG_MINOR = 1
MONITOR_MINOR = 2
_FIRST_ACCESS_MINOR = 3
_PER_GPU = 135
_PER_GPU_INSTANCE = 9
_GPU_INSTANCE_IDS = 15
_COMPUTE_INSTANCE_IDS = 8

# As nvidia-modprobe makes them: config for the owner alone, the rest readable by all.
_MODES = {CONFIG_MINOR: 0o400}
_DEFAULT_MODE = 0o444


def gpu_instance_minor(gpu_minor: int, instance_id: int) -> int:
    """Return the cap minor of a GPU instance: ``3 + 135·gpu + 9·gi``."""
    return _FIRST_ACCESS_MINOR + _PER_GPU * gpu_minor + _PER_GPU_INSTANCE * instance_id


def compute_instance_minor(gpu_minor: int, instance_id: int, compute_id: int) -> int:
    """Return the cap minor of a compute instance: that of its GPU instance, plus ``1 + ci``."""
    return gpu_instance_minor(gpu_minor, instance_id) + 1 + compute_id


class CapNodes:
    """The cap nodes of one emulated node.

    A node is made before the state that names its instance is committed, and removed after the
    state that no longer does, so a crash in between leaves a node too many, never one too few.

    Args:
        state_dir: Gets ``caps/`` and ``mig-minors``.

    Attributes:
        directory: Stands for ``/dev/nvidia-caps``.
        minors_file: Stands for ``/proc/driver/nvidia-caps/mig-minors``.
    """

    def __init__(self, state_dir: Path) -> None:
        self.directory = state_dir / "caps"
        self.minors_file = state_dir / "mig-minors"

    def path(self, minor: int) -> Path:
        """Return where the node with this minor is, or would be."""
        return self.directory / f"nvidia-cap{minor}"

    def gpu_instance(self, gpu: Gpu, instance: GpuInstance) -> Path:
        """Return the node of a GPU instance."""
        return self.path(gpu_instance_minor(gpu.minor, instance.id))

    def compute_instance(self, gpu: Gpu, instance: GpuInstance, compute: ComputeInstance) -> Path:
        """Return the node of a compute instance."""
        return self.path(compute_instance_minor(gpu.minor, instance.id, compute.id))

    def add(self, node: Path) -> None:
        """Make a node, always a new inode: who still holds an old one does not hold this one."""
        node.unlink(missing_ok=True)
        mode = _MODES.get(int(node.name.removeprefix("nvidia-cap")), _DEFAULT_MODE)
        descriptor = os.open(node, os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC, mode)
        try:
            os.fchmod(descriptor, mode)  # the umask is the caller's, the mode is the driver's
        finally:
            os.close(descriptor)

    def remove(self, node: Path) -> None:
        """Remove a node."""
        node.unlink(missing_ok=True)

    def prepare(self, node: Node) -> None:
        """Make the directory, the minors file and every node of the state; remove all others."""
        self.directory.mkdir(exist_ok=True)
        temporary = self.minors_file.with_suffix(".new")
        temporary.write_text("".join(_minor_lines(node)), encoding="ascii")
        temporary.replace(self.minors_file)
        wanted = {self.path(CONFIG_MINOR), self.path(MONITOR_MINOR)}
        for gpu in node.gpus:
            wanted |= set(self.of_gpu(gpu))
        present = set(self.directory.iterdir())
        for extra in present - wanted:
            self.remove(extra)
        for missing in wanted - present:
            self.add(missing)

    def of_gpu(self, gpu: Gpu) -> Iterator[Path]:
        """Yield every node that belongs to an instance of the GPU."""
        for instance in gpu.instances:
            yield self.gpu_instance(gpu, instance)
            for compute in instance.compute_instances:
                yield self.compute_instance(gpu, instance, compute)


def _minor_lines(node: Node) -> Iterator[str]:
    """Yield the lines of ``mig-minors``: every id that could exist, whether or not it does."""
    yield f"config {CONFIG_MINOR}\n"
    yield f"monitor {MONITOR_MINOR}\n"
    for gpu in node.gpus:
        for gi in range(_GPU_INSTANCE_IDS):
            yield f"gpu{gpu.minor}/gi{gi}/access {gpu_instance_minor(gpu.minor, gi)}\n"
            for ci in range(_COMPUTE_INSTANCE_IDS):
                minor = compute_instance_minor(gpu.minor, gi, ci)
                yield f"gpu{gpu.minor}/gi{gi}/ci{ci}/access {minor}\n"
