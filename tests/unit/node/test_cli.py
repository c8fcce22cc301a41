"""Settings that cannot work are refused with a sentence, before anything is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nodedaemon.cli import app


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--runtime", "process"], "refused on real GPUs"),
        (["--runtime", "docker", "--emulate", "A100-80GB:1"], "use auto, podman or process"),
        (["--listen", "0.0.0.0:7071", "--emulate", "A100-80GB:1"], "loopback"),
        (["--listen", "nonsense", "--emulate", "A100-80GB:1"], "loopback"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    state = tmp_path / "state"
    outcome = CliRunner().invoke(app, ["serve", "--state", str(state), *arguments])
    assert outcome.exit_code == 1
    assert words in outcome.output
    assert not state.exists()


def test_an_unknown_card_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["serve", "--state", str(tmp_path), "--emulate", "H1000:1"])
    assert outcome.exit_code == 1
    assert "A100-80GB" in outcome.output


def test_an_unknown_log_level_is_a_usage_error(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["serve", "--state", str(tmp_path), "--log-level", "loud"])
    assert outcome.exit_code == 2
