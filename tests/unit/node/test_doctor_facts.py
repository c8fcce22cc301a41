"""What the doctor sees, on trees and emulated cards made for it, and that it leaves them as they were."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path

import pynvml
import pytest

from nodedaemon.devices import CardDevices
from nodedaemon.doctor.cards import Card, ask_driver, slices_of_journal, within
from nodedaemon.doctor.nodes import look_at_nodes
from nodedaemon.doctor.person import Person
from nodedaemon.doctor.state import journal_holder, look_at_state
from nodedaemon.driver import Driver
from nodedaemon.driver_facts import Mig
from nodedaemon.emulation import EmulatedDriver, installed, parse_cards
from nodedaemon.journal import Journal


def _me() -> Person:
    return Person("me", os.getuid(), os.getgid(), Path.home())


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_mode) for path in [folder, *folder.rglob("*")]}


# Cards ---------------------------------------------------------------------------------------------------------


def test_the_driver_is_asked_for_each_card_and_its_modes(tmp_path: Path) -> None:
    cards = parse_cards("A100-80GB:1,H100-80GB-SXM5:1")
    with installed(EmulatedDriver(tmp_path, cards, mig_enabled=False)):
        facts = ask_driver(None)
        assert facts.version.endswith("-emulated")
        assert [card.architecture for card in facts.cards] == [
            pynvml.NVML_DEVICE_ARCH_AMPERE,
            pynvml.NVML_DEVICE_ARCH_HOPPER,
        ]
        assert {(card.mig, card.pending) for card in facts.cards} == {(Mig.DISABLED, Mig.DISABLED)}


def test_a_mode_that_waits_for_a_reset_is_seen(tmp_path: Path) -> None:
    with installed(EmulatedDriver(tmp_path, parse_cards("A100-80GB"), mig_enabled=False)):
        pynvml.nvmlInit()
        pynvml.nvmlDeviceSetMigMode(pynvml.nvmlDeviceGetHandleByIndex(0), pynvml.NVML_DEVICE_MIG_ENABLE)
        pynvml.nvmlShutdown()
        card: Card = ask_driver(None).cards[0]
        assert (card.mig, card.pending) == (Mig.DISABLED, Mig.ENABLED)


def test_slices_are_listed_and_those_of_the_journal_known(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    with installed(EmulatedDriver(tmp_path / "emulation-state", parse_cards("A100-80GB"))):
        driver = Driver()
        gpu = driver.gpus()[0]
        profile = next(one for one in driver.profiles(gpu.uuid) if one.name == "1g.10gb")
        gi = driver.create_gpu_instance(gpu.uuid, profile.profile_id, profile.placements[0])
        driver.close()
        Journal(state / "node.db").close()
        facts = ask_driver(state)
        assert facts.cards[0].instances == ((gpu.uuid, gi),)
        assert facts.own_slices == frozenset()


def test_a_journal_is_read_without_touching_it(tmp_path: Path) -> None:
    assert slices_of_journal(tmp_path) == frozenset()
    Journal(tmp_path / "node.db").close()
    with sqlite3.connect(tmp_path / "node.db") as journal:
        columns = [row[1] for row in journal.execute("PRAGMA table_info(slices)") if row[1] != "id"]
        given = {"gpu_uuid": "GPU-1", "gi": 7, "stage": "active"}
        values = [given.get(column, 0) for column in columns]
        journal.execute(f"INSERT INTO slices ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})", values)
    journal.close()
    before = _snapshot(tmp_path)
    assert slices_of_journal(tmp_path) == frozenset({("GPU-1", 7)})
    assert _snapshot(tmp_path) == before


def test_whose_slices_they_are_is_unknown_while_the_journal_is_not_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "node.db")
    assert slices_of_journal(tmp_path) is None
    journal.close()
    (tmp_path / "node.db").write_text("not a database")
    assert slices_of_journal(tmp_path) is None


def test_a_driver_that_does_not_answer_is_not_waited_for() -> None:
    reading, writing = os.pipe()
    assert within(0.05, lambda: os.read(reading, 1)) is None
    os.write(writing, b"x")
    assert within(5, lambda: "answer") == "answer"


# Device files --------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A /dev and a /proc with the config node and one instance whose node is missing."""
    caps = tmp_path / "dev/nvidia-caps"
    caps.mkdir(parents=True)
    os.mknod(caps / "nvidia-cap1", stat.S_IFCHR | 0o400, os.makedev(508, 1))
    (caps / "nvidia-cap2").write_text("not a device")
    known = tmp_path / "proc/driver/nvidia/capabilities"
    for name, minor in (("mig/config", 1), ("mig/monitor", 2), ("gpu0/mig/gi1/access", 12)):
        (known / name).parent.mkdir(parents=True, exist_ok=True)
        (known / name).write_text(f"DeviceFileMinor: {minor}\nDeviceFileMode: 256\nDeviceFileModify: 1\n")
    minors = tmp_path / "proc/driver/nvidia-caps"
    minors.mkdir()
    (minors / "mig-minors").write_text("config 1\nmonitor 2\ngpu0/gi1/access 12\n")
    return tmp_path


def test_device_files_are_seen_as_they_are(tree: Path) -> None:
    cards = CardDevices(tree / "dev/nvidia-caps", tree / "proc/driver/nvidia-caps/mig-minors", emulated=False)
    before = _snapshot(tree)
    facts = look_at_nodes(tree, cards, "me", _me().may, by_root=False)
    assert facts.config is not None
    assert facts.monitor is not None
    assert (facts.config.present, facts.config.readable) == (True, True)
    assert not facts.monitor.present
    assert facts.missing == ("gpu0/gi1/access",)
    assert facts.config_reset is True
    assert [node.present for node in facts.control] == [False, False]
    assert _snapshot(tree) == before


def test_nothing_is_made_up_where_the_driver_has_no_files(tmp_path: Path) -> None:
    cards = CardDevices(tmp_path / "caps", tmp_path / "mig-minors", emulated=False)
    facts = look_at_nodes(tmp_path, cards, "me", _me().may, by_root=False)
    assert (facts.minors_readable, facts.config, facts.config_reset) == (False, None, None)


# State ---------------------------------------------------------------------------------------------------------


def test_a_state_directory_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    names = {path.name for path in tmp_path.iterdir()}
    facts = look_at_state(tmp_path, "me", _me().may)
    assert (facts.kind, facts.writable, facts.holder) == ("directory", True, None)
    assert facts.leases
    assert facts.fsync_s is not None
    assert facts.file_system
    assert facts.free_bytes > 0
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_state_directory_that_is_not_there_yet_is_judged_by_what_is_above_it(tmp_path: Path) -> None:
    facts = look_at_state(tmp_path / "a/b", "me", _me().may)
    assert (facts.kind, facts.near, facts.writable) == ("missing", tmp_path, True)
    assert not (tmp_path / "a").exists()


def test_a_file_in_place_of_a_state_directory_is_seen(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    assert look_at_state(tmp_path / "state", "me", _me().may).kind == "other"


def test_nobody_holds_a_journal_that_is_not_there_or_not_open(tmp_path: Path) -> None:
    assert journal_holder(tmp_path / "node.db") is None
    Journal(tmp_path / "node.db").close()
    assert journal_holder(tmp_path / "node.db") is None


# People --------------------------------------------------------------------------------------------------------


def test_what_a_user_may_do_is_asked_as_that_user(tmp_path: Path) -> None:
    assert _me().may("-x", tmp_path) is True
    assert _me().may("-x", tmp_path / "none") is False
    assert _me().may("--no-such-flag", tmp_path) is None
