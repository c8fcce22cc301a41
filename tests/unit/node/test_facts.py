"""Small decisions from facts: devices, cgroups, commands, evictions, pauses, requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodedaemon.bundles import StoredBundle, evictions
from nodedaemon.commands import Found, candidates
from nodedaemon.container_request import container_name, environment
from nodedaemon.devices import (
    CardDevices,
    SliceIds,
    cap_nodes,
    card_mounts,
    library_mounts,
    read_minors,
    require_cap_nodes,
    require_card_node,
)
from nodedaemon.owner import Owner
from nodedaemon.podman_account import PodmanUnusableError, cgroup_layout, choose_oci_runtime
from nodedaemon.registration import backoff_s
from puhui.rpc.errors import Refusal

_MINORS = (
    "config 1\nmonitor 2\ngpu0/gi1/access 12\ngpu0/gi1/ci0/access 13\ngpu1/gi2/access 156\ngpu1/gi2/ci0/access 157\n"
)


def test_an_emulated_slice_is_seen_through_its_two_cap_nodes_only() -> None:
    cards = CardDevices(Path("/state/caps"), Path("/state/mig-minors"), emulated=True)
    assert cap_nodes([SliceIds(0, 1, 0)], cards, read_minors(_MINORS)) == {
        "nvidia-cap12": Path("/state/caps/nvidia-cap12"),
        "nvidia-cap13": Path("/state/caps/nvidia-cap13"),
    }
    assert cap_nodes([], cards, {}) == {}
    assert card_mounts([0, 1], cards) == []


def test_a_container_on_real_gpus_gets_those_that_are_cut_the_control_nodes_and_the_libraries() -> None:
    library = Path("/usr/lib/x86_64-linux-gnu/libcuda.so.1")
    cards = CardDevices(Path("/dev/nvidia-caps"), Path("/minors"), emulated=False, libraries=(library,))
    mounts = card_mounts([3, 1], cards)
    assert sorted(mount.target for mount in mounts if mount.device) == [
        *("/dev/nvidia-uvm", "/dev/nvidia1", "/dev/nvidia3", "/dev/nvidiactl"),
    ]
    assert [mount.target for mount in mounts if not mount.device] == [str(library)]


def test_a_cap_node_that_is_missing_is_refused_with_what_makes_it(tmp_path: Path) -> None:
    cards, minors = CardDevices(tmp_path, tmp_path / "minors", emulated=True), read_minors(_MINORS)
    with pytest.raises(Refusal, match="no gpu3/gi1/access") as caught:
        cap_nodes([SliceIds(3, 1, 0)], cards, minors)
    assert caught.value.reason == "CAP_NODE_MISSING"
    nodes = cap_nodes([SliceIds(0, 1, 0)], cards, minors)
    (tmp_path / "nvidia-cap12").touch()
    with pytest.raises(Refusal, match="nvidia-modprobe -f /proc/driver/nvidia/capabilities/gpu0/mig/gi1/ci0/access"):
        require_cap_nodes(nodes, minors)
    (tmp_path / "nvidia-cap13").touch()
    require_cap_nodes(nodes, minors)


def test_only_the_drivers_64_bit_libraries_are_taken() -> None:
    listed = (
        "1042 libs found in cache `/etc/ld.so.cache'\n"
        "\tlibnvidia-ml.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1\n"
        "\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcuda.so.1\n"
        "\tlibcuda.so.1 (libc6) => /usr/lib/i386-linux-gnu/libcuda.so.1\n"
        "\tlibcurl.so.4 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcurl.so.4\n"
    )
    assert [path.name for path in library_mounts(listed)] == ["libnvidia-ml.so.1", "libcuda.so.1"]


@pytest.mark.parametrize(
    ("mounts", "layout"),
    [
        ("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "v2"),
        ("tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n", "hybrid"),
        ("tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n", "v1"),
    ],
)
def test_the_cgroup_layout_is_read_from_the_mounts(mounts: str, layout: str) -> None:
    assert cgroup_layout(mounts) == layout


def test_the_oci_runtime_follows_the_cgroup_layout() -> None:
    assert choose_oci_runtime("v2", ["crun", "runc"]) == ("crun", "")
    assert choose_oci_runtime("v2", ["runc"]) == ("runc", "")
    name, why = choose_oci_runtime("hybrid", ["crun", "runc"])
    assert name == "runc"
    assert "hybrid" in why
    with pytest.raises(PodmanUnusableError, match="apt-get install runc"):
        choose_oci_runtime("hybrid", ["crun"])


def test_a_command_is_looked_for_where_the_container_would(tmp_path: Path) -> None:
    (tmp_path / "run.sh").touch(0o755)
    (tmp_path / "plain.py").touch(0o644)
    (tmp_path / "link").symlink_to("/usr/bin/python3")
    assert candidates("python3", "/usr/bin:/bin", tmp_path) == ["/usr/bin/python3", "/bin/python3"]
    assert candidates("/usr/bin/env", "/bin", tmp_path) == ["/usr/bin/env"]
    assert candidates("../../bin/sh", "/bin", tmp_path) == ["/bin/sh"]
    assert candidates("./run.sh", "/bin", tmp_path) == Found()
    assert candidates("/workspace/code/run.sh", "/bin", tmp_path) == Found()
    assert candidates("./link", "/bin", tmp_path) == Found()
    for command, words in (("./plain.py", "not executable"), ("./none", "no file")):
        found = candidates(command, "/bin", tmp_path)
        assert isinstance(found, Found)
        assert words in found.problem


def test_bundles_in_use_are_never_dropped_and_the_oldest_go_first() -> None:
    stored = [StoredBundle(name, 10, used) for name, used in (("new", 3), ("old", 1), ("used", 0), ("mid", 2))]
    assert evictions(stored, {"used"}, 40) == []
    assert evictions(stored, {"used"}, 25) == ["old", "mid"]
    assert evictions(stored, {"used"}, 0) == ["old", "mid", "new"]


def test_the_pause_between_tries_grows_to_a_bound_and_is_spread() -> None:
    assert [round(backoff_s(n, 1.0), 1) for n in range(1, 9)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0]
    assert backoff_s(100, 0.0) == 7.5


def test_the_name_of_a_container_tells_its_job_and_is_unique_per_daemon() -> None:
    owner = Owner("centre", "j-1", 2)
    assert container_name("n-1", owner).startswith("puhui-j-1-2-")
    assert container_name("n-1", owner) != container_name("n-2", owner)
    assert container_name("n-1", owner) != container_name("n-1", Owner("peer", "j-1", 2))


def test_without_a_slice_every_card_is_hidden() -> None:
    env = environment(Owner("centre", "j-1", 2), [], emulated=False)
    assert (env["CUDA_VISIBLE_DEVICES"], env["NVIDIA_VISIBLE_DEVICES"]) == ("", "void")
    assert "PUHUI_EMULATED" not in env


def test_a_card_that_a_container_was_not_given_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    require_card_node(0, tmp_path)
    with pytest.raises(Refusal) as caught:
        require_card_node(1, tmp_path)
    assert caught.value.reason == "HOTPLUG_UNAVAILABLE"
