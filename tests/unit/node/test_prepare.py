"""`prepare` on a host in a temporary directory, with real device nodes: root makes them."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pynvml
import pytest
from typer.testing import CliRunner

from nodedaemon.cli import app
from nodedaemon.doctor.cards import Card, CardFacts
from nodedaemon.driver_facts import Mig
from nodedaemon.prepare import Done, Host, PrepareError, prepare

_USER = pwd.getpwnam("daemon")
_CAPS = 508
_UVM = 510
_CARD = Card(0, "NVIDIA A100-SXM4-80GB", Mig.DISABLED, Mig.DISABLED, pynvml.NVML_DEVICE_ARCH_AMPERE)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _minors(gpus: int) -> str:
    lines = ["config 1", "monitor 2"]
    for gpu in range(gpus):
        for gi in range(15):
            base = 3 + 135 * gpu + 9 * gi
            lines.append(f"gpu{gpu}/gi{gi}/access {base}")
            lines += [f"gpu{gpu}/gi{gi}/ci{ci}/access {base + 1 + ci}" for ci in range(8)]
    return "\n".join(lines) + "\n"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with one GPU, of which nothing is prepared."""
    for name in ("dev", "run"):
        (tmp_path / name).mkdir()
    for name in ("subuid", "subgid"):
        _write(tmp_path / "etc" / name, "daemon:200000:65536\n")
    proc = tmp_path / "proc"
    _write(
        proc / "devices", f"Character devices:\n195 nvidia\n{_CAPS} nvidia-caps\n{_UVM} nvidia-uvm\n\nBlock devices:\n"
    )
    _write(proc / "driver/nvidia/gpus/0000:07:00.0/information", "Model: \t A100\nDevice Minor: \t 0\n")
    _write(proc / "driver/nvidia-caps/mig-minors", _minors(32))
    _capability(proc, "mig/config", 1, 256)
    _capability(proc, "mig/monitor", 2, 292)
    _capability(proc, "gpu0/mig/gi1/access", 12, 292)
    return Host(tmp_path, None, 0, lambda: CardFacts(True, "580.95.05", cards=(_CARD,)))


def _capability(proc: Path, name: str, minor: int, mode: int) -> None:
    text = f"DeviceFileMinor: {minor}\nDeviceFileMode: {mode}\nDeviceFileModify: 1\n"
    _write(proc / "driver/nvidia/capabilities" / name, text)
    # The kernel's file keeps all settings and changes one; a plain file is overwritten from its start.
    if name == "mig/config":
        _write(proc / "driver/nvidia/capabilities" / name, f"DeviceFileModify: 1\nDeviceFileMinor: {minor}\n")


def _run(host: Host, *, emulated: bool = False, dry_run: bool = False) -> list[Done]:
    return list(prepare(host, "daemon", emulated=emulated, dry_run=dry_run))


def _device(path: Path) -> tuple[int, int, str, int, int]:
    status = path.stat()
    assert stat.S_ISCHR(status.st_mode)
    numbers = os.major(status.st_rdev), os.minor(status.st_rdev)
    return (*numbers, f"{stat.S_IMODE(status.st_mode):04o}", status.st_uid, status.st_gid)


def test_the_daemons_user_and_nobody_else_may_read_the_config_node(host: Host) -> None:
    _run(host)
    assert _device(host.root / "dev/nvidia-caps/nvidia-cap1") == (_CAPS, 1, "0440", 0, _USER.pw_gid)


def test_nvidia_modprobe_is_told_to_leave_the_config_node_alone(host: Host) -> None:
    _run(host)
    config = (host.root / "proc/driver/nvidia/capabilities/mig/config").read_text()
    assert "DeviceFileModify: 0" in config
    monitor = (host.root / "proc/driver/nvidia/capabilities/mig/monitor").read_text()
    assert "DeviceFileModify: 1" in monitor


def test_other_nodes_get_the_mode_that_the_driver_wants(host: Host) -> None:
    _run(host)
    caps = host.root / "dev/nvidia-caps"
    assert _device(caps / "nvidia-cap2") == (_CAPS, 2, "0444", 0, 0)
    assert _device(caps / "nvidia-cap12") == (_CAPS, 12, "0444", 0, 0)
    assert _device(host.root / "dev/nvidiactl") == (195, 255, "0666", 0, 0)
    assert _device(host.root / "dev/nvidia0") == (195, 0, "0666", 0, 0)
    assert _device(host.root / "dev/nvidia-uvm") == (_UVM, 0, "0666", 0, 0)


def test_every_instance_that_the_gpus_can_have_gets_its_node_and_no_other(host: Host) -> None:
    _run(host)
    names = {node.name for node in (host.root / "dev/nvidia-caps").iterdir()}
    assert names == {f"nvidia-cap{minor}" for minor in range(1, 3 + 135)}


def test_a_second_time_changes_nothing(host: Host) -> None:
    assert any(done.changed for done in _run(host))
    assert [done.text for done in _run(host) if done.changed or done.trouble] == []


def test_a_dry_run_changes_nothing_and_says_what_it_would(host: Host) -> None:
    done = _run(host, dry_run=True)
    assert any("would be made as root:" in one.text for one in done)
    assert list((host.root / "dev").iterdir()) == list((host.root / "run").iterdir()) == []


def test_a_wrong_permission_and_a_wrong_device_are_set_right(host: Host) -> None:
    caps = host.root / "dev/nvidia-caps"
    caps.mkdir()
    os.mknod(caps / "nvidia-cap1", stat.S_IFCHR | 0o400, os.makedev(_CAPS, 1))
    os.mknod(caps / "nvidia-cap2", stat.S_IFCHR | 0o444, os.makedev(_CAPS + 1, 2))
    (caps / "nvidia-cap12").write_text("not a device")
    _run(host)
    assert _device(caps / "nvidia-cap1") == (_CAPS, 1, "0440", 0, _USER.pw_gid)
    assert _device(caps / "nvidia-cap2")[0] == _CAPS
    assert _device(caps / "nvidia-cap12")[1] == 12


def test_a_node_that_an_operator_opened_further_is_left_so(host: Host) -> None:
    os.mknod(host.root / "dev/nvidiactl", stat.S_IFCHR, os.makedev(195, 255))
    (host.root / "dev/nvidiactl").chmod(0o660)
    _run(host)
    assert _device(host.root / "dev/nvidiactl")[2] == "0660"


def test_runtime_directories_belong_to_whom_they_should(host: Host) -> None:
    _run(host)
    top = (host.root / "run/puhui").stat()
    own = (host.root / f"run/puhui/podman-{_USER.pw_uid}").stat()
    assert (top.st_uid, stat.S_IMODE(top.st_mode)) == (0, 0o755)
    assert (own.st_uid, own.st_gid, stat.S_IMODE(own.st_mode)) == (_USER.pw_uid, _USER.pw_gid, 0o700)


def test_a_link_in_place_of_a_runtime_directory_is_refused(host: Host) -> None:
    (host.root / "run/puhui").symlink_to(host.root / "etc")
    with pytest.raises(PrepareError, match="remove it"):
        _run(host)


@dataclass
class _Modprobe:
    calls: list[list[str]] = field(default_factory=list)

    def __call__(self, arguments: Sequence[str]) -> None:
        self.calls.append(list(arguments))


def test_nvidia_modprobe_is_used_where_it_is_and_what_it_leaves_is_made(host: Host) -> None:
    modprobe = _Modprobe()
    _run(replace(host, nvidia_modprobe=modprobe))
    capabilities = host.root / "proc/driver/nvidia/capabilities"
    assert modprobe.calls[0] == ["-c", "0"]
    assert modprobe.calls[1] == ["-u", "-c", "0"]
    assert modprobe.calls[2].count("-f") == 3
    assert str(capabilities / "gpu0/mig/gi1/access") in modprobe.calls[2]
    assert _device(host.root / "dev/nvidia-caps/nvidia-cap1")[2] == "0440"


def test_mig_mode_is_told_with_the_command_and_never_toggled(host: Host) -> None:
    told = " ".join(done.text for done in _run(host))
    assert "MIG mode is off, and is yours to turn on, with `nvidia-smi -i 0 -mig 1`" in told
    hopper = replace(_CARD, architecture=pynvml.NVML_DEVICE_ARCH_HOPPER)
    told = " ".join(done.text for done in _run(replace(host, cards=lambda: CardFacts(True, cards=(hopper,)))))
    assert "systemctl enable --now puhui-mig@0.service" in told


def test_without_a_driver_the_rest_is_done_and_it_is_trouble_for_real_cards_only(host: Host) -> None:
    for path in (host.root / "proc/driver/nvidia").rglob("*"):
        if path.is_file():
            path.unlink()
    for path in sorted((host.root / "proc/driver/nvidia").rglob("*"), reverse=True):
        path.rmdir()
    (host.root / "proc/driver/nvidia").rmdir()
    assert [done.text for done in _run(host) if done.trouble] == [
        "no NVIDIA driver is loaded: install it, or load it with `modprobe nvidia`, and prepare again"
    ]
    assert (host.root / "run/puhui").is_dir()
    assert not any(done.trouble for done in _run(host, emulated=True))


def test_a_group_that_others_are_in_is_trouble(host: Host) -> None:
    (host.root / "etc/subuid").write_text("nobody:200000:65536\n")
    (host.root / "etc/subgid").write_text("nobody:200000:65536\n")
    sharing = [one.pw_name for one in pwd.getpwall() if one.pw_gid == pwd.getpwnam("nobody").pw_gid]
    told = [done.text for done in prepare(host, "nobody", emulated=False, dry_run=True) if done.trouble]
    assert len(told) == (len(sharing) > 1)
    assert all("a group of its own" in text for text in told)


@pytest.mark.parametrize("text", ["", "daemon:200000:1000\n", "other:200000:65536\n"])
def test_missing_subordinate_ids_are_told_with_the_command(host: Host, text: str) -> None:
    (host.root / "etc/subuid").write_text(text)
    trouble = [done.text for done in _run(host) if done.trouble]
    assert len(trouble) == 1
    assert "usermod --add-subuids" in trouble[0]


def test_a_driver_without_mig_capabilities_is_trouble(host: Host) -> None:
    (host.root / "proc/devices").write_text(f"Character devices:\n195 nvidia\n{_UVM} nvidia-uvm\n\nBlock devices:\n")
    assert any("no MIG capabilities" in done.text for done in _run(host) if done.trouble)


def test_who_is_not_root_is_refused(host: Host) -> None:
    with pytest.raises(PrepareError, match="sudo"):
        _run(replace(host, uid=1000))
    assert list((host.root / "run").iterdir()) == []


@pytest.mark.parametrize(("user", "words"), [("root", "not to run as root"), ("no-such-user", "systemd-sysusers")])
def test_a_user_that_cannot_be_the_daemons_is_refused(host: Host, user: str, words: str) -> None:
    with pytest.raises(PrepareError, match=words):
        list(prepare(host, user, emulated=False, dry_run=False))


def test_the_command_says_each_step_and_exits_with_what_came_of_it(host: Host) -> None:
    arguments = ["prepare", "--user", "daemon", "--root", str(host.root)]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "+ " in first.output
    (host.root / "etc/subuid").write_text("")
    assert CliRunner().invoke(app, arguments).exit_code == 1
    refused = CliRunner().invoke(app, ["prepare", "--user", "no-such-user", "--root", str(host.root)])
    assert refused.exit_code == 1
    assert "there is no user no-such-user" in refused.output
