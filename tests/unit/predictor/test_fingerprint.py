"""What makes two submissions the same, and what does not."""

import ast
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_onnx import CodeBundle, fingerprint

TRAIN = '''
"""Trains."""
import argparse
import torch
from torch import nn


class Net(nn.Module):
    """A net."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        return self.layers(x)


def main():
    batch = 64
    model = Net().cuda()
    for step in range(10):
        x = torch.randn(batch, 784).cuda()
        print(f"{model(x).sum():.3f}", b"x", 1e-3, 2j, ..., None, -1)


main()
'''


def of(
    text: str = TRAIN,
    command: str = "python3 train.py",
    environment: Mapping[str, str] | None = None,
    image: str = "sha256:1",
    input_bytes: int = 0,
    **others: str,
) -> str:
    files = {"train.py": text} | {name.replace("_", "."): one for name, one in others.items()}
    return fingerprint(CodeBundle(files), command.split(), environment or {}, image, input_bytes)


SAME = of()


@given(st.data())
def test_comments_blank_lines_and_trailing_spaces_change_nothing(data: st.DataObject) -> None:
    comments = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=20).map("#".__add__)
    spaces = st.integers(0, 5).map(" ".__mul__)
    empty = st.lists(st.tuples(spaces, st.just("") | comments).map("".join), max_size=2)
    written = []
    for line in TRAIN.split("\n"):
        written += [*data.draw(empty), line + data.draw(st.just("") | spaces | comments.map(" ".__add__))]
    assert of("\n".join(written)) == SAME


@given(st.integers(1, 8))
def test_indentation_quotes_and_brackets_change_nothing(spaces: int) -> None:
    text = "\n".join(
        " " * (spaces * ((len(line) - len(line.lstrip())) // 4)) + line.lstrip() for line in TRAIN.split("\n")
    )
    assert of(text) == SAME
    assert of(ast.unparse(ast.parse(TRAIN))) == SAME
    assert of(TRAIN.replace("batch = 64", "batch = (64)").replace("\n", "\r\n")) == SAME


def test_docstrings_change_nothing() -> None:
    assert of(TRAIN.replace('"""Trains."""', "").replace('    """A net."""\n', "")) == SAME
    assert of("def f():\n    pass") == of('def f():\n    """It does nothing."""') != of("def f():\n    return 1")


@given(st.integers(1, 4096))
def test_another_batch_size_is_another_program(batch: int) -> None:
    assert (of(TRAIN.replace("batch = 64", f"batch = {batch}")) == SAME) is (batch == 64)
    assert (of(command=f"python3 train.py --batch-size {batch}") == of(command="python3 train.py --batch-size 64")) is (
        batch == 64
    )
    assert (of(environment={"BATCH": str(batch)}) == of(environment={"BATCH": "64"})) is (batch == 64)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("python3 train.py --lr=0.1", "python3.11 ./train.py --lr 0.1"),
        ("python3 train.py", "/usr/bin/python3 -u /workspace/code/train.py"),
        ("python3 train.py --lr 0.1 --output-dir runs/1", "python3 train.py --output_dir=runs/2 --lr 0.1"),
        ("torchrun train.py --log-dir a", "torchrun train.py"),
    ],
)
def test_how_it_is_called_and_where_it_writes_changes_nothing(one: str, other: str) -> None:
    assert of(command=one) == of(command=other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("python3 train.py --amp", "python3 train.py"),
        ("python3 train.py -o 1", "python3 train.py -o 2"),
        ("python3 train.py --output-dir --amp", "python3 train.py --amp"),
        ("python3 train.py --data a", "python3 train.py --data b"),
        ("python3 train.py ab c", "python3 train.py a bc"),
        ("python3 train.py --output 10", "python3 train.py --output 50000"),
        ("python3 train.py", ""),
    ],
)
def test_what_may_matter_counts(one: str, other: str) -> None:
    assert of(command=one) != of(command=other)


def test_image_files_and_amount_of_data_count() -> None:
    others = [
        of(image="sha256:2"),
        of(input_bytes=2**30),
        of(input_bytes=2**31),
        of(other_py="x = 1"),
        of(other_py="x = 2"),
        of(environment={"A": "1"}),
    ]
    assert len({SAME, *others}) == len(others) + 1
    assert of(input_bytes=2**30) == of(input_bytes=2**30 + 12345)
    assert of(README_md="first") == of(README_md="second") == SAME


def test_data_in_the_bundle_counts_by_its_size() -> None:
    def with_data(size: int, name: str = "images.bin") -> str:
        code = CodeBundle({"train.py": TRAIN}, {"train.py": len(TRAIN), name: size})
        return fingerprint(code, ["python3", "train.py"], {}, "sha256:1")

    assert with_data(1000) == with_data(1001) != with_data(5000)
    assert with_data(5000, "guide.md") == SAME


def test_other_small_files_count_by_their_content() -> None:
    def with_file(digest: str, name: str = "train.gin") -> str:
        code = CodeBundle({"train.py": TRAIN}, {"train.py": len(TRAIN), name: 20}, {name: digest})
        return fingerprint(code, ["python3", "train.py"], {}, "sha256:1")

    assert with_file("1") == with_file("1") != with_file("2")
    assert with_file("1") != with_file("1", "Makefile")
    assert with_file("1", "guide.md") == with_file("2", "guide.md") == SAME


def test_a_docstring_that_the_program_reads_counts() -> None:
    program = '"""Usage: train.py [--batch=N]  [default: {}]"""\nimport docopt\ndocopt.docopt(__doc__)\n'
    assert of(program.format(64)) != of(program.format(512))
    silent = program.replace("__doc__", "USAGE")
    assert of(silent.format(64)) == of(silent.format(512))


def test_code_that_does_not_parse_still_has_a_name() -> None:
    assert of("def (") != of("def )")
    assert of("def (  \r\n\r\n") == of("def (")


def test_code_nested_deeper_than_the_stack_has_a_name() -> None:
    text = "x = " + "+".join(["1"] * 20_000)
    assert of(text) == of(text + "  ") != of(text + "+1")


def test_texts_that_are_too_large_to_parse_count_byte_by_byte() -> None:
    large = "x = 1\n" * 100_000
    assert of(large) == of(large) != of(large + "# more")
    assert of(config_py=" \n" * 500_000) != of(config_py="\n" * 500_000)
    assert of("x = 1", config_yaml="a: 1  \nb: 2") == of("x = 1", config_yaml="a: 1\r\nb: 2\n")


def test_long_integers_have_a_name() -> None:
    assert of(f"x = 0x{'f' * 20_000}") == of(f"x = (0x{'F' * 20_000})") != of(f"x = 0x{'f' * 19_999}")


def test_the_name_is_the_same_in_every_version() -> None:
    """Recorded on Python 3.11. What changes it makes everything that was learnt unknown: change the version then."""

    assert of(command="python3 train.py --epochs=3") == RECORDED


RECORDED = "cbfc4426b22cbf4a85a578c66dbe64a5acbc26e6511c11817bb96807a2de1e35"
