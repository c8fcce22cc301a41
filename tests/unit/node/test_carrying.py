"""Uploaded workspaces that nobody uses are dropped, and those that somebody may use are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nodedaemon.carrying import Carrying, choose_workspace
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.process_runtime import ProcessRuntime
from nodedaemon.process_user import ProcessUser
from nodedaemon.records import ContainerRecord, ContainerStage
from nodedaemon.workspace import Attempts
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now

_OWNER = Owner("centre", "j-1", 2)
_DAY_S = 24 * 3600


def _record(owner: Owner, stage: ContainerStage, workspace_of: int = 0) -> ContainerRecord:
    return ContainerRecord(owner, 1, stage, "image", "", (), 1.0, 1.0, workspace_of=workspace_of)


async def test_what_was_uploaded_and_never_used_goes_after_a_day(tmp_path: Path) -> None:
    journal, attempts = Journal(tmp_path / "node.db"), Attempts(tmp_path / "attempts", os.geteuid(), os.getegid())
    runtime = ProcessRuntime(tmp_path / "processes", ProcessUser("me", os.geteuid(), os.getegid()), "")
    (tmp_path / "uploads/half").mkdir(parents=True)
    carrying = Carrying(tmp_path / "uploads", journal, attempts, runtime, os.geteuid(), os.getegid())
    assert list((tmp_path / "uploads").iterdir()) == []  # cut short by a crash
    used = Owner("centre", "j-2", 1)
    for owner in (_OWNER, used):
        attempts.make_folder(owner).carried.mkdir()
    journal.put_container(_record(used, ContainerStage.CREATING))
    await carrying.prune(now() + _DAY_S - 60)
    assert attempts.folder(_OWNER).carried.exists()
    await carrying.prune(now() + _DAY_S + 60)
    assert not attempts.folder(_OWNER).path.exists()
    assert attempts.folder(used).carried.exists()
    await runtime.close()
    journal.close()


@pytest.mark.parametrize("stage", [ContainerStage.EXITED, ContainerStage.REMOVED])
def test_a_workspace_is_taken_and_given_back_in_one_step_each(tmp_path: Path, stage: ContainerStage) -> None:
    journal, attempts = Journal(tmp_path / "node.db"), Attempts(tmp_path / "attempts", os.geteuid(), os.getegid())
    earlier = _OWNER.of_attempt(1)
    journal.put_container(_record(earlier, stage))
    (attempts.make(earlier).workspace / "kept").touch()
    attempts.folder(earlier).workspace.chmod(0)
    assert choose_workspace(journal, attempts, _OWNER, 1, None) == 1
    for _ in range(2):
        attempts.take_workspace(_OWNER, 1)
    mine = attempts.make(_OWNER).workspace
    assert (mine / "kept").exists()
    # A second try to make the container finds it taken; another attempt does not find it.
    half_made = _record(_OWNER, ContainerStage.CREATING, workspace_of=1)
    assert choose_workspace(journal, attempts, _OWNER, 1, half_made) == 1
    with pytest.raises(Refusal) as caught:
        choose_workspace(journal, attempts, _OWNER.of_attempt(3), 1, None)
    assert caught.value.reason == "WORKSPACE_NOT_FOUND"
    for _ in range(2):
        attempts.return_workspace(_OWNER, 1)
    assert (attempts.folder(earlier).workspace / "kept").exists()
    attempts.remove(_OWNER, but_carried=True)
    assert not attempts.folder(_OWNER).path.exists()
    journal.close()
