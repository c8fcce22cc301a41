"""Daemons that end are started again; the daemons are small programs here, the processes real."""

import os
import signal
import sys
from pathlib import Path

import pytest

from puhui.cli.interrupts import Interrupts
from puhui.cli.local_daemon import LocalDaemon
from puhui.cli.supervisor import Supervisor
from puhui.rpc.errors import Refusal

# Becomes ready at the address that it is told, else at :1. Counts its starts in a file; from the third on it fails.
DAEMON = """
import os, signal, sys
from pathlib import Path
from puhui.rpc.notify import notify_ready
_, serve, folder, listen, last_good = sys.argv
starts = Path(folder, "starts")
starts.write_text((starts.read_text() if starts.exists() else "") + listen + "\\n")
if len(starts.read_text().splitlines()) > int(last_good):
    sys.exit("controlplane: no more")
notify_ready(listen if listen != "-" else "127.0.0.1:1")
signal.pause()
"""


class Enough(Exception):  # noqa: N818
    """The test has seen what it wanted."""


class Stage:
    """A supervisor with one daemon, and what it said and kept."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, last_good: int = 99, until: str = "serves again"
    ) -> None:
        self.folder, self.until = folder, until
        (folder / "smalldaemon.py").write_text(DAEMON)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
        self.said: list[str] = []
        self.kept = 0
        self.supervisor = Supervisor(self._keep, self._tell, Interrupts(), start_s=30)
        self.daemon = LocalDaemon(
            "d", "little one", "smalldaemon", lambda at: [str(folder), at or "-", str(last_good)], folder / "d.log"
        )

    def _keep(self) -> None:
        self.kept += 1

    def _tell(self, line: str) -> None:
        self.said.append(line)
        if self.until in line:
            raise Enough

    @property
    def listened_at(self) -> list[str]:
        return (self.folder / "starts").read_text().splitlines()

    def kill(self) -> None:
        assert self.daemon.pid is not None
        os.kill(self.daemon.pid, signal.SIGKILL)


def test_it_is_started_again_at_the_address_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch)
    try:
        stage.supervisor.bring_up([stage.daemon])
        assert stage.daemon.address == "127.0.0.1:1"
        first = stage.daemon.pid
        stage.kill()
        with pytest.raises(Enough):
            stage.supervisor.watch()
        assert stage.listened_at == ["-", "127.0.0.1:1"]
        assert stage.daemon.pid not in (None, first)
        assert stage.supervisor.pids == {"d": stage.daemon.pid}
        assert stage.said[0].startswith("the little one was killed by signal 9; it is started again in 0.2 s")
        assert stage.said[1:] == ["the little one serves again at 127.0.0.1:1"]
    finally:
        stage.supervisor.stop()
    assert stage.daemon.pid is None


def test_it_is_given_up_when_it_is_never_ready_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puhui.cli.restarts.LONGEST_PAUSE_S", 0.3)
    stage = Stage(tmp_path, monkeypatch, last_good=1, until="never said")
    try:
        stage.supervisor.bring_up([stage.daemon])
        stage.kill()
        with pytest.raises(Refusal, match="5 times in a row: no more") as caught:
            stage.supervisor.watch()
        assert caught.value.reason == "DAEMON_FAILED"
        assert len(stage.listened_at) == 6
        # What an earlier one wrote is no reason for the end of a later one.
        assert "no more" not in stage.said[0]
    finally:
        stage.supervisor.stop()


def test_what_cannot_start_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch, last_good=0)
    try:
        with pytest.raises(Refusal, match="little one ended with code 1 before it was ready: no more"):
            stage.supervisor.bring_up([stage.daemon])
        assert len(stage.listened_at) == 1
    finally:
        stage.supervisor.stop()


def test_what_is_never_ready_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch)
    (tmp_path / "smalldaemon.py").write_text("import signal\nsignal.pause()\n")
    supervisor = Supervisor(lambda: None, lambda line: None, Interrupts(), start_s=0.5)
    with pytest.raises(Refusal, match=r"little one was not ready within 0\.5 s"):
        supervisor.bring_up([stage.daemon])
    assert stage.daemon.pid is None
