"""A container in the terms of libpod (its SpecGenerator). Pure, but for what the host is asked about itself."""

from __future__ import annotations

import resource
from collections.abc import Collection
from typing import Any

from nodedaemon.runtime import CODE_PATH, OUTPUTS_PATH, WORKSPACE_PATH, ContainerSpec, Mount

__all__ = ["enforced_limits", "spec_generator"]

_DEFAULT_PIDS = 4096
_MOST_FILES = 65536
# Writable places of a container that are memory of the host; without a size each could take half of it.
_TMPFS = {"/tmp": "512m", "/var/tmp": "512m", "/run": "64m"}  # noqa: S108 - the container's own
_TMPFS_OPTIONS = ("rw", "nosuid", "nodev", "mode=1777")
_SHM_BYTES = 2**30  # PyTorch's data loaders pass batches through it; the usual 64 MiB ends them with a bus error
_CONTROLLERS = (("cpus", "cpu"), ("host_memory", "memory"), ("pids", "pids"))


def spec_generator(spec: ContainerSpec, node_id: str, limits: Collection[str], parent: str = "") -> dict[str, Any]:
    """Returns what libpod is to make of a container.

    Args:
        spec: the container.
        node_id: label of this daemon's containers.
        limits: what this host can limit, as `enforced_limits` returns it. The rest is left out: Podman refuses it.
        parent: cgroup below which the container gets one of its own; empty when it gets none.
    """
    most_files = min(_MOST_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    return {
        "name": spec.name,
        "image": spec.image,
        # An image's own entrypoint would take the command for its arguments.
        "entrypoint": [spec.command[0]],
        "command": list(spec.command[1:]),
        "env": {**spec.env, "HOME": WORKSPACE_PATH, "PUHUI_OUTPUTS": OUTPUTS_PATH},
        "labels": {**spec.labels, "puhui.node": node_id},
        "work_dir": CODE_PATH,
        # Root in its own user namespace is this unprivileged user outside, so what it writes is that user's.
        "user": "0:0",
        "init": True,
        "cap_drop": ["ALL"],
        "no_new_privileges": True,
        "read_only_filesystem": True,
        "netns": {"nsmode": "slirp4netns" if spec.network else "none"},
        "image_volume_mode": "ignore",
        "mounts": [
            _bind(Mount(spec.workspace, WORKSPACE_PATH, read_only=False)),
            _bind(Mount(spec.code, CODE_PATH)),
            *(_bind(mount) for mount in spec.mounts),
            *(
                {
                    "destination": path,
                    "type": "tmpfs",
                    "options": ["rw", "nosuid", "nodev", "mode=1777", f"size={size}"],
                }
                for path, size in _TMPFS.items()
            ),
        ],
        "shm_size": _SHM_BYTES,
        "r_limits": [
            {"type": "core", "soft": 0, "hard": 0},
            {"type": "nofile", "soft": most_files, "hard": most_files},
        ],
        "resource_limits": _resource_limits(spec, limits),
        "log_configuration": {"driver": "k8s-file", "path": str(spec.log)},
        # Without a parent, Podman with the cgroupfs manager leaves a rootless container in its starter's cgroup.
        # conmon would be put into one for all conmons, under the limits of this container.
        **({"cgroup_parent": parent, "cgroups_mode": "no-conmon"} if parent else {}),
    }


def _resource_limits(spec: ContainerSpec, enforced: Collection[str]) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if "cpus" in enforced and spec.cpus:
        limits["cpu"] = {"quota": int(spec.cpus * 100_000), "period": 100_000}
    if "host_memory" in enforced and spec.host_memory_mib:
        # Swap counts in: without it a container would only be slow where it should end.
        limits["memory"] = {"limit": spec.host_memory_mib * 2**20, "swap": spec.host_memory_mib * 2**20}
    if "pids" in enforced:
        limits["pids"] = {"limit": spec.pids or _DEFAULT_PIDS}
    return limits


def _bind(mount: Mount) -> dict[str, Any]:
    options = ["rbind", "ro" if mount.read_only else "rw", "nosuid", "dev" if mount.device else "nodev"]
    return {"destination": mount.target, "type": "bind", "source": str(mount.source), "options": options}


def enforced_limits(controllers: Collection[str]) -> list[str]:
    """Returns the limits that can be enforced on a container: "cpus", "host_memory", "pids".

    Args:
        controllers: those of the container's own cgroup.
    """
    return [limit for limit, controller in _CONTROLLERS if controller in controllers]
