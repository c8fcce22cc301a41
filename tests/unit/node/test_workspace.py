"""The directories of attempts."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nodedaemon.owner import Owner
from nodedaemon.workspace import Attempts

_ROUNDS = 300


def test_one_attempt_is_made_while_the_only_other_one_of_its_centre_is_removed(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "attempts", os.geteuid(), os.getegid())

    def come_and_go(job_id: str) -> int:
        owner, made = Owner("centre", job_id, 1), 0
        for _ in range(_ROUNDS):
            made += attempts.make(owner).outputs.is_dir()
            attempts.remove(owner)
        return made

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(come_and_go, ["job-1", "job-2"])) == [_ROUNDS, _ROUNDS]
    assert list((tmp_path / "attempts").iterdir()) == []
