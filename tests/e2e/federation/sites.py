"""Two centres on hosts of their own, and jobs that leave a witness of when they ran."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from puhui.client import Centre
from puhui.client.centre import FINAL_STATES
from puhui.rpc.channel import open_blocking_channel
from puhui.v1 import job_pb2
from puhui.v1.node_service_pb2 import ListContainersRequest, ListSlicesRequest
from puhui.v1.node_service_pb2_grpc import NodeServiceStub
from tests.daemons import Daemon, daemon, open_folder
from tests.e2e.federation.network import Network
from tests.e2e.site import Story

CARD = "A30-24GB:1"
PORT = 7443
_PATIENCE_S = 60.0
_LOOK_S = 0.05
_BEAT_S = 0.05

CODE = {
    "work.py": b"""\
import os, sys, time
witness, go = sys.argv[1:]
me = "%d-%.6f" % (os.getpid(), time.time())
line = os.open(witness, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
print("begun", flush=True)
while True:
    # The one clock that all hosts of these tests share.
    os.write(line, ("%s %.6f\\n" % (me, time.time())).encode())
    if os.path.exists(go):
        break
    time.sleep(0.05)
with open(os.environ["PUHUI_OUTPUTS"] + "/result", "w") as result:
    result.write("done by " + me)
print("done", flush=True)
sys.exit(5)
"""
}
LOG = b"begun\ndone\n"


@dataclass
class Site:
    """One centre with one node, on one host."""

    name: str
    folder: Path
    network: Network
    stack: contextlib.ExitStack
    lease_s: float
    daemons: dict[str, Daemon] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"unix:{self.folder / 'centre.sock'}"

    def start(self, which: str) -> None:
        """Starts its "controlplane" or its "nodedaemon"."""
        if which == "controlplane":
            here = f"{self.network.address(self.name)}:{PORT}"
            arguments = [
                *("--listen", self.address, "--state", str(self.folder / "centre"), "--centre", self.name),
                *("--federation-listen", here, "--lease", f"{self.lease_s:g}s", "--lease-margin", "4s"),
            ]
        else:
            arguments = [
                *("--listen", self._node_address, "--state", str(self.folder / "node"), "--name", f"node-{self.name}"),
                *("--control-plane", self.address),
                *("--join-token-file", str(self.folder / "centre" / "join-token")),
                *("--emulate", CARD, "--runtime", "process"),
            ]
        log = self.folder / f"{which}.log"
        within = self.network.within(self.name)
        self.daemons[which] = self.stack.enter_context(daemon(which, arguments, log, within=within))

    def set_ahead(self, seconds: float) -> None:
        """Has its lease clocks begin so far ahead, as they do when the wall clock was wrong before its last reboot."""
        kept = {"boot_id": "the one before", "era": "then", "offset": 0.0, "ceiling": time.time() + seconds}
        for path in ("centre/federation/lease-clock", "node/lease_clock.json") if seconds else ():
            file = self.folder / path
            file.parent.mkdir(mode=0o700, parents=True)
            file.write_text(json.dumps(kept))

    def kill(self, which: str) -> None:
        """Kills one as a crash would."""
        self.daemons[which].kill()

    def restart(self, which: str) -> None:
        """Kills one, and starts it again."""
        self.kill(which)
        self.start(which)

    @property
    def _node_address(self) -> str:
        return f"unix:{self.folder / 'node.sock'}"

    @contextlib.contextmanager
    def centre(self) -> Iterator[Centre]:
        with Centre(self.address) as centre:
            yield centre

    def leftovers(self) -> tuple[int, int]:
        """(slices, containers) at its node."""
        channel = open_blocking_channel(self._node_address)
        try:
            node = NodeServiceStub(channel)
            slices = node.ListSlices(ListSlicesRequest(include_foreign=True), wait_for_ready=True, timeout=30).slices
            listed = node.ListContainers(ListContainersRequest(), wait_for_ready=True, timeout=30).containers
        finally:
            channel.close()
        return len(slices), len(listed)

    def guest(self, job_id: str, attempt: int = 1) -> str:
        """Returns the job here that an attempt of a peer's job became, once it has."""
        found: list[str] = []

        def look() -> bool:
            with self.centre() as centre:
                guests = [job for job in centre.jobs() if job.HasField("guest")]
                found.extend(job.id for job in guests if (job.guest.job_id, job.guest.attempt) == (job_id, attempt))
            return bool(found)

        eventually(look, f"attempt {attempt} of {job_id} is not at {self.name}")
        return found[0]


class Work:
    """A job that runs until it is told to go on, and writes down all the while that it runs."""

    def __init__(self, pair: Pair, job_id: str, folder: Path) -> None:
        self.id = job_id
        self._pair = pair
        self._folder = folder
        self._centre = pair.stack.enter_context(pair.a.centre())
        self.story = Story(self._centre, job_id)

    def go(self) -> None:
        """Lets it come to its end, wherever it runs."""
        (self._folder / "go").touch()

    def runs(self) -> list[tuple[float, float]]:
        """Returns from when until when each of its processes was seen alive, in order."""
        path = self._folder / "witness"
        seen: dict[str, list[float]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            me, at = line.split()
            seen.setdefault(me, []).append(float(at))
        runs = sorted((min(times), max(times)) for times in seen.values())
        for before, after in itertools.pairwise(runs):
            assert before[1] < after[0], f"it ran twice at a time: {runs}"
        return runs

    def begun(self, times: int = 1) -> None:
        """Waits until it has begun so many times."""
        eventually(lambda: len(self.runs()) >= times, f"it has not begun {times} times")

    def seen(self, times: int) -> None:
        """Waits until it has been seen alive so many times."""
        path = self._folder / "witness"
        eventually(lambda: len(path.read_text().splitlines()) >= times, f"it has not been seen {times} times")

    def is_still(self) -> bool:
        """Whether no process of it has been seen alive for a while."""
        runs = self.runs()
        return bool(runs) and time.time() - runs[-1][1] > 20 * _BEAT_S

    def finished(self, target: Path, *, attempts: int | None = 1, runs: int = 1) -> job_pb2.Job:
        """Waits until it has ended at its origin, and looks at all that it left there and elsewhere.

        Args:
            target: its artifacts are put there.
            attempts: it must have had so many; None is any number.
            runs: it must have run so often.
        """
        job = self._centre.wait(self.id, timeout_s=_PATIENCE_S)
        self.story.ended()
        assert (job.state, job.exit_code) == (job_pb2.JOB_STATE_FAILED, 5), job
        assert attempts is None or len(job.attempts) == attempts, job.attempts
        assert len(self.runs()) == runs
        assert b"".join(chunk.data for chunk in self._centre.logs(self.id)) == LOG
        self._centre.pull(self.id, target)  # it checks the digest
        assert (target / "result").read_text().startswith("done by ")
        eventually(lambda: self._pair.b.leftovers() == (0, 0), "b keeps a slice or a container")
        return job


@dataclass
class Pair:
    """Two centres that are peers. Everything at a is taken, so that what is submitted there goes to b."""

    network: Network
    a: Site
    b: Site
    folder: Path
    stack: contextlib.ExitStack
    holders: list[str] = field(default_factory=list)
    _numbers: int = 0

    def submit(self) -> Work:
        """Submits a job at a."""
        self._numbers += 1
        folder = self.folder / f"work-{self._numbers}"
        folder.mkdir()
        folder.chmod(0o777)
        command = ["python3", "-u", "work.py", str(folder / "witness"), str(folder / "go")]
        spec = job_pb2.JobSpec(command=command, resources=job_pb2.Resources(profile="4g.24gb"))
        with self.a.centre() as centre:
            job = centre.submit(spec, CODE)
        return Work(self, job.id, folder)

    def fill(self) -> None:
        """Takes all that a has."""
        spec = job_pb2.JobSpec(
            command=["sleep", "3600"],
            resources=job_pb2.Resources(profile="4g.24gb"),
            peers=job_pb2.PeerPolicy(here_only=True),
        )
        with self.a.centre() as centre:
            job = centre.submit(spec, CODE)
            assert any(event.reason == "CONTAINER_STARTED" for event in centre.watch(job.id))
        self.holders.append(job.id)

    def clear(self) -> None:
        """Gives back all that a has."""
        with self.a.centre() as centre:
            for job_id in self.holders:
                centre.cancel(job_id, "the test needs its share")
                assert centre.wait(job_id, timeout_s=_PATIENCE_S).state in FINAL_STATES
        self.holders.clear()

    def in_contact(self) -> None:
        """Waits until each is in contact with the other."""

        def look() -> bool:
            for site in (self.a, self.b):
                with site.centre() as centre:
                    if not all(peer.in_contact for peer in centre.peers().peers):
                        return False
            return True

        eventually(look, "a and b are not in contact")


def eventually(look: Callable[[], bool], otherwise: str) -> None:
    """Waits until something has come true that nobody tells of."""
    deadline = time.monotonic() + _PATIENCE_S
    pause = threading.Event()
    while not look():
        assert time.monotonic() < deadline, otherwise
        pause.wait(_LOOK_S)


@contextlib.contextmanager
def pair(hosts: Network, lease_s: float = 60.0, wrong_s: Mapping[str, float] | None = None) -> Iterator[Pair]:
    """Runs two centres on the two hosts of a network until the block ends.

    Args:
        hosts: "a" and "b".
        lease_s: length of their leases, in seconds.
        wrong_s: by host, how far ahead its wall clock once was, in seconds; its lease clock still is.
    """
    with open_folder() as folder, contextlib.ExitStack() as stack:
        sites = {}
        for name in hosts.hosts:
            home = folder / name
            home.mkdir()
            home.chmod(0o711)
            sites[name] = Site(name, home, hosts, stack, lease_s)
            sites[name].set_ahead((wrong_s or {}).get(name, 0.0))
            sites[name].start("controlplane")
            sites[name].start("nodedaemon")
        made = Pair(hosts, sites["a"], sites["b"], folder, stack)
        with made.b.centre() as b, made.a.centre() as a:
            a.add_peer(b.invite_peer().token)
        made.in_contact()
        made.fill()
        yield made
