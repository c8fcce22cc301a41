"""What people do to a node beside its daemon: with nvidia-smi, as root, or with the switch of the host."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pynvml

from nodedaemon.driver import Driver
from nodedaemon.emulation import EmulatedDriver, installed, parse_cards
from puhui.v1.card_pb2 import Slice
from tests.integration.node.conftest import CARDS

ForeignSlice = tuple[str, int, str]
"""GPU, GPU instance and UUID of a slice."""


@contextlib.contextmanager
def driver_of(state: Path, cards: str = CARDS) -> Iterator[Driver]:
    """The emulated driver of a daemon's state directory, in this process."""
    with installed(EmulatedDriver(state / "emulation", parse_cards(cards))):
        driver = Driver()
        try:
            yield driver
        finally:
            driver.close()


def destroy_by_hand(driver: Driver, one: Slice) -> None:
    """Destroys a slice that the daemon made."""
    driver.destroy_compute_instance(one.gpu_uuid, one.gpu_instance_id, one.compute_instance_id)
    driver.destroy_gpu_instance(one.gpu_uuid, one.gpu_instance_id)


def cut_by_hand(driver: Driver, gpu_uuid: str, profile: str, start: int) -> ForeignSlice:
    """Makes a slice that the daemon does not know of."""
    shape = next(one for one in driver.profiles(gpu_uuid) if one.name == profile)
    span = next(one for one in shape.placements if one.start == start)
    gi = driver.create_gpu_instance(gpu_uuid, shape.profile_id, span)
    driver.create_compute_instance(gpu_uuid, gi, shape.compute_slices)
    return next(one for one in all_slices(driver) if one[:2] == (gpu_uuid, gi))


def all_slices(driver: Driver) -> list[ForeignSlice]:
    """Returns every slice that the driver has."""
    cut = [gpu.uuid for gpu in driver.gpus() if gpu.mig]
    return [
        (gpu, instance.id, compute.uuid)
        for gpu in cut
        for instance in driver.instances(gpu)
        for compute in instance.compute_instances
    ]


def enable_mig(index: int) -> None:
    """Does what `nvidia-smi -i INDEX -mig 1` does, within `driver_of`."""
    assert pynvml.nvmlDeviceSetMigMode(pynvml.nvmlDeviceGetHandleByIndex(index), 1) == pynvml.NVML_SUCCESS


def reboot(state: Path) -> None:
    """Reboots the emulated cards, whoever holds slices of them."""
    command = [sys.executable, "-m", "nodedaemon", "emulation", "reboot", "--force", "--state", str(state)]
    subprocess.run(command, check=True, capture_output=True)
