"""How the daemon divides its cgroup."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from nodedaemon.cgroups import CgroupTree, Division, Seen, claim, divide, is_border, own_path

_TOP = Seen("/system.slice/containers.service", delegated=True, controllers=frozenset({"cpu", "io", "memory", "pids"}))
_DAEMON = f"{_TOP.path}/daemon"
_FILES = ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads", "cgroup.controllers", "cgroup.freeze")


def test_the_cgroup_of_a_process_is_read() -> None:
    assert own_path("12:pids:/a\n0::/system.slice/x.service\n") == "/system.slice/x.service"
    assert own_path("12:pids:/a\n") is None
    assert own_path("0::/\n") == "/"


def test_controllers_are_handed_down_where_the_daemon_was_put_into_its_part() -> None:
    division = divide("v2", _DAEMON, _TOP, "puhui")
    assert division.top == _TOP.path
    assert division.controllers == ("cpu", "memory", "pids")
    assert division.containers == f"{_TOP.path}/containers"
    assert (division.no_limits, division.no_freezer) == ("", "")


def test_controllers_that_are_not_there_are_named() -> None:
    division = divide("v2", _DAEMON, replace(_TOP, controllers=frozenset({"memory"})), "puhui")
    assert division.controllers == ("memory",)
    assert "cpu, pids" in division.no_limits
    assert not division.no_freezer


@pytest.mark.parametrize(
    ("layout", "own", "above", "said"),
    [
        ("hybrid", None, None, "hybrid"),
        ("v1", None, None, "v1"),
        ("v2", None, None, "cannot be looked at"),
        ("v2", "/", None, "puhui-containers.service"),
        ("v2", _DAEMON, replace(_TOP, delegated=False), "puhui-containers.service"),
        # systemd puts the daemon there again at each start, which would fail if it were divided.
        ("v2", _TOP.path, replace(_TOP, path="/system.slice", delegated=False), "puhui-containers.service"),
        ("v2", f"{_TOP.path}/other", _TOP, "puhui-containers.service"),
    ],
)
def test_nothing_else_is_divided(layout: str, own: str | None, above: Seen | None, said: str) -> None:
    division = divide(layout, own, above, "puhui")
    assert division.top == ""
    assert division.controllers == ()
    assert said in division.no_limits
    assert said in division.no_freezer


def _cgroup(folder: Path, controllers: str = "cpu memory pids") -> None:
    """Makes what the kernel makes; its files keep what was written to them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        (folder / name).touch()
    (folder / "cgroup.controllers").write_text(controllers)


def _put(root: Path, pid: int, cgroup: str) -> None:
    (root / "proc" / str(pid)).mkdir(parents=True)
    (root / "proc" / str(pid) / "cgroup").write_text(f"0::{cgroup}\n")


def test_a_delegated_cgroup_is_known_by_its_mark(tmp_path: Path) -> None:
    _cgroup(tmp_path / "a/daemon")
    _cgroup(tmp_path / "a", controllers="memory pids")
    _put(tmp_path, 7, "/a/daemon")
    tree = CgroupTree(tmp_path, tmp_path / "proc")
    own, above = tree.survey(7, 0)
    assert own == "/a/daemon"
    assert above == Seen("/a", delegated=False, controllers=frozenset({"memory", "pids"}))
    os.setxattr(tmp_path / "a", "user.delegate", b"1")
    _, above = tree.survey(7, 0)
    assert above is not None
    assert above.delegated
    assert tree.survey(8, 0) == (None, None)
    _put(tmp_path, 9, "/a")
    assert tree.survey(9, 0) == ("/a", None)
    _put(tmp_path, 10, "/gone/daemon")
    assert tree.survey(10, 0) == ("/gone/daemon", None)


def test_a_cgroup_that_is_not_marked_is_known_by_its_owner() -> None:
    assert is_border(999, 999, 0)
    assert not is_border(999, 999, 999)
    assert not is_border(999, 998, 0)
    assert not is_border(0, 0, 0)


def test_a_divided_cgroup_is_divided_again_without_loss(tmp_path: Path) -> None:
    top = tmp_path / "top"
    _cgroup(top)
    _cgroup(top / "containers")
    (top / "containers/libpod-1").mkdir()
    division = Division("/top", ("cpu", "memory"))
    tree = CgroupTree(tmp_path)
    tree.carry_out(division, os.getuid(), os.getgid())
    assert (top / "containers/libpod-1").is_dir()
    assert (top / "cgroup.subtree_control").read_text().startswith("+")
    (top / "containers/cgroup.subtree_control").write_text("cpu")
    got = tree.look(division)
    assert (got.parent, got.controllers, got.freezer) == ("/top/containers", ("cpu",), True)
    # What the kernel refused is told of.
    assert "memory, pids" in got.no_limits
    (top / "containers/cgroup.freeze").unlink()
    assert "no freezer" in tree.look(division).no_freezer


def test_what_cannot_be_divided_is_told_of(tmp_path: Path) -> None:
    _put(tmp_path, os.getpid(), "/top/daemon")
    _cgroup(tmp_path / "top")
    os.setxattr(tmp_path / "top", "user.delegate", b"1")
    (tmp_path / "top/containers").touch()
    got = claim("v2", os.getuid(), os.getgid(), "puhui", CgroupTree(tmp_path, tmp_path / "proc"))
    assert got.parent == ""
    assert "cannot be divided (File exists" in got.no_limits
    assert not got.freezer


def test_on_other_layouts_nothing_is_looked_at(tmp_path: Path) -> None:
    got = claim("hybrid", 999, 999, "puhui", CgroupTree(tmp_path / "none", tmp_path / "none"))
    assert (got.parent, got.controllers, got.freezer) == ("", (), False)
    assert got.no_limits == (
        "that needs cgroup v2 with its controllers delegated to user puhui, and this host's layout is hybrid"
    )
