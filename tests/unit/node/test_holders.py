"""Who holds a slice is named with its container, whoever runs that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nodedaemon.holders import Holder, container_in, holder

_ID = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "cgroup",
    [
        f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{_ID}.scope/container\n",
        f"12:memory:/docker/{_ID}\n11:cpu:/docker/{_ID}\n",
        f"0::/system.slice/docker-{_ID}.scope\n",
        f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-pod1.slice/cri-containerd-{_ID}.scope\n",
        f"0::/kubepods/besteffort/pod-{'1' * 8}/{_ID}\n",
    ],
)
def test_a_cgroup_tells_its_container(cgroup: str) -> None:
    assert container_in(cgroup) == _ID


@pytest.mark.parametrize(
    "cgroup", ["0::/init.scope\n", "", "4:devices:/user.slice\n0::/\n", f"0::/libpod-{_ID[:12]}\n"]
)
def test_a_cgroup_of_no_container_tells_none(cgroup: str) -> None:
    assert container_in(cgroup) == ""


def _process(proc: Path, pid: int, parent: int, *words: str, name: str = "sh", cgroup: str = "0::/\n") -> None:
    place = proc / str(pid)
    place.mkdir()
    (place / "stat").write_text(f"{pid} ({name}) S {parent} {pid} {pid} 0 -1\n")
    (place / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
    (place / "cgroup").write_text(cgroup)


def test_the_monitor_above_a_process_tells_its_container(tmp_path: Path) -> None:
    _process(tmp_path, 1, 0, "/sbin/init")
    _process(tmp_path, 10, 1, "/usr/bin/conmon", "--api-version", "1", "-c", _ID, "-u", _ID, "-r", "/usr/sbin/runc")
    _process(tmp_path, 11, 10, "/dev/init", "--", "python3", "train.py")
    _process(tmp_path, 12, 11, "python3", "train.py", name="odd) name (")
    assert holder(12, tmp_path) == Holder(12, "python3 train.py", _ID)
    assert str(holder(12, tmp_path)) == f"12 (python3 train.py) in container {_ID[:12]}"


def test_a_shim_and_a_keeper_tell_it_too(tmp_path: Path) -> None:
    _process(tmp_path, 20, 1, "/usr/bin/containerd-shim-runc-v2", "-namespace", "moby", "-id", _ID)
    _process(tmp_path, 21, 20, "nvidia-cuda-mps-server")
    assert holder(21, tmp_path).container == _ID
    _process(tmp_path, 30, 1, "python3", "-m", "nodedaemon.process_keeper", "/state/processes/process-abc")
    _process(tmp_path, 31, 30, "python3", "main.py")
    assert holder(31, tmp_path).container == "process-abc"


def test_a_process_of_no_container_and_one_that_has_ended(tmp_path: Path) -> None:
    _process(tmp_path, 1, 0, "/sbin/init")
    _process(tmp_path, 40, 1, "/usr/bin/dcgm-exporter", "--kubernetes")
    assert str(holder(40, tmp_path)) == "40 (/usr/bin/dcgm-exporter --kubernetes)"
    assert holder(41, tmp_path) == Holder(41, "ended meanwhile")
    _process(tmp_path, 42, 2, name="kworker")
    assert holder(42, tmp_path).command == "no command line"


def test_this_very_process_is_named() -> None:
    assert holder(os.getpid()).command
