"""Settings that cannot work are refused with a sentence, before anything is touched."""

from __future__ import annotations

import subprocess
import sys
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
        (["--listen", "nonsense", "--emulate", "A100-80GB:1"], "'nonsense' is no address; write HOST:PORT"),
        (["--listen", "127.0.0.1:65536", "--emulate", "A100-80GB:1"], "a port up to 65535"),
        (["--listen", "127.0.0.1:http", "--emulate", "A100-80GB:1"], "is no address"),
        (["--listen", "unix:relative", "--emulate", "A100-80GB:1"], "must be absolute"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    state = tmp_path / "state"
    outcome = CliRunner().invoke(app, ["serve", "--state", str(state), *arguments])
    assert outcome.exit_code == 1
    assert words in " ".join(outcome.output.split())
    assert not state.exists()


def test_an_unknown_card_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["serve", "--state", str(tmp_path), "--emulate", "H1000:1"])
    assert outcome.exit_code == 1
    assert "A100-80GB" in outcome.output


def test_an_unknown_log_level_is_a_usage_error(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["serve", "--state", str(tmp_path), "--log-level", "loud"])
    assert outcome.exit_code == 2


def test_a_second_daemon_names_the_first(tmp_path: Path) -> None:
    hold = (
        "import sys, pathlib; from nodedaemon.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]) / 'node.db'); print('holds', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"holds\n"
        outcome = CliRunner().invoke(app, ["serve", "--state", str(tmp_path), "--emulate", "A100-80GB:1"])
        first.communicate()
    assert outcome.exit_code == 1
    assert f"in use by process {first.pid}" in " ".join(outcome.output.split())
