"""Two centres of one machine, whose node daemons share one Podman user, do not disturb each other."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from nodedaemon.podman_account import PodmanAccount
from puhui.cli.local_state import Record, StateFolder
from puhui.client import Centre
from puhui.local import local_centres
from puhui.rpc.channel import open_blocking_channel
from puhui.v1.job_pb2 import JOB_STATE_RUNNING, JobSpec, PeerPolicy
from puhui.v1.node_pb2 import Container
from puhui.v1.node_service_pb2 import ListContainersRequest, ListSlicesRequest
from puhui.v1.node_service_pb2_grpc import NodeServiceStub
from tests.daemons import open_folder
from tests.e2e.site import Story, ran

pytestmark = [pytest.mark.podman, pytest.mark.timeout(180)]

CARD = "A30-24GB:1"
CODE = {
    "wait.py": b"""\
import os, sys, time
print("on", flush=True)
while not os.path.exists("/workspace/go"):
    time.sleep(0.1)
open(os.environ["PUHUI_OUTPUTS"] + "/result", "w").write(sys.argv[1])
sys.exit(5)
"""
}


@dataclass
class Place:
    """One of the centres, and its node."""

    name: str
    centre: Centre
    node: NodeServiceStub

    def containers(self) -> list[Container]:
        """Returns every container that the node knows of, when it serves."""
        request = ListContainersRequest()
        return list(self.node.ListContainers(request, wait_for_ready=True, timeout=60).containers)

    def slice_count(self) -> int:
        request = ListSlicesRequest(include_foreign=True)
        return len(self.node.ListSlices(request, wait_for_ready=True, timeout=60).slices)


@contextlib.contextmanager
def places(addresses: Mapping[str, str]) -> Iterator[list[Place]]:
    with contextlib.ExitStack() as stack:
        found = []
        for name, address in addresses.items():
            centre = stack.enter_context(Centre(address))
            [node] = centre.nodes()
            channel = open_blocking_channel(node.address)
            stack.callback(channel.close)
            found.append(Place(name, centre, NodeServiceStub(channel)))
        yield found


def daemons(folder: Path) -> Record:
    record = StateFolder(folder).read()
    assert record is not None
    return record


def podman_knows() -> set[str]:
    return set(PodmanAccount.find("puhui").run("podman", "ps", "--all", "--quiet", "--no-trunc").stdout.split())


def test_each_daemon_sees_to_its_own_containers_whoever_dies(tmp_path: Path) -> None:
    with (
        open_folder() as folder,
        local_centres([CARD, CARD], "podman", folder) as addresses,
        places(addresses) as [first, second],
    ):
        assert list(addresses) == ["local", "local-2"]
        jobs = {}
        for place in (first, second):
            spec = JobSpec(command=["python3", "wait.py", place.name], peers=PeerPolicy(here_only=True))
            jobs[place.name] = place.centre.submit(spec, CODE)
            Story(place.centre, jobs[place.name].id).heard("CONTAINER_STARTED")
        before = {place.name: place.containers() for place in (first, second)}
        for place in (first, second):
            assert [one.owner.job_id for one in before[place.name]] == [jobs[place.name].id]
        ids = {one.id for found in before.values() for one in found}
        assert len(ids) == 2
        assert ids <= podman_knows()

        every = list(daemons(folder).daemons)
        assert len(every) == 4
        for dying in (["local-2/nodedaemon"], ["nodedaemon"], every):
            old = daemons(folder).daemons
            for name in dying:
                os.kill(old[name].pid, signal.SIGKILL)
            for place in (first, second):
                # The same processes in the same containers, and no other's.
                after = place.containers()
                assert [(one.id, one.pid) for one in after] == [(one.id, one.pid) for one in before[place.name]]
                assert place.centre.get(jobs[place.name].id).state == JOB_STATE_RUNNING
            new = daemons(folder).daemons
            assert {name for name in every if new[name] != old[name]} == set(dying)

        for place in (first, second):
            job = jobs[place.name]
            code, _ = ran(place.centre, job.id, "touch", "/workspace/go")
            assert code == 0
            ended = place.centre.wait(job.id, timeout_s=60)
            assert (ended.exit_code, len(ended.attempts)) == (5, 1)
            place.centre.pull(job.id, tmp_path / place.name)
            assert (tmp_path / place.name / "result").read_text() == place.name
            assert (place.slice_count(), place.containers()) == (0, [])
        assert not ids & podman_knows()
