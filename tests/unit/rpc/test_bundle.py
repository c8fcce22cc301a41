"""A bundle is refused before it can do harm, and otherwise comes out as it went in."""

import gzip
import hashlib
import io
import os
import socket
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puhui.rpc.bundle import (
    SKIPPED_FOLDERS,
    BundleLimits,
    Contents,
    check,
    pack,
    pack_files,
    read_files,
    survey,
    unpack,
)
from puhui.rpc.errors import Refusal
from tests.unit.rpc.archives import archive, entry, files

SMALL = BundleLimits(
    archive_bytes=100_000, unpacked_bytes=200_000, files=20, links=3, ratio=50, ratio_floor_bytes=50_000
)
GOOD = (entry("train.py"), b"print(1)\n")
INVALID, EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED

SYM, HARD, DIR = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE


def header_only(name: str, kind: bytes, size: int) -> bytes:
    """Returns an archive whose one header announces more than follows."""
    return gzip.compress(entry(name, kind, size=size).tobuf(tarfile.GNU_FORMAT) + bytes(1024))


MALICIOUS: dict[str, tuple[bytes, grpc.StatusCode, str]] = {
    "parent": (archive([GOOD, (entry("../x"), b"x")]), INVALID, "BUNDLE_PATH_OUTSIDE"),
    "parent in the middle": (archive([GOOD, (entry("a/../../x"), b"x")]), INVALID, "BUNDLE_PATH_OUTSIDE"),
    "absolute": (archive([GOOD, (entry("/etc/passwd"), b"x")]), INVALID, "BUNDLE_PATH_OUTSIDE"),
    "backslash": (archive([GOOD, (entry("a\\..\\..\\x"), b"x")]), INVALID, "BUNDLE_PATH_OUTSIDE"),
    "no name": (archive([GOOD, (entry("."), b"x")]), INVALID, "BUNDLE_PATH_OUTSIDE"),
    "long name": (archive([GOOD, (entry("n" * 256), b"x")]), INVALID, "BUNDLE_PATH_OUTSIDE"),
    "long path": (archive([GOOD, (entry("/".join(["d" * 200] * 6)), b"x")]), INVALID, "BUNDLE_PATH_OUTSIDE"),
    "huge name": (archive([GOOD, (entry("d/" * 50_000 + "x"), b"x")]), INVALID, "BUNDLE_PATH_OUTSIDE"),
    "name that is not text": (
        archive([GOOD, (entry("\udcff.py"), b"x")], tarfile.GNU_FORMAT),
        INVALID,
        "BUNDLE_NAME_ENCODING",
    ),
    "character device": (archive([GOOD, (entry("null", tarfile.CHRTYPE), b"")]), INVALID, "BUNDLE_ENTRY_KIND"),
    "block device": (archive([GOOD, (entry("sda", tarfile.BLKTYPE), b"")]), INVALID, "BUNDLE_ENTRY_KIND"),
    "fifo": (archive([GOOD, (entry("pipe", tarfile.FIFOTYPE), b"")]), INVALID, "BUNDLE_ENTRY_KIND"),
    "hard link": (archive([GOOD, (entry("x", HARD, "train.py"), b"")]), INVALID, "BUNDLE_ENTRY_KIND"),
    "hard link out": (archive([GOOD, (entry("x", HARD, "/etc/shadow"), b"")]), INVALID, "BUNDLE_ENTRY_KIND"),
    "link to an absolute path": (archive([GOOD, (entry("x", SYM, "/etc"), b"")]), INVALID, "BUNDLE_LINK_OUTSIDE"),
    "link to the parent": (archive([GOOD, (entry("x", SYM, ".."), b"")]), INVALID, "BUNDLE_LINK_OUTSIDE"),
    "link deep inside that leads out": (
        archive([GOOD, (entry("a/b/x", SYM, "../../../etc"), b"")]),
        INVALID,
        "BUNDLE_LINK_OUTSIDE",
    ),
    "link through another link": (
        # By its letters a/up/../../x stays inside; by way of the link it does not.
        archive([GOOD, (entry("a/b", DIR), b""), (entry("a/up", SYM, ".."), b""), (entry("x", SYM, "a/up/../y"), b"")]),
        INVALID,
        "BUNDLE_LINK_OUTSIDE",
    ),
    "link through a later link": (
        archive([GOOD, (entry("x", SYM, "a/up/../y"), b""), (entry("a/up", SYM, ".."), b"")]),
        INVALID,
        "BUNDLE_LINK_OUTSIDE",
    ),
    "links in a circle": (
        archive([GOOD, (entry("x", SYM, "y"), b""), (entry("y", SYM, "x"), b"")]),
        INVALID,
        "BUNDLE_LINK_OUTSIDE",
    ),
    "link without a target": (archive([GOOD, (entry("x", SYM, ""), b"")]), INVALID, "BUNDLE_LINK_OUTSIDE"),
    "file through a link": (
        archive([GOOD, (entry("d", DIR), b""), (entry("x", SYM, "d"), b""), (entry("x/f"), b"x")]),
        INVALID,
        "BUNDLE_PATH_OUTSIDE",
    ),
    "link in place of a folder": (
        archive([GOOD, (entry("x/f"), b"x"), (entry("x", SYM, "d"), b"")]),
        INVALID,
        "BUNDLE_PATH_TWICE",
    ),
    "file over a link": (
        archive([GOOD, (entry("x", SYM, "train.py"), b""), (entry("x"), b"x")]),
        INVALID,
        "BUNDLE_PATH_TWICE",
    ),
    "file twice": (archive([GOOD, GOOD]), INVALID, "BUNDLE_PATH_TWICE"),
    "file twice, spelt otherwise": (archive([GOOD, (entry("./a/../train.py"), b"x")]), INVALID, "BUNDLE_PATH_TWICE"),
    "file as a folder": (archive([GOOD, (entry("train.py/x"), b"x")]), INVALID, "BUNDLE_PATH_TWICE"),
    "too many links": (
        archive([GOOD, *((entry(f"l{n}", SYM, "train.py"), b"") for n in range(4))]),
        EXHAUSTED,
        "BUNDLE_TOO_MANY_FILES",
    ),
    "too many files": (
        archive([(entry(f"f{n}"), b"x") for n in range(21)]),
        EXHAUSTED,
        "BUNDLE_TOO_MANY_FILES",
    ),
    "too many folders by one name": (archive([(entry("a/" * 30 + "f"), b"x")]), EXHAUSTED, "BUNDLE_TOO_MANY_FILES"),
    "too large an archive": (files(noise=os.urandom(120_000)), EXHAUSTED, "BUNDLE_TOO_LARGE"),
    "too large unpacked": (
        files(noise=os.urandom(50_000), a=b"ab" * 90_000),
        EXHAUSTED,
        "BUNDLE_TOO_LARGE",
    ),
    "bomb": (files(zeros=bytes(150_000)), EXHAUSTED, "BUNDLE_RATIO"),
    "bomb behind the end": (
        gzip.compress(gzip.decompress(files(a=b"x")) + bytes(150_000)),
        EXHAUSTED,
        "BUNDLE_RATIO",
    ),
    "bomb in an extended header": (header_only("x", tarfile.XHDTYPE, 2**32), INVALID, "BUNDLE_PATH_OUTSIDE"),
    "bomb in a long name": (header_only("x", tarfile.GNUTYPE_LONGNAME, 2**32), INVALID, "BUNDLE_PATH_OUTSIDE"),
    "no file": (archive([(entry("d", DIR), b"")]), INVALID, "BUNDLE_EMPTY"),
    "nothing": (archive([]), INVALID, "BUNDLE_EMPTY"),
    "no archive": (b"PK\x03\x04 this is a zip", INVALID, "BUNDLE_UNREADABLE"),
    "empty file": (b"", INVALID, "BUNDLE_UNREADABLE"),
    "gzip of something else": (gzip.compress(b"hello" * 1000), INVALID, "BUNDLE_UNREADABLE"),
    "truncated": (files(a=os.urandom(5000))[:-2000], INVALID, "BUNDLE_UNREADABLE"),
    "truncated at its very end": (files(a=b"x")[:-4], INVALID, "BUNDLE_UNREADABLE"),
    "wrong checksum": (files(a=b"x")[:-8] + struct.pack("<I", 1) + files(a=b"x")[-4:], INVALID, "BUNDLE_UNREADABLE"),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_a_harmful_archive_is_refused_and_nothing_is_unpacked(case: str, tmp_path: Path) -> None:
    data, code, reason = MALICIOUS[case]
    path = tmp_path / "archive"
    path.write_bytes(data)
    target = tmp_path / "inside" / "target"
    target.mkdir(parents=True)
    read: list[Callable[[], object]] = [
        lambda: check(path, SMALL),
        lambda: unpack(path, target, SMALL),
        lambda: read_files(path, SMALL, suffixes=("",), most_bytes=10**9),
    ]
    for attempt in read:
        with pytest.raises(Refusal) as caught:
            attempt()
        assert (caught.value.code, caught.value.reason) == (code, reason)
    assert [found.name for found in tmp_path.rglob("*") if found != path] == ["inside", "target"]


def test_sparse_files_cannot_claim_any_size(tmp_path: Path) -> None:
    # A GNU sparse header: 512 bytes of data, a terabyte of claimed size.
    header = bytearray(entry("big", tarfile.GNUTYPE_SPARSE, size=512).tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"00000000000\0", b"00000001000\0"
    header[483:495] = b"17777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "archive"
    path.write_bytes(gzip.compress(bytes(header) + bytes(512) + bytes(1024)))
    with pytest.raises(Refusal) as caught:
        check(path, SMALL)
    assert caught.value.reason in ("BUNDLE_ENTRY_KIND", "BUNDLE_TOO_LARGE")


def test_harmless_oddities_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(
        archive(
            [
                (entry("./", DIR), b""),
                (entry("./a", DIR), b""),
                (entry("./a", DIR), b""),
                (entry("a/../a/训练.py"), b"x"),
                (entry("a/link", SYM, "../a/训练.py"), b""),
                (entry("a/dangling", SYM, "missing"), b""),
                (entry("self", SYM, "."), b""),
            ]
        )
    )
    target = tmp_path / "target"
    target.mkdir()
    contents = unpack(path, target, SMALL)
    assert contents.sizes == {"a/训练.py": 1}
    assert (target / "a/link").read_text() == "x"
    assert read_files(path, SMALL, suffixes=(".py",), most_bytes=10) == Contents({"a/训练.py": b"x"}, {})
    assert read_files(path, SMALL, suffixes=(".py",), most_bytes=0) == Contents({}, {})
    digested = read_files(path, SMALL, suffixes=(".py",), most_bytes=0, largest_digested=1)
    assert digested.digests["a/训练.py"] == hashlib.sha256(b"x").hexdigest()


def test_unpacked_files_have_plain_modes_and_our_owner(tmp_path: Path) -> None:
    odd = entry("tool")
    odd.mode, odd.uid, odd.gid = 0o6777, 12345, 12345
    path = tmp_path / "archive"
    path.write_bytes(archive([(odd, b"x")]))
    target = tmp_path / "target"
    target.mkdir()
    unpack(path, target, SMALL)
    status = (target / "tool").stat()
    assert (status.st_mode & 0o7777, status.st_uid) == (0o755, os.geteuid())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "pkg/__pycache__").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "train.py").write_text("print(1)\n")
    (root / "pkg/__init__.py").write_text("")
    (root / "pkg/__pycache__/x.pyc").write_bytes(b"x")
    (root / ".git/config").write_text("secret")
    (root / "run.sh").write_text("true\n")
    (root / "run.sh").chmod(0o700)
    (root / "latest").symlink_to("pkg")
    return root


def packed(source: Path) -> bytes:
    data = io.BytesIO()
    pack(source, data)
    return data.getvalue()


def test_packing_leaves_out_what_is_not_code_and_keeps_the_rest(tree: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tree / "s"))
        os.link(tree / "train.py", tree / "again.py")
        with (tmp_path / "archive").open("wb") as file:
            contents = pack(tree, file)
    assert set(contents.sizes) == {"train.py", "again.py", "pkg/__init__.py", "run.sh"}
    target = tmp_path / "target"
    target.mkdir()
    assert unpack(tmp_path / "archive", target, BundleLimits()) == contents == survey(tree, BundleLimits())
    assert (target / "again.py").read_text() == "print(1)\n"
    assert os.access(target / "run.sh", os.X_OK)
    assert (target / "latest").readlink() == Path("pkg")
    assert (target / "train.py").stat().st_mtime > 315_500_000  # a zip archive can hold it


def test_the_same_tree_packs_to_the_same_bytes(tree: Path) -> None:
    first = packed(tree)
    os.utime(tree / "train.py", (1, 1))
    (tree / "pkg/__pycache__/y.pyc").write_bytes(b"y")
    assert packed(tree) == first
    (tree / "train.py").write_text("print(2)\n")
    assert packed(tree) != first


def test_one_file_is_a_bundle(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(packed(tree / "train.py"))
    assert check(tmp_path / "archive", SMALL).sizes == {"train.py": 9}


@pytest.mark.parametrize("target", ["/etc/passwd", "../elsewhere", "pkg/../../x"])
def test_a_link_out_of_the_tree_is_named_before_anything_is_sent(tree: Path, target: str) -> None:
    (tree / "out").symlink_to(target)
    for attempt in (lambda: packed(tree), lambda: survey(tree, BundleLimits())):
        with pytest.raises(Refusal, match="out") as caught:
            attempt()
        assert caught.value.reason == "BUNDLE_LINK_OUTSIDE"


def test_survey_stops_at_the_limits(tree: Path) -> None:
    with (tree / "weights.bin").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(Refusal, match="leave out what the code does not need") as caught:
        survey(tree, BundleLimits())
    assert caught.value.reason == "BUNDLE_TOO_LARGE"


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        packed(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_files_by_path_stay_inside(name: str) -> None:
    with pytest.raises(Refusal) as caught:
        pack_files({name: b"x"})
    assert caught.value.reason == "BUNDLE_PATH_OUTSIDE"


# No "/", no NUL, no backslash, no surrogates; and none of the names that packing leaves out.
PART = st.text(st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda part: part not in {".", "..", *SKIPPED_FOLDERS} and len(part.encode()) < 200
)
TREES = st.dictionaries(
    st.lists(PART, min_size=1, max_size=3).map("/".join), st.binary(max_size=2000), min_size=1, max_size=8
).filter(lambda tree: not any(a != b and b.startswith(a + "/") for a in tree for b in tree))


@given(TREES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_whatever_is_packed_comes_out_the_same(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, bytes]
) -> None:
    folder = tmp_path_factory.mktemp("round")
    source, target = folder / "source", folder / "target"
    target.mkdir()
    for name, content in tree.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "archive").write_bytes(packed(source))
    limits = BundleLimits()
    contents = check(folder / "archive", limits)
    assert unpack(folder / "archive", target, limits) == contents
    assert {
        path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()
    } == tree
    assert contents.sizes == {name: len(content) for name, content in tree.items()}
    assert read_files(folder / "archive", limits, suffixes=("",), most_bytes=10**6).files == tree
    (folder / "inline").write_bytes(pack_files(tree))
    assert check(folder / "inline", limits) == contents


@given(st.binary(max_size=3000), st.integers(0, 3000))
@settings(max_examples=100, deadline=None)
def test_damage_never_gets_past_the_check_as_something_else(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, where: int
) -> None:
    plain = bytearray(gzip.decompress(files(**{"train.py": b"print(1)\n" * 50, "b": b"x"})))
    plain[where : where + len(noise)] = noise
    folder = tmp_path_factory.mktemp("damage")
    (folder / "archive").write_bytes(gzip.compress(bytes(plain)))
    target = folder / "in" / "target"
    target.mkdir(parents=True)
    refused = []
    sizes: set[str] = set()
    try:
        sizes = set(unpack(folder / "archive", target, SMALL).sizes)
    except Refusal as refusal:
        refused.append(refusal.code)
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == sizes
    assert bool(refused) != bool(sizes)
    assert set(refused) <= {INVALID, EXHAUSTED}
    assert {path.name for path in folder.iterdir()} == {"archive", "in"}
    assert [path.name for path in (folder / "in").iterdir()] == ["target"]
