"""Who may do what: as the kernel sees a process that is not root, and by the cap nodes that it may read."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import EmulatedDriver
from tests.contract.nvml import calls
from tests.contract.nvml.conftest import CARDS, started

_NOBODY = 65534


@pytest.fixture
def shared_driver() -> Iterator[EmulatedDriver]:
    """A driver whose directory every user may enter and read, as a node's is."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    try:
        with started(directory, CARDS) as driver:
            yield driver
    finally:
        shutil.rmtree(directory)


def _as_nobody(action: Callable[[], object]) -> str:
    """Run an action in a child process of an unprivileged user; returns its result, or its error's class."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(_NOBODY)
                os.setuid(_NOBODY)
            try:
                result = str(action())
            except pynvml.NVMLError as error:
                result = type(error).__name__
            os.write(writer, result.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def test_an_unprivileged_process_reads_and_neither_creates_nor_toggles(shared_driver: EmulatedDriver) -> None:
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    instance = calls.create(device, 9, 0, 4)
    calls.create_full_compute(instance)
    mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, 0)
    assert _as_nobody(lambda: pynvml.nvmlDeviceGetName(mig)) == "NVIDIA H100 80GB HBM3 MIG 3g.40gb"
    assert _as_nobody(lambda: pynvml.nvmlDeviceGetMigMode(device)) == "[1, 1]"
    assert _as_nobody(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(mig)) == "[]"
    if os.geteuid() == 0:  # else the cap nodes are this user's own
        assert _as_nobody(lambda: calls.create(device, 9, 4, 4)) == "NVMLError_NoPermission"
        assert _as_nobody(lambda: calls.instances(device, 9)) == "NVMLError_NoPermission"
        assert _as_nobody(lambda: pynvml.nvmlGpuInstanceDestroy(instance)) == "NVMLError_NoPermission"
    assert _as_nobody(lambda: pynvml.nvmlDeviceSetMigMode(device, 0)) == "NVMLError_NoPermission"
    assert calls.all_placements(device) == [(0, 4)]


def test_the_config_node_delegates_instances_but_not_the_mode(shared_driver: EmulatedDriver) -> None:
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    calls.create(device, 9, 0, 4)
    calls.cap_node(shared_driver, "config").chmod(0o444)
    assert _as_nobody(lambda: len(calls.instances(device, 9))) == "1"
    assert _as_nobody(lambda: calls.remaining(device, 9)) == "1"
    assert _as_nobody(lambda: pynvml.nvmlDeviceSetMigMode(device, 0)) == "NVMLError_NoPermission"


class _Container:
    """A process in a container: not root, and with no cap node but those of its slice."""

    def is_root(self) -> bool:
        return False

    def may_read(self, node: Path) -> bool:
        return node.name not in ("nvidia-cap1", "nvidia-cap2")


def test_who_may_not_monitor_sees_its_slice_and_not_the_whole_card(tmp_path: Path) -> None:
    with started(tmp_path, CARDS):
        calls.create_full_compute(calls.create(pynvml.nvmlDeviceGetHandleByIndex(0), 9, 0, 4))
    with started(tmp_path, CARDS, caller=_Container()):
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, 0)
        aggregates: list[Callable[[Any], Any]] = [
            pynvml.nvmlDeviceGetMemoryInfo,
            pynvml.nvmlDeviceGetBAR1MemoryInfo,
            pynvml.nvmlDeviceGetComputeRunningProcesses,
        ]
        for call in aggregates:
            with pytest.raises(pynvml.NVMLError_NoPermission):
                call(device)
            call(mig)
        assert pynvml.nvmlDeviceGetPowerUsage(device) > 0
