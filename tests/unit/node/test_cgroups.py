"""How the daemon divides its cgroup."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from nodedaemon.cgroups import CgroupTree, Division, Seen, claim, divide, is_border, own_path

_UNIT = Seen("/system.slice/containers.service", delegated=True, controllers=frozenset({"cpu", "io", "memory", "pids"}))
_DAEMON = Seen(f"{_UNIT.path}/daemon", delegated=True, controllers=_UNIT.controllers)
_SLICE = Seen("/system.slice", delegated=False, controllers=_UNIT.controllers)
_FILES = ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads", "cgroup.controllers", "cgroup.freeze")


def test_the_cgroup_of_a_process_is_read() -> None:
    assert own_path("12:pids:/a\n0::/system.slice/x.service\n") == "/system.slice/x.service"
    assert own_path("12:pids:/a\n") is None
    assert own_path("0::/\n") == "/"


def test_controllers_are_handed_down_where_the_daemon_was_put_into_its_part() -> None:
    division = divide("v2", _DAEMON, _UNIT, "puhui")
    assert division.controllers == ("cpu", "memory", "pids")
    assert division.daemon == _DAEMON.path
    assert division.containers == f"{_UNIT.path}/containers"
    assert (division.no_limits, division.no_freezer) == ("", "")


def test_controllers_that_are_not_there_are_named() -> None:
    division = divide("v2", _DAEMON, replace(_UNIT, controllers=frozenset({"memory"})), "puhui")
    assert division.controllers == ("memory",)
    assert "cpu, pids" in division.no_limits
    assert not division.no_freezer


def test_a_cgroup_that_systemd_must_enter_again_is_divided_only_where_no_controller_can_be_handed_down() -> None:
    division = divide("v2", _UNIT, _SLICE, "puhui")
    assert not division.top
    assert "systemd could not start the daemon again" in division.no_limits
    assert "systemd could not start the daemon again" in division.no_freezer
    bare = divide("v2", replace(_UNIT, controllers=frozenset()), _SLICE, "puhui")
    assert bare.top == _UNIT.path
    assert bare.controllers == ()
    assert "cpu, memory, pids" in bare.no_limits
    assert not bare.no_freezer


@pytest.mark.parametrize(
    ("layout", "own", "above", "said"),
    [
        ("hybrid", None, None, "hybrid"),
        ("v1", None, None, "v1"),
        ("v2", None, None, "cannot be looked at"),
        ("v2", replace(_UNIT, delegated=False), _SLICE, "not the daemon's to divide"),
        ("v2", replace(_DAEMON, delegated=False), replace(_UNIT, delegated=False), "not the daemon's to divide"),
        ("v2", replace(_SLICE, path="/"), None, "not the daemon's to divide"),
    ],
)
def test_what_is_not_the_daemons_is_left_alone(layout: str, own: Seen | None, above: Seen | None, said: str) -> None:
    division = divide(layout, own, above, "puhui")
    assert division.top == ""
    assert division.controllers == ()
    assert said in division.no_limits
    assert said in division.no_freezer


def _cgroup(folder: Path, controllers: str = "cpu memory pids", processes: str = "") -> None:
    """Makes what the kernel makes; these files keep the last command that was written to them."""
    folder.mkdir(parents=True)
    for name in _FILES:
        (folder / name).touch()
    (folder / "cgroup.controllers").write_text(controllers)
    (folder / "cgroup.procs").write_text(processes)


def test_a_delegated_cgroup_is_known_by_its_mark(tmp_path: Path) -> None:
    _cgroup(tmp_path / "a/b")
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/cgroup").write_text("0::/a/b\n")
    tree = CgroupTree(tmp_path, tmp_path / "proc")
    own, above = tree.survey(7, 0)
    assert own == Seen("/a/b", delegated=False, controllers=frozenset({"cpu", "memory", "pids"}))
    assert above is None  # it is no cgroup
    os.setxattr(tmp_path / "a/b", "user.delegate", b"1")
    own, _ = tree.survey(7, 0)
    assert own is not None
    assert own.delegated
    assert tree.survey(8, 0) == (None, None)


def test_a_cgroup_that_is_not_marked_is_known_by_its_owner() -> None:
    assert is_border(999, 999, 0)
    assert not is_border(999, 999, 999)
    assert not is_border(999, 998, 0)
    assert not is_border(0, 0, 0)


def test_a_divided_cgroup_is_divided_again_without_loss(tmp_path: Path) -> None:
    top = tmp_path / "top"
    _cgroup(top)
    for name in ("daemon", "containers"):
        _cgroup(top / name)
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
    proc = tmp_path / "proc" / str(os.getpid())
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text("0::/top\n")
    _cgroup(tmp_path / "top", controllers="")
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
