"""A small centre for every test that asks for one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cli.small_centre import RunningCentre, running_centre


@pytest.fixture
def running() -> Iterator[RunningCentre]:
    with running_centre() as centre:
        yield centre


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "train.py").write_text("print('hello')\n")
    return folder
