"""What an attempt left: whatever it is, it packs, unpacks elsewhere, and can be removed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodedaemon.artifacts import LEFT_OUT, MOST_DEPTH, pack_artifacts, read_manifest
from nodedaemon.owner import Owner
from nodedaemon.workspace import Attempts
from puhui.rpc.bundle import BundleLimits, unpack

_LIMITS = BundleLimits()
_OWNER = Owner("centre", "j-1", 1)


def _round_trip(outputs: Path, elsewhere: Path) -> list[str]:
    """Packs and unpacks. Returns what was left out."""
    manifest = pack_artifacts(outputs, elsewhere / "artifacts.tar.gz")
    assert manifest == read_manifest(elsewhere / "artifacts.tar.gz")
    target = elsewhere / "content"
    target.mkdir()
    if manifest.files:
        unpack(elsewhere / "artifacts.tar.gz", target, _LIMITS)
    for file in manifest.files:
        assert (target / file.path).stat().st_size == file.size_bytes
    list_of_rest = target / LEFT_OUT
    return list_of_rest.read_text().splitlines()[1:] if list_of_rest.is_file() else []


def test_the_same_outputs_pack_to_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        outputs = tmp_path / name
        (outputs / "deep").mkdir(parents=True)
        for path in ("b", "deep/c", "a"):
            (outputs / path).write_text(path)
            os.utime(outputs / path, (1, 1))
        os.utime(outputs / "deep", (1, 1))
        pack_artifacts(outputs, tmp_path / f"{name}.tar.gz")
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()
    manifest = read_manifest(tmp_path / "one.tar.gz")
    assert manifest is not None
    assert [file.path for file in manifest.files] == ["a", "b", "deep/c"]
    assert read_manifest(tmp_path / "three.tar.gz") is None


def test_what_cannot_be_unpacked_is_left_out_and_said(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    (outputs / "deep").mkdir(parents=True)
    (outputs / "model.pt").write_text("weights")
    (outputs / "back\\slash").write_text("x")
    Path(os.fsdecode(os.fsencode(outputs) + b"/raw\xff")).write_text("x")
    links = {"loop": "loop", "ping": "pong", "pong": "ping", "up": "..", "root": "/etc", "good": "deep/../model.pt"}
    for name, to in {**links, "good": "model.pt", "deep/good": "../model.pt"}.items():
        (outputs / name).symlink_to(to)
    left_out = _round_trip(outputs, tmp_path)
    assert {line.split(":")[0] for line in left_out} >= {"back\\slash", "raw\\xff", "loop", "up", "root"}
    content = tmp_path / "content"
    assert (content / "model.pt").read_text() == (content / "good").read_text() == (content / "deep/good").read_text()


def test_a_file_of_its_own_called_left_out_is_kept(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / LEFT_OUT).write_text("mine")
    (outputs / "loop").symlink_to("loop")
    _round_trip(outputs, tmp_path)
    assert (tmp_path / "content" / LEFT_OUT).read_text() == "mine"
    assert "loop" in (tmp_path / "content" / f"2-{LEFT_OUT}").read_text()


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[tuple[Attempts, Path]]:
    attempts = Attempts(tmp_path / "attempts", os.geteuid(), os.getegid())
    yield attempts, attempts.make(_OWNER).outputs
    attempts.remove(_OWNER)


def test_a_tree_of_any_depth_packs_to_a_bound_and_is_removed(attempt: tuple[Attempts, Path], tmp_path: Path) -> None:
    attempts, outputs = attempt
    (outputs / "kept").write_text("k")
    here = os.open(outputs, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (line,) = _round_trip(outputs, elsewhere)
    assert f"{MOST_DEPTH} folders" in line
    assert (elsewhere / "content" / "kept").exists()
    attempts.remove(_OWNER)
    assert list((tmp_path / "attempts").iterdir()) == []


_NAMES = st.sampled_from([b"a", b"b", b"c\\d", b"\xff", b"\n", b"..a", "ü".encode(), LEFT_OUT.encode(), b"x" * 255])
_KINDS = st.sampled_from(["file", "folder", "link", "pipe"])
_TARGETS = st.lists(st.sampled_from([b"a", b"b", b"..", b".", b"", b"\xff", b"c\\d", b"a", b"b"]), max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(_NAMES, min_size=1, max_size=5), st.sampled_from(["file", "folder", "link", "pipe"]), _TARGETS
        ),
        max_size=14,
    )
)
def test_whatever_packs_unpacks(tree: list[tuple[list[bytes], str, list[bytes]]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        outputs = Path(name, "outputs")
        outputs.mkdir()
        for parts, kind, target in tree:
            path = Path(os.fsdecode(b"/".join([os.fsencode(outputs), *parts])))
            parents = list(path.parents)[: len(parts) - 1]
            if os.path.lexists(path) or any(p.is_symlink() or (p.exists() and not p.is_dir()) for p in parents):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                path.write_bytes(b"content")
            elif kind == "folder":
                path.mkdir()
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to(os.fsdecode(b"/".join(target) or b"."))
        _round_trip(outputs, Path(name))
