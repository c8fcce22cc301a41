from __future__ import annotations

import grpc
import pytest

from controlplane.entrypoint import find_entrypoint, require_parsable
from puhui.rpc.errors import Refusal

PATHS = {"train.py", "run.sh", "pkg/__init__.py", "pkg/__main__.py", "pkg/deep/work.py", "tool/__main__.py"}


@pytest.mark.parametrize(
    ("command", "path"),
    [
        (["python", "train.py", "--lr", "1"], "train.py"),
        (["python3.11", "-u", "./train.py"], "train.py"),
        (["/usr/bin/python3", "-W", "ignore", "-X", "dev", "train.py"], "train.py"),
        (["python", "-m", "train"], "train.py"),
        (["python", "-m", "pkg"], "pkg/__main__.py"),
        (["python", "-m", "pkg.deep.work"], "pkg/deep/work.py"),
        (["python", "tool"], "tool/__main__.py"),
        (["./run.sh"], "run.sh"),
        (["bash", "run.sh", "x"], "run.sh"),
        (["./train.py"], "train.py"),
    ],
)
def test_the_file_that_a_command_starts_is_found(command: list[str], path: str) -> None:
    entrypoint = find_entrypoint(command, PATHS)
    assert entrypoint is not None
    assert entrypoint.path == path
    assert entrypoint.python == path.endswith(".py")


@pytest.mark.parametrize(
    "command",
    [
        ["nvidia-smi"],
        ["python", "-c", "print(1)"],
        ["python", "-m", "torch.distributed.run", "train.py"],
        ["python"],
        ["python", "-"],
        ["sh", "-c", "echo"],
        ["/opt/tool"],
        ["python", "/opt/image/script.py"],
    ],
)
def test_a_command_may_start_what_is_not_in_the_bundle(command: list[str]) -> None:
    assert find_entrypoint(command, PATHS) is None


@pytest.mark.parametrize(
    "command",
    [
        ["python", "trian.py"],
        ["python", "-m", "pkg.absent"],
        ["./absent.sh"],
        ["bash", "absent.sh"],
        ["../outside.sh"],
        ["python", "../train.py"],
    ],
)
def test_an_entrypoint_that_is_not_there_is_refused(command: list[str]) -> None:
    with pytest.raises(Refusal) as refused:
        find_entrypoint(command, PATHS)
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ENTRYPOINT_NOT_FOUND")


def test_the_refusal_names_what_is_there() -> None:
    with pytest.raises(Refusal, match=r"it has pkg/deep/work\.py"):
        find_entrypoint(["python", "work.py"], PATHS)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (b"x = 1\ndef f(:\n", "2"),
        (b"print 'hello'\n", "1"),
        (b"\x00", "0"),
        (b"x = '\xff'\n", "1"),
        (b"(" * 5000 + b")" * 5000, "1"),
        (b"-" * 100_000 + b"1", "0"),
    ],
)
def test_code_that_does_not_parse_is_refused_with_its_line(source: bytes, line: str) -> None:
    with pytest.raises(Refusal) as refused:
        require_parsable("train.py", source)
    assert refused.value.reason == "CODE_UNPARSABLE"
    assert refused.value.metadata["path"] == "train.py"
    assert refused.value.metadata["line"] in {line, "0"}


def test_odd_but_valid_code_is_taken_without_a_warning() -> None:
    require_parsable("a.py", b"# coding: latin-1\nx = '\\d\xe9'\n")
