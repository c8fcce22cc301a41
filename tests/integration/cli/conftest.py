"""The program, a small centre for it to talk to, and some code to run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cli.program import Puhui
from tests.unit.cli.small_centre import RunningCentre, running_centre


@pytest.fixture
def running() -> Iterator[RunningCentre]:
    with running_centre() as centre:
        yield centre


@pytest.fixture
def puhui(tmp_path: Path, running: RunningCentre) -> Puhui:
    return Puhui.at(tmp_path / "home", running.address)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / "Some Code"
    folder.mkdir()
    path = folder / "train.py"
    path.write_text("print('hello')\n")
    return path


@pytest.fixture
def code_folder(script: Path) -> str:
    return str(script.parent)
