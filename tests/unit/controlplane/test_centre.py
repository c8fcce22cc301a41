from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from puhui.v1 import job_pb2
from tests.unit.controlplane.centres import running


async def test_a_centre_that_cannot_forget_goes_on_and_tries_again(tmp_path: Path) -> None:
    async with running(tmp_path, join=False):
        pass
    with closing(sqlite3.connect(tmp_path / "puhui.db")) as db:
        db.execute("drop table requests")
    async with running(tmp_path) as centre:
        assert (await centre.ended(await centre.submit())).state == job_pb2.JOB_STATE_SUCCEEDED
        (forgetting,) = [task for task in centre.centre._tasks if task.get_name() == "forget requests"]
        assert not forgetting.done()
