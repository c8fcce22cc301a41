"""The two ways in which nodes appear in front of commands, as far as that needs no container."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodedaemon.hotplug import LinkPlug
from nodedaemon.hotplug_mounter import file_kind, open_files
from nodedaemon.hotplug_mounts import MountPlug
from puhui.rpc.errors import Refusal


@pytest.fixture
async def plug() -> AsyncIterator[MountPlug]:
    mounts = MountPlug(os.geteuid(), os.getegid(), device=False)
    yield mounts
    await mounts.close()


def nodes_in(folder: Path, *names: str) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    return {name: folder / name for name in names}


def ended_process() -> int:
    """Returns the id of a process that is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


async def test_plain_processes_find_links_to_their_nodes_and_no_others(tmp_path: Path) -> None:
    links, folder = LinkPlug(), tmp_path / "mine"
    nodes = nodes_in(tmp_path / "nodes", "nvidia-cap1", "nvidia-cap2")
    assert await links.prepare(folder, nodes) == []
    assert links.place(folder) == str(folder)
    assert {link.name: link.read_text() for link in folder.iterdir()} == {name: name for name in nodes}
    assert not await links.show(folder, nodes, 0)
    other = nodes_in(tmp_path / "other", "nvidia-cap2")
    assert await links.show(folder, other, 0)
    assert [link.readlink() for link in folder.iterdir()] == list(other.values())
    with (folder / "nvidia-cap2").open():
        assert os.getpid() in await links.holders(0, list(other.values()))
    assert os.getpid() not in await links.holders(0, list(other.values()))


async def test_a_container_gets_a_directory_of_closed_files_with_its_nodes_on_them(
    tmp_path: Path, plug: MountPlug
) -> None:
    folder, before = tmp_path / "mine", os.umask(0o077)
    try:
        mounts = await plug.prepare(folder, nodes_in(tmp_path / "nodes", "nvidia-cap1"))
    finally:
        os.umask(before)
    assert [(mount.source, mount.target, mount.read_only) for mount in mounts] == [
        (folder, "/dev/nvidia-caps", True),
        (tmp_path / "nodes" / "nvidia-cap1", "/dev/nvidia-caps/nvidia-cap1", True),
    ]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / "nvidia-cap1").stat().st_mode) == 0


async def test_a_container_that_has_ended_is_told_from_one_that_cannot_be_changed(
    tmp_path: Path, plug: MountPlug
) -> None:
    with pytest.raises(Refusal) as caught:
        await plug.show(tmp_path / "mine", {}, ended_process())
    assert caught.value.reason == "CONTAINER_NOT_RUNNING"
    # This process is in no container of ours, and nothing is mounted into it.
    with pytest.raises(Refusal, match="puhui-nodedaemon doctor") as caught:
        await plug.show(tmp_path / "mine", {}, os.getpid())
    assert caught.value.reason == "HOTPLUG_UNAVAILABLE"


async def test_any_name_of_a_directory_is_understood(tmp_path: Path, plug: MountPlug) -> None:
    odd = tmp_path / 'a\n{"b" \udcff é'
    nodes = nodes_in(odd, "nvidia-cap1")
    for number in range(3):  # what was answered belongs to what was asked
        with pytest.raises(Refusal, match="join the container's user namespace"):
            await plug.show(odd / "mine", nodes if number else {}, os.getpid())


async def test_requests_that_are_asked_at_once_are_answered_each(tmp_path: Path, plug: MountPlug) -> None:
    asked = [plug.show(tmp_path / str(number), {}, os.getpid()) for number in range(8)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(answer) for answer in answers} == {Refusal}


async def test_a_caller_that_leaves_does_not_spoil_the_next_answer(tmp_path: Path, plug: MountPlug) -> None:
    leaving = asyncio.create_task(plug.show(tmp_path / "mine", {}, os.getpid()))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    with pytest.raises(Refusal) as caught:
        await plug.show(tmp_path / "mine", {}, ended_process())
    assert caught.value.reason == "CONTAINER_NOT_RUNNING"


def test_a_device_is_its_number_and_a_file_is_its_inode(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").hardlink_to(tmp_path / "file")
    assert file_kind((tmp_path / "file").stat()) == file_kind((tmp_path / "link").stat())
    assert file_kind(Path("/dev/null").stat()) != file_kind(Path("/dev/zero").stat())
    with Path("/dev/full").open("rb"):
        assert file_kind(Path("/dev/full").stat()) in open_files(os.getpid())
