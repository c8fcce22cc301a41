"""What libpod is told about a container."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nodedaemon.podman_spec import enforced_limits, spec_generator
from nodedaemon.runtime import ContainerSpec, Mount

_SPEC = ContainerSpec(
    name="puhui-j-1",
    image="image",
    command=["python3", "main.py", "--epochs", "3"],
    env={"A": "b", "HOME": "/root"},
    labels={"puhui.job": "j-1"},
    code=Path("/state/code"),
    workspace=Path("/state/workspace"),
    log=Path("/state/log"),
    mounts=[Mount(Path("/dev/nvidia0"), "/dev/nvidia0", read_only=False, device=True)],
    cpus=1.5,
    host_memory_mib=1024,
)
_ALL = ("cpu", "memory", "pids")


def test_only_limits_that_the_host_can_enforce_are_asked_for() -> None:
    assert enforced_limits(_ALL) == ["cpus", "host_memory", "pids"]
    assert enforced_limits(["io", "memory"]) == ["host_memory"]
    assert enforced_limits([]) == []
    assert spec_generator(_SPEC, "n-1", [])["resource_limits"] == {}
    assert spec_generator(_SPEC, "n-1", enforced_limits(_ALL))["resource_limits"] == {
        "cpu": {"quota": 150_000, "period": 100_000},
        "memory": {"limit": 2**30, "swap": 2**30},
        "pids": {"limit": 4096},
    }
    unlimited = replace(_SPEC, cpus=0, host_memory_mib=0, pids=7)
    assert spec_generator(unlimited, "n-1", enforced_limits(_ALL))["resource_limits"] == {"pids": {"limit": 7}}


def test_a_container_gets_the_least_that_it_needs() -> None:
    told = spec_generator(_SPEC, "n-1", [])
    assert (told["entrypoint"], told["command"]) == (["python3"], ["main.py", "--epochs", "3"])
    assert told["cap_drop"] == ["ALL"]
    assert told["no_new_privileges"]
    assert told["read_only_filesystem"]
    assert told["netns"] == {"nsmode": "none"}
    assert told["env"] == {"A": "b", "HOME": "/workspace", "PUHUI_OUTPUTS": "/workspace/outputs"}
    assert told["labels"] == {"puhui.job": "j-1", "puhui.node": "n-1"}
    options = {mount["destination"]: mount["options"] for mount in told["mounts"]}
    assert options["/workspace/code"] == ["rbind", "ro", "nosuid", "nodev"]
    assert options["/workspace"] == ["rbind", "rw", "nosuid", "nodev"]
    assert options["/dev/nvidia0"] == ["rbind", "rw", "nosuid", "dev"]
    assert [options[path][-1] for path in ("/tmp", "/var/tmp", "/run")] == ["size=512m", "size=512m", "size=64m"]
    assert told["shm_size"] == 2**30


def test_a_container_gets_a_cgroup_of_its_own_where_there_is_a_place_for_it() -> None:
    assert "cgroup_parent" not in spec_generator(_SPEC, "n-1", [])
    told = spec_generator(_SPEC, "n-1", [], "/system.slice/x.service/containers")
    assert told["cgroup_parent"] == "/system.slice/x.service/containers"
    # Else conmon is put under the limits of the container.
    assert told["cgroups_mode"] == "no-conmon"
