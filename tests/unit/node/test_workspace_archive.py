"""A workspace as one archive: what comes back is what was there, and nothing hostile gets in."""

from __future__ import annotations

import io
import os
import socket
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nodedaemon.artifacts import LEFT_OUT
from nodedaemon.workspace_archive import pack_workspace, unpack_workspace
from puhui.rpc.errors import Refusal

_ROOM = 2**24


def _unpack(archive: Path, target: Path) -> None:
    target.mkdir()
    unpack_workspace(archive, target, os.geteuid(), os.getegid(), _ROOM)


def _tree(root: Path) -> dict[str, tuple[int, str]]:
    """Returns the mode and the content of everything below a directory, by path."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = str(path.readlink()) if path.is_symlink() else path.read_text() if path.is_file() else ""
        mode = 0 if path.is_symlink() else stat.S_IMODE(status.st_mode)
        found[path.relative_to(root).as_posix()] = (mode, content)
    return found


def test_odd_files_come_back_as_they_were(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    for folder in ("code/deep", "outputs/empty", "names", "shut"):
        (workspace / folder).mkdir(parents=True)
    (workspace / "code/deep/main.py").write_text("not carried")
    for number, name in enumerate(("-rf", " ", "a\nb", "ünï", "*", "x" * 250, "LEFT_OUT")):
        (workspace / "names" / name).write_text(str(number))
    for mode in (0o400, 0o644, 0o755, 0o666, 0o777, 0o4755):
        path = workspace / f"mode-{mode:o}"
        path.write_text("x")
        path.chmod(mode)
    (workspace / "shut/inside").write_text("y")
    (workspace / "shut").chmod(0o500)
    (workspace / "near").symlink_to("names/ünï")
    (workspace / "outputs/up").symlink_to("../near")
    (workspace / "nowhere").symlink_to("not/there")
    (workspace / "outputs/whole").symlink_to("/workspace/names")
    pack_workspace(workspace, tmp_path / "one.tar.gz")
    _unpack(tmp_path / "one.tar.gz", tmp_path / "back")
    wanted = {path: facts for path, facts in _tree(workspace).items() if not path.startswith("code")}
    wanted["mode-4755"] = (0o755, "x")
    wanted["outputs/whole"] = (0, "../names")
    assert _tree(tmp_path / "back") == wanted
    assert (tmp_path / "back/mode-644").stat().st_mtime == pytest.approx(
        (workspace / "mode-644").stat().st_mtime, abs=1
    )
    # The same workspace packs to the same bytes: a broken transfer can go on.
    pack_workspace(tmp_path / "back", tmp_path / "two.tar.gz")
    pack_workspace(tmp_path / "back", tmp_path / "three.tar.gz")
    assert (tmp_path / "two.tar.gz").read_bytes() == (tmp_path / "three.tar.gz").read_bytes()


def test_what_cannot_be_carried_is_said(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (workspace / "out").symlink_to("/etc/passwd")
    (workspace / "up").symlink_to("../../x")
    os.mkfifo(workspace / "pipe")
    (workspace / os.fsdecode(b"\xff\xfe")).write_text("x")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(workspace / "socket"))
    pack_workspace(workspace, tmp_path / "one.tar.gz")
    _unpack(tmp_path / "one.tar.gz", tmp_path / "back")
    assert list(_tree(tmp_path / "back")) == [LEFT_OUT]
    said = (tmp_path / "back" / LEFT_OUT).read_text()
    assert all(name in said for name in ("out:", "up:", "pipe:", "socket:", "\\xff\\xfe:"))


def test_an_empty_workspace_is_carried(tmp_path: Path) -> None:
    (tmp_path / "workspace").mkdir()
    pack_workspace(tmp_path / "workspace", tmp_path / "one.tar.gz")
    _unpack(tmp_path / "one.tar.gz", tmp_path / "back")
    assert _tree(tmp_path / "back") == {}


def _entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, target, size
    return entry


_HOSTILE: dict[str, tuple[Callable[[], list[tarfile.TarInfo]], str]] = {
    "absolute": (lambda: [_entry("/etc/x")], "WORKSPACE_PATH_OUTSIDE"),
    "upwards": (lambda: [_entry("../x")], "WORKSPACE_PATH_OUTSIDE"),
    "link outside": (lambda: [_entry("a", tarfile.SYMTYPE, "/etc")], "WORKSPACE_LINK_OUTSIDE"),
    "through a link": (
        lambda: [_entry("b", tarfile.DIRTYPE), _entry("a", tarfile.SYMTYPE, "b"), _entry("a/x")],
        "WORKSPACE_PATH_OUTSIDE",
    ),
    "hard link": (lambda: [_entry("a", tarfile.LNKTYPE, "/etc/passwd")], "WORKSPACE_ENTRY_KIND"),
    "device": (lambda: [_entry("a", tarfile.CHRTYPE)], "WORKSPACE_ENTRY_KIND"),
    "twice": (lambda: [_entry("a"), _entry("a")], "WORKSPACE_PATH_TWICE"),
    "too large": (lambda: [_entry("a", size=_ROOM + 1)], "WORKSPACE_TOO_LARGE"),
}


@pytest.mark.parametrize("kind", _HOSTILE)
def test_hostile_archives_are_refused_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    make, reason = _HOSTILE[kind]
    archive = tmp_path / "one.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for entry in make():
            tar.addfile(entry, io.BytesIO(b"x" * 512) if 0 < entry.size <= 512 else _Zeros(entry.size))
    with pytest.raises(Refusal) as caught:
        _unpack(archive, tmp_path / "back")
    assert caught.value.reason == reason
    assert "bundle" not in caught.value.message
    assert list((tmp_path / "back").iterdir()) == []


@pytest.mark.parametrize("cut", [0, 10, -5])
def test_a_damaged_archive_is_refused(tmp_path: Path, cut: int) -> None:
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace/x").write_bytes(os.urandom(10_000))
    pack_workspace(tmp_path / "workspace", tmp_path / "one.tar.gz")
    whole = (tmp_path / "one.tar.gz").read_bytes()
    (tmp_path / "one.tar.gz").write_bytes(whole[:cut] if cut else b"not an archive")
    with pytest.raises(Refusal) as caught:
        _unpack(tmp_path / "one.tar.gz", tmp_path / "back")
    assert caught.value.reason == "WORKSPACE_UNREADABLE"
    assert list((tmp_path / "back").iterdir()) == []


class _Zeros(io.RawIOBase):
    """So many zero bytes."""

    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int = -1) -> bytes:
        taken = min(self._left, size if size >= 0 else self._left)
        self._left -= taken
        return bytes(taken)
