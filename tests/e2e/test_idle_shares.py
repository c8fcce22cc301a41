"""Idle shares are taken back by every rung of the ladder and given again, on real rootless containers, whoever dies."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from puhui.client import Centre, Refusal
from puhui.v1 import job_pb2
from puhui.v1.job_pb2 import (
    JOB_KIND_BATCH,
    JOB_KIND_SESSION,
    JOB_STATE_IDLE,
    JOB_STATE_RUNNING,
    RECLAIM_MODE_CHECKPOINT,
    RECLAIM_MODE_DETACH,
    RECLAIM_MODE_NEVER,
    RECLAIM_MODE_STOP,
    JobSpec,
)
from tests.e2e.site import Site, Story, ended, policy, ran, site

pytestmark = [pytest.mark.podman, pytest.mark.timeout(180)]

# Computes on its card for a moment, then keeps it open and sleeps; reads it again once a file says so.
HOLDER = """\
import os, time
here = os.environ["PUHUI_CAPS"]
names = sorted(os.listdir(here))
card = os.open(os.path.join(here, names[-1]), os.O_RDONLY)
until = time.monotonic() + 0.6
while time.monotonic() < until:
    sum(range(10000))
print("up", os.getpid(), flush=True)
with open("/workspace/attempts", "a") as file:
    file.write("begun ")
while not os.path.exists("/workspace/go"):
    time.sleep(0.1)
os.read(card, 16)
print("went on", os.getpid(), open("/workspace/attempts").read(), flush=True)
"""
# Computes on its card for a moment and lets go of it.
USER = """\
import os, time
here = os.environ["PUHUI_CAPS"]
held = [os.open(os.path.join(here, name), os.O_RDONLY) for name in os.listdir(here)]
until = time.monotonic() + 0.3
while time.monotonic() < until:
    sum(range(10000))
print(os.environ["CUDA_VISIBLE_DEVICES"], len(held))
"""
CODE = {"holder.py": HOLDER.encode(), "user.py": USER.encode()}
WHOLE = "7g.80gb"


@pytest.fixture(scope="module")
def place() -> Iterator[Site]:
    """A centre that keeps no slice warm."""
    with site("H100-80GB-SXM5:2", "--warm-for", "0s") as running:
        yield running


@pytest.fixture
def centre(place: Site) -> Iterator[Centre]:
    with place.centre() as connected:
        yield connected
        for job in list(connected.jobs()):
            ended(connected, job.id)
        assert place.leftovers() == (0, 0)


def submit(centre: Centre, *command: str, kind: job_pb2.JobKind.ValueType = JOB_KIND_BATCH, **fields: Any) -> Story:
    spec = JobSpec(command=command, kind=kind, **fields)
    if not spec.resources.profile:
        spec.resources.profile = WHOLE
    story = Story(centre, centre.submit(spec, CODE).id)
    story.heard("CONTAINER_STARTED")
    return story


def session(centre: Centre, **fields: Any) -> Story:
    return submit(centre, kind=JOB_KIND_SESSION, idle=policy(**fields))


def job_of(story: Story) -> str:
    return story.events[0].job_id


def let_go(centre: Centre, story: Story) -> None:
    """Tells a holder to go on, through a run in its container."""
    assert ran(centre, job_of(story), "touch", "/workspace/go")[0] == 0


def test_a_session_gives_its_share_up_and_gets_another(place: Site, centre: Centre) -> None:
    story = session(centre)
    before = place.container(job_of(story))
    code, output = ran(centre, job_of(story), "python3", "user.py")
    assert (code, output.split()[1]) == (0, b"2")
    told = story.heard("RECLAIMED")
    assert (told["mode"], told["why"]) == ("detach", "IDLE")
    idle = place.container(job_of(story))
    assert (idle.pid, list(idle.slice_uuids)) == (before.pid, [])
    story.heard("WARM_SLICE_DROPPED")
    assert place.leftovers() == (0, 1)
    code, again = ran(centre, job_of(story), "python3", "user.py")
    assert (code, again.split()[1]) == (0, b"2")
    assert again.split()[0].decode() == story.heard("RESUMED")["slice_uuid"]
    assert place.container(job_of(story)).pid == before.pid


def test_a_run_keeps_its_share_until_it_ends_however_late_it_opens_its_card(centre: Centre) -> None:
    story = session(centre)
    code, output = ran(centre, job_of(story), "sh", "-c", "sleep 2; python3 user.py; sleep 2; exec python3 user.py")
    assert (code, [line.split()[1] for line in output.splitlines()]) == (0, [b"2", b"2"])
    story.heard("RUN_ENDED")
    assert "RECLAIMED" not in story.reasons[: story.reasons.index("RUN_ENDED")]
    story.heard("RECLAIMED", after="RUN_ENDED")


def test_what_holds_its_card_is_checkpointed_and_goes_on_elsewhere(place: Site, centre: Centre) -> None:
    story = submit(centre, "python3", "holder.py", idle=policy(reclaim_mode=RECLAIM_MODE_CHECKPOINT))
    first = centre.get(job_of(story)).attempts[0].gpu_index
    assert story.heard("RECLAIMED")["mode"] == "checkpoint"
    pid = place.container(job_of(story)).pid
    story.heard("WARM_SLICE_DROPPED")
    # Its card goes to others; there is room for it on the other one only.
    other = submit(centre, "python3", "holder.py", idle=policy(reclaim_mode=RECLAIM_MODE_NEVER))
    assert centre.get(job_of(other)).attempts[0].gpu_index == first
    assert centre.resume(job_of(story)).state != JOB_STATE_IDLE
    told = story.heard("RESUMED")
    assert (told["restored"], int(told["gpu_index"])) == ("true", 1 - first)
    assert place.container(job_of(story)).pid == pid
    let_go(centre, story)
    job = centre.wait(job_of(story), timeout_s=60)
    lines = b"".join(chunk.data for chunk in centre.logs(job.id)).split(b"\n")
    # The same process, in its first attempt.
    assert lines[0].replace(b"up", b"went on") + b" begun " == lines[1]
    assert job.exit_code == 0


def test_work_that_wakes_by_itself_waits_and_comes_back(place: Site, centre: Centre) -> None:
    slow = policy()
    slow.idle_after.FromSeconds(3)
    story = submit(centre, "python3", "holder.py", idle=slow)
    assert story.heard("RECLAIMED")["mode"] == "checkpoint"
    # Its rest would last for as long as it was idle, but it asks for its card before.
    (place.folder / "node" / "attempts" / "local" / job_of(story) / "1" / "workspace" / "go").touch()
    assert story.heard("RESUMED")["why"] == "WANTED"
    assert centre.wait(job_of(story), timeout_s=60).exit_code == 0
    assert b"went on" in b"".join(chunk.data for chunk in centre.logs(job_of(story)))


def test_a_holder_is_named_where_only_detaching_is_allowed(centre: Centre) -> None:
    story = submit(centre, "python3", "holder.py", idle=policy(reclaim_mode=RECLAIM_MODE_DETACH))
    story.heard("RECLAIM_REFUSED", node_reason="RECLAIM_IMPOSSIBLE")
    assert any(event.reason == "RECLAIM_REFUSED" and "python3" in event.message for event in story.events)
    with pytest.raises(Refusal) as suspending:
        centre.suspend(job_of(story), RECLAIM_MODE_DETACH)
    assert suspending.value.reason == "RECLAIM_IMPOSSIBLE"
    assert centre.get(job_of(story)).state == JOB_STATE_RUNNING
    # A person may allow more.
    assert centre.suspend(job_of(story), RECLAIM_MODE_CHECKPOINT).state == JOB_STATE_IDLE


def test_never_is_never(centre: Centre) -> None:
    story = submit(centre, "python3", "holder.py", idle=policy(reclaim_mode=RECLAIM_MODE_NEVER))
    while not centre.get(job_of(story)).idleness.idle:
        threading.Event().wait(0.05)  # nothing tells of it: nothing is done about it
    capacity = centre.capacity().gpus[centre.get(job_of(story)).attempts[0].gpu_index]
    assert capacity.memory_slices_busy == 8
    assert "RECLAIMING" not in story.reasons


def test_a_command_that_cannot_be_checkpointed_is_ended_only_for_who_waits(place: Site, centre: Centre) -> None:
    story = submit(centre, "python3", "holder.py", idle=policy(reclaim_mode=RECLAIM_MODE_STOP))
    blocker = submit(centre, "python3", "holder.py", idle=policy(reclaim_mode=RECLAIM_MODE_NEVER))
    # What moves cards cannot write down what it does, and so does nothing.
    (place.folder / "node" / "checkpoints").rename(place.folder / "node" / "gone")
    try:
        story.heard("RECLAIM_REFUSED", node_reason="RECLAIM_IMPOSSIBLE")
        gpu = centre.get(job_of(story)).attempts[0].gpu_index
        assert centre.capacity().gpus[gpu].memory_slices_idle == 8
        waiting = submit(centre, "python3", "user.py")
    finally:
        (place.folder / "node" / "gone").rename(place.folder / "node" / "checkpoints")
    told = story.heard("RECLAIMED")
    assert (told["why"], told["mode"]) == ("NEEDED", "stop")
    assert centre.wait(job_of(waiting), timeout_s=60).exit_code == 0
    centre.resume(job_of(story))
    story.heard("WORKSPACE_CARRIED")
    assert centre.get(job_of(story)).attempts[-1].number == 2
    let_go(centre, story)
    job = centre.wait(job_of(story), timeout_s=60)
    assert b"begun begun" in b"".join(chunk.data for chunk in centre.logs(job.id))
    ended(centre, job_of(blocker))


def test_a_run_that_arrives_in_the_middle_of_a_reclaim(centre: Centre) -> None:
    story = session(centre, on_reclaim=["sh", "-c", "echo reclaim >> /workspace/told; sleep 0.5"], warn_signal=True)
    assert ran(centre, job_of(story), "python3", "user.py")[0] == 0
    story.heard("RECLAIMING")
    code, output = ran(centre, job_of(story), "sh", "-c", "python3 user.py; cat /workspace/told")
    assert code == 0, output
    assert output.split()[1:] == [b"2", b"reclaim"]


@pytest.mark.parametrize("which", ["controlplane", "nodedaemon"])
@pytest.mark.parametrize(
    "reason", ["RECLAIMING", "RECLAIMED", "RESUMING", "SHARE_RESERVED", "RESUMED", "RUN_ASKED", "RUN_STARTED"]
)
def test_killed_right_after(place: Site, centre: Centre, reason: str, which: str) -> None:
    story = session(centre)
    before = place.container(job_of(story)).pid
    assert ran(centre, job_of(story), "python3", "user.py")[0] == 0
    outcome: list[tuple[int | None, bytes]] = []
    giving = threading.Thread(target=lambda: outcome.append(ran(centre, job_of(story), "python3", "user.py")))
    if reason in ("RECLAIMING", "RECLAIMED"):
        story.heard(reason)
        place.kill(which)
        giving.start()
    else:
        story.heard("WARM_SLICE_DROPPED")
        giving.start()
        story.heard(reason, 2 if reason.startswith("RUN_") else 1)
        place.kill(which)
    place.start(which)
    giving.join(60)
    assert [code for code, _ in outcome] == [0], outcome
    assert outcome[0][1].split()[1] == b"2"
    after = place.container(job_of(story))
    assert after.pid == before
    story.heard("RUN_ENDED", 2)
    story.heard("RECLAIMED", after="RUN_ENDED")
    assert [run.exit_code for run in centre.runs(job_of(story))] == [0, 0]


def test_a_session_moves_with_its_workspace_when_its_node_has_no_room() -> None:
    with site("H100-80GB-SXM5:1", "--warm-for", "0s") as place, place.centre() as centre:
        story = session(centre)
        note = "mkdir -p ../notes && echo kept > ../notes/day-1 && chmod 750 ../notes && ln -s day-1 ../notes/latest"
        assert ran(centre, job_of(story), "sh", "-c", f"{note}; python3 user.py")[0] == 0
        story.heard("WARM_SLICE_DROPPED")
        blocker = submit(centre, "python3", "holder.py", idle=policy(reclaim_mode=RECLAIM_MODE_NEVER))
        outcome: list[tuple[int | None, bytes]] = []
        words = ("sh", "-c", "cat ../notes/latest; stat -c %a ../notes; python3 user.py")
        giving = threading.Thread(target=lambda: outcome.append(ran(centre, job_of(story), *words)))
        giving.start()
        # Nowhere to go yet: it waits, and says so.
        story.heard("WAITING_FOR_SLICE")
        place.start("second")
        giving.join(60)
        assert [code for code, _ in outcome] == [0], outcome
        assert outcome[0][1].split()[:2] == [b"kept", b"750"]
        reasons = story.reasons
        assert reasons.index("SESSION_MOVES") < reasons.index("WORKSPACE_CARRIED")
        assert len(place.container(job_of(story), "second").slice_uuids) == 1
        assert place.leftovers() == (1, 1), "what it left behind is not only the blocker's"
        for one in (story, blocker):
            ended(centre, job_of(one))
        assert place.leftovers() == place.leftovers("second") == (0, 0)
