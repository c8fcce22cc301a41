"""What an operator does to emulated cards from another process than the daemon's."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pynvml
import pytest
from typer.testing import CliRunner, Result

from nodedaemon.cli import app
from nodedaemon.emulation import EmulatedDriver, installed, parse_cards
from tests.contract.nvml import calls
from tests.contract.nvml.holding import HOLD, python_process

Command = Callable[..., Result]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[EmulatedDriver]:
    """The driver of a daemon whose state directory is tmp_path."""
    with installed(EmulatedDriver(tmp_path / "emulation", parse_cards("H100-80GB-SXM5,A100-40GB"))) as driver:
        pynvml.nvmlInit()
        try:
            yield driver
        finally:
            pynvml.nvmlShutdown()


@pytest.fixture
def command(tmp_path: Path, driver: EmulatedDriver) -> Command:
    def run(*words: object) -> Result:
        return CliRunner().invoke(app, ["emulation", *map(str, words), "--state", str(tmp_path)])

    return run


@pytest.fixture
def h100(driver: EmulatedDriver) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(0)


def _slice(device: Any) -> str:
    calls.create_full_compute(calls.create(device, 9, 0, 4))
    uuid: str = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, 0))
    return uuid


def test_cards_slices_and_holders_are_shown(driver: EmulatedDriver, command: Command, h100: Any) -> None:
    uuid = _slice(h100)
    calls.create(h100, 14, 4, 2)
    with python_process(HOLD, calls.cap_node(driver, "gpu0/gi1/ci0/access")) as process:
        shown = command("show")
    assert shown.exit_code == 0
    assert f"GPU 0: H100-80GB-SXM5, {pynvml.nvmlDeviceGetUUID(h100)}, MIG mode on\n" in shown.output
    assert (
        f"  {uuid}: 3g.40gb at 0:4, GPU instance 1, compute instance 0, held by process {process.pid}\n" in shown.output
    )
    assert "  2g.20gb at 4:2, GPU instance 3, no compute instance\n" in shown.output
    assert "GPU 1: A100-40GB" in shown.output


def test_a_reboot_is_refused_while_slices_are_held_and_forced_ends_nobody(
    driver: EmulatedDriver, command: Command, h100: Any
) -> None:
    _slice(h100)
    with python_process(HOLD, calls.cap_node(driver, "gpu0/gi1/ci0/access")) as process:
        refused = command("reboot")
        assert refused.exit_code == 1
        assert f"held by process {process.pid}" in refused.output
        assert "--force" in refused.output
        assert calls.all_placements(h100) == [(0, 4)]
        forced = command("reboot", "--force")
        assert forced.exit_code == 0
        assert f"they still run: {process.pid}." in forced.output
        assert process.poll() is None
    assert pynvml.nvmlDeviceGetMigMode(h100) == [0, 0]
    assert pynvml.nvmlDeviceGetMigMode(pynvml.nvmlDeviceGetHandleByIndex(1)) == [1, 1]


def test_a_card_is_reset(driver: EmulatedDriver, command: Command, h100: Any) -> None:
    _slice(h100)
    with python_process(HOLD, calls.cap_node(driver, "gpu0/gi1/access")):
        busy = command("reset", 0)
        assert busy.exit_code == 1
        assert "GPU 0 is in use" in busy.output
    assert command("reset", 0).exit_code == 0
    assert calls.all_placements(h100) == []
    unknown = command("reset", 7)
    assert unknown.exit_code == 1
    assert "no GPU 7" in unknown.output


def test_faults_are_added_listed_and_cleared(command: Command, h100: Any) -> None:
    assert command("fault", "list").output == "No fault waits.\n"
    added = command(
        "fault",
        "add",
        "nvmlDeviceGetName",
        "--code",
        "gpu_is_lost",
        "--count",
        2,
        "--skip",
        1,
        "--gpu",
        0,
        "--when",
        "after",
    )
    assert added.exit_code == 0
    sentence = (
        "Fault: the next 2 calls of nvmlDeviceGetName about GPU 0, after 1 that pass:"
        " GPU_IS_LOST although the work is done\n"
    )
    assert added.output == command("fault", "list").output == sentence
    pynvml.nvmlDeviceGetName(h100)
    with pytest.raises(pynvml.NVMLError_GpuIsLost):
        pynvml.nvmlDeviceGetName(h100)
    assert command("fault", "clear").output == "Faults forgotten: 1.\n"
    pynvml.nvmlDeviceGetName(h100)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("nvmlDeviceGetNaem", "--code", "IN_USE"), "has no function 'nvmlDeviceGetNaem'"),
        (("nvmlDeviceGetName", "--code", "BUSY"), "no return code 'BUSY'"),
        (("nvmlDeviceGetName",), "this one would do nothing"),
    ],
)
def test_a_fault_that_cannot_be_is_refused_in_a_sentence(
    command: Command, words: tuple[str, ...], sentence: str
) -> None:
    refused = command("fault", "add", *words)
    assert refused.exit_code == 1
    assert sentence in refused.output


def test_latency_is_set_shown_and_forgotten(driver: EmulatedDriver, command: Command) -> None:
    set_to = command("latency", "--default", 0.001, "--call", "nvmlGpuInstanceDestroy=0.25")
    assert set_to.output == "Latency of every call: 0.001 s\nLatency of nvmlGpuInstanceDestroy: 0.25 s\n"
    latency = driver.operator.look().latency
    assert latency.of("nvmlGpuInstanceDestroy") == 0.25
    assert latency.of("nvmlDeviceGetName") == 0.001
    assert command("latency", "--clear").output == "Latency of every call: 0 s\n"
    for wrong in ("nvmlGpuInstanceDestroy", "nvmlGpuInstanceDestroy=soon", "nvmlGpuInstanceDestroy=-1"):
        assert command("latency", "--call", wrong).exit_code == 1


def test_the_uuid_policy_is_chosen(driver: EmulatedDriver, command: Command) -> None:
    assert command("uuids", "reused").exit_code == 0
    assert driver.operator.look().uuid_policy == "reused"
    assert command("uuids", "random").exit_code == 2


def test_a_directory_without_emulated_cards_is_refused(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["emulation", "show", "--state", str(tmp_path / "nothing")])
    assert refused.exit_code == 1
    assert "holds no emulated driver" in refused.output
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("end", ["input", "signal"])
def test_an_outside_holder_keeps_a_slice_in_use_until_it_ends(
    tmp_path: Path, driver: EmulatedDriver, command: Command, h100: Any, end: str
) -> None:
    uuid = _slice(h100)
    (instance,) = calls.instances(h100, 9)
    (compute,) = calls.compute_instances(instance, 2)
    words = [sys.executable, "-m", "nodedaemon", "emulation", "hold", uuid, "--state", str(tmp_path)]
    with ExitStack() as stack:
        holder = stack.enter_context(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        stack.callback(holder.kill)
        assert holder.stdout is not None
        assert int(holder.stdout.readline()) == holder.pid
        with pytest.raises(pynvml.NVMLError_InUse):
            pynvml.nvmlComputeInstanceDestroy(compute)
        if end == "signal":
            holder.send_signal(signal.SIGTERM)
        else:
            assert holder.stdin is not None
            holder.stdin.close()
        assert holder.wait(10) == 0
    pynvml.nvmlComputeInstanceDestroy(compute)


def test_an_unknown_slice_cannot_be_held(command: Command) -> None:
    refused = command("hold", "MIG-none")
    assert refused.exit_code == 1
    assert "No slice has the UUID 'MIG-none'" in refused.output


def test_mig_mode_is_turned_on_again_after_a_reboot(command: Command, h100: Any) -> None:
    command("reboot")
    assert pynvml.nvmlDeviceGetMigMode(h100)[0] == 0
    assert "MIG mode of GPU 0 is on." in command("mig", 0, "on").output
    assert pynvml.nvmlDeviceGetMigMode(h100)[0] == 1
    _slice(h100)
    busy = command("mig", 0, "off")
    assert busy.exit_code == 1
    assert "has slices" in busy.output
    assert list(pynvml.nvmlDeviceGetMigMode(h100)) == [1, 1]


def test_mig_mode_of_ampere_waits_for_a_reset(command: Command) -> None:
    a100 = pynvml.nvmlDeviceGetHandleByIndex(1)
    assert "after its reset: `puhui-nodedaemon emulation reset 1`" in command("mig", 1, "off").output
    assert list(pynvml.nvmlDeviceGetMigMode(a100)) == [1, 0]
    command("reset", 1)
    assert list(pynvml.nvmlDeviceGetMigMode(a100)) == [0, 0]
    assert "There is no GPU 7" in command("mig", 7, "on").output
