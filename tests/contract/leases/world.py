"""An origin, centres that execute for it, their nodes, and a network that keeps no promise. Time is a number here.

The protocol itself is not here: every decision about a lease is taken by `controlplane.forwards`, `controlplane.guests`
and `controlplane.container_lease`, or, to see that the checker sees, by a broken copy of one of them (`Protocol`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from controlplane import container_lease, forwards, guests
from controlplane.forwards import ForwardRecord, ForwardStage
from controlplane.guests import GuestRecord, GuestStage
from puhui.rpc.errors import Refusal
from puhui.rpc.lease_clock import LeaseClock

LEASE_S = 300.0
MARGIN_S = 8.0
KILL_S = 4.0
"""A node kills what its lease no longer covers within this time; less than what `Hosting` allows it."""
NODE_ENDS_S = 5.0
MOST_SENDS = 4
MOST_MESSAGES = 40

Key = tuple[str, int]
"""(job id, attempt)."""


class RanTwiceError(AssertionError):
    """The protocol has broken its promise."""


@dataclass(frozen=True)
class Protocol:
    """What decides about leases."""

    read_clock: Callable[[ForwardRecord, float, float], ForwardRecord] = forwards.read_clock
    rebooted: Callable[[ForwardRecord, str, float], ForwardRecord] = forwards.rebooted
    lease_to_ask: Callable[[ForwardRecord, float, float], float] = forwards.lease_to_ask
    is_surely_over: Callable[[ForwardRecord, float, float], bool] = forwards.is_surely_over
    bind: Callable[[GuestRecord | None, GuestRecord, float, float], GuestRecord] = guests.bind
    renew: Callable[..., GuestRecord] = guests.renew
    cancel: Callable[[GuestRecord | None, GuestRecord], GuestRecord] = guests.cancel
    expire: Callable[[GuestRecord, float, str], GuestRecord] = guests.expire
    node_lease_end: Callable[[float, float, float], float] = container_lease.node_lease_end


class Host:
    """The clocks of a host: they run too fast or too slow, and its wall clock is set by whoever likes to.

    Args:
        time: the true time.
        rate: seconds that its clocks count in a true second.
        offset_s: by how much its wall clock is wrong at first.
    """

    def __init__(self, time: Callable[[], float], rate: float, offset_s: float) -> None:
        self._time = time
        self._rate = rate
        self.offset_s = offset_s
        self._boots = 1
        self._up_since = time() - 1000.0

    def boot_id(self) -> str:
        return f"boot-{self._boots}"

    def uptime_s(self) -> float:
        return (self._time() - self._up_since) * self._rate

    def wall_s(self) -> float:
        return self._time() * self._rate + self.offset_s

    def true_time(self, uptime_s: float) -> float:
        """Returns the true time at which it is up for so long."""
        return self._up_since + uptime_s / self._rate

    def reboot(self) -> None:
        self._boots += 1
        self._up_since = self._time()


@dataclass
class Container:
    """What a node runs."""

    key: Key
    finishes: float
    """By itself, in true time."""
    lease_end: float
    """On its node's clock; infinite for a job of the origin itself."""
    kill_s: float
    """So long after the end of its lease its node has killed it."""


class Node:
    """A node: it runs what it is told to for as long as the lease lasts, whether its control plane lives or not."""

    def __init__(self, world: World, host: Host) -> None:
        self._world = world
        self.host = host
        self.containers: dict[Key, Container] = {}
        self.finished: set[Key] = set()
        self.dead: set[Key] = set()
        """Killed, or gone with a reboot."""

    def start(self, key: Key, lease_end: float, work_s: float) -> None:
        if key in self.containers or key in self.finished or key in self.dead:
            return  # a container is made once
        if self.host.uptime_s() >= lease_end:
            self.dead.add(key)
            return
        self._world.witness.begins(key)
        self.containers[key] = Container(key, self._world.time + work_s, lease_end, self._world.kill_s)

    def stop(self, key: Key) -> None:
        """Ends a container, and lets none of this name begin later."""
        if self.containers.pop(key, None) is not None:
            self._world.witness.ends(key, finished=False)
        if key not in self.finished:
            self.dead.add(key)

    def next_end(self) -> tuple[float, Key] | None:
        """(true time, which): the first that ends, unless somebody interferes."""
        ends = [(min(one.finishes, self._killed_at(one)), one.key) for one in self.containers.values()]
        return min(ends, default=None)

    def end(self, key: Key) -> None:
        one = self.containers.pop(key)
        finished = one.finishes <= self._killed_at(one)
        self._world.witness.ends(key, finished=finished)
        (self.finished if finished else self.dead).add(key)

    def reboot(self) -> None:
        for key in list(self.containers):
            self.stop(key)
        self.host.reboot()

    def _killed_at(self, one: Container) -> float:
        return self.host.true_time(one.lease_end) + one.kill_s


@dataclass
class Witness:
    """Sees what really runs."""

    running: dict[str, tuple[Key, float]] = field(default_factory=dict)
    begun: set[Key] = field(default_factory=set)
    finished: set[Key] = field(default_factory=set)
    time: Callable[[], float] = lambda: 0.0

    def begins(self, key: Key) -> None:
        if key[0] in self.running:
            other, since = self.running[key[0]]
            raise RanTwiceError(f"{key} begins at {self.time():.3f}, and {other} runs since {since:.3f}")
        if key in self.begun:
            raise RanTwiceError(f"{key} begins for the second time")
        self.running[key[0]] = (key, self.time())
        self.begun.add(key)

    def ends(self, key: Key, *, finished: bool) -> None:
        del self.running[key[0]]
        if finished:
            self.finished.add(key)


@dataclass(frozen=True)
class Message:
    """A request, or, with an answer in it, what came of one."""

    what: str
    peer: str
    origin: Key
    token: int
    life: int
    """Of the origin: its calls die with it."""
    first: bool = False
    """No other request to bind this attempt was ever sent."""
    until: float = 0.0
    answer: str = ""
    """"" in a request."""
    peer_time: float = 0.0


class Executor:
    """A centre that executes for the origin."""

    def __init__(self, world: World, name: str, folder: Path, host: Host, node: Node) -> None:
        self._world = world
        self.name = name
        self._folder = folder
        self.host = host
        self.node = node
        self.reaches_node = True
        self._stored: dict[Key, str] = {}
        self.clock: LeaseClock | None = None
        self.start()

    @property
    def is_up(self) -> bool:
        return self.clock is not None

    def start(self) -> None:
        self.clock = LeaseClock(self._folder / f"clock-{self.name}", self.host)

    def kill(self) -> None:
        self.clock = None

    def guests(self) -> list[GuestRecord]:
        return [self._load(key) for key in self._stored]

    def _load(self, key: Key) -> GuestRecord:
        kept = json.loads(self._stored[key])
        return GuestRecord(**{**kept, "stage": GuestStage(kept["stage"])})

    def _known(self, key: Key) -> GuestRecord | None:
        return self._load(key) if key in self._stored else None

    def _store(self, guest: GuestRecord) -> None:
        self._stored[guest.key[1:]] = json.dumps(asdict(guest))

    def answer(self, request: Message) -> Message | None:
        """Serves a request; None when nobody listens."""
        if self.clock is None:
            return None
        try:
            said = self._serve(request, self.clock)
        except Refusal as refusal:
            said = refusal.reason
        return replace(request, answer=said, peer_time=self.clock.now())

    def _serve(self, request: Message, clock: LeaseClock) -> str:
        protocol, key = self._world.protocol, request.origin
        known, at = self._known(key), clock.now()
        asked = GuestRecord("origin", *key, request.token, boot=clock.boot)
        if request.what == "forward":
            if known is None and self._world.full:
                return "FULL"
            wanted = replace(asked, job_id=f"{self.name}-{key[0]}", lease_end=request.until)
            self._store(protocol.bind(known, wanted, at, 10 * LEASE_S))
            return "bound"
        if request.what == "renew":
            self._store(protocol.renew(known, request.token, request.until, at, 10 * LEASE_S, boot=clock.boot))
            return "renewed"
        if request.what == "cancel":
            guest = protocol.cancel(known, asked)
            if guest.job_id or known is not None or protocol.cancel is guests.cancel:
                self._store(guest)
            if not guest.job_id:
                return "never"
            self.look()
            return self._ending(guest)
        # "watch" and "fetch"
        if known is None or not known.job_id:
            return "GUEST_NOT_FOUND"
        guests.require_command(known, request.token)
        return self._ending(known)

    def _ending(self, guest: GuestRecord) -> str:
        """How it ended: "finished", "ended"; "lives" while it has not, or that is not certain."""
        key = guest.key[1:]
        if key in self.node.finished:
            return "finished" if self.reaches_node else "lives"
        known = self._load(key)
        if known.stage is GuestStage.LIVE and key not in self.node.dead:
            return "lives"
        # What its node has not confirmed is over once the lease is.
        gone = self.reaches_node and key not in self.node.containers and key in self.node.dead
        assert self.clock is not None
        at, boot = self.clock.now(), self.clock.boot
        late = known.boot == boot and at > known.lease_end + NODE_ENDS_S
        return "ended" if gone or late else "lives"

    def look(self) -> None:
        """Does what is due: ends what has no lease, starts what waits, tells the node of longer leases."""
        if self.clock is None:
            return
        protocol = self._world.protocol
        for guest in self.guests():
            key = guest.key[1:]
            if not guest.job_id or key in self.node.finished:
                continue
            after = protocol.expire(guest, self.clock.now(), self.clock.boot)
            self._store(after)
            if not self.reaches_node:
                continue
            if after.stage is not GuestStage.LIVE:
                self.node.stop(key)
                continue
            lease_end = protocol.node_lease_end(self.node.host.uptime_s(), after.lease_end, self.clock.now())
            if key in self.node.containers:
                container = self.node.containers[key]
                container.lease_end = max(container.lease_end, lease_end)
            elif self._world.has_room:
                self.node.start(key, lease_end, self._world.work_s)


class Origin:
    """The centre at which the jobs were submitted. It does what `PeerDriver` does."""

    def __init__(self, world: World, folder: Path, host: Host, node: Node) -> None:
        self._world = world
        self._folder = folder
        self.host = host
        self.node = node
        self.life = 0
        self._token = 0
        self._stored: dict[Key, str] = {}
        self.jobs: dict[str, str] = {}
        """"queued", "away", "here", "done"."""
        self.attempts: dict[str, int] = {}
        self.cancelled: set[str] = set()
        self.collected: set[Key] = set()
        self._tries: dict[Key, int] = {}
        self._adopted: set[Key] = set()
        self._renew_at: dict[Key, float] = {}
        self.clock: LeaseClock | None = None
        self.start()

    def submit(self, job: str) -> None:
        self.jobs[job], self.attempts[job] = "queued", 0

    def start(self) -> None:
        self.life += 1
        self.clock = LeaseClock(self._folder / "clock-origin", self.host)
        self._tries, self._renew_at = {}, {}
        self._adopted = set(self._stored)
        for forward in self.forwards():
            self._token += 1
            after = self._world.protocol.rebooted(forward, self.clock.boot, self.clock.now())
            self._store(replace(after, token=self._token))

    def kill(self) -> None:
        self.clock = None

    def forwards(self) -> list[ForwardRecord]:
        every = [self._load(key) for key in self._stored]
        return [one for one in every if one.stage is not ForwardStage.SETTLED]

    def _load(self, key: Key) -> ForwardRecord:
        kept = json.loads(self._stored[key])
        return ForwardRecord(**{**kept, "stage": ForwardStage(kept["stage"])})

    def _store(self, forward: ForwardRecord) -> None:
        self._stored[forward.key] = json.dumps(asdict(forward))

    def place_here(self, job: str) -> None:
        if self.clock is not None and self.jobs[job] == "queued":
            self.attempts[job] += 1
            self.jobs[job] = "here"
            self.node.start((job, self.attempts[job]), float("inf"), self._world.work_s)

    def place_at(self, job: str, peer: str, offered: float, read_at: float) -> None:
        """Sends a job to a peer whose offer told `offered` as its lease clock, and arrived here at `read_at`."""
        if self.clock is None or self.jobs[job] != "queued":
            return
        self.attempts[job] += 1
        self._token += 1
        self.jobs[job] = "away"
        forward = ForwardRecord(
            job,
            self.attempts[job],
            peer,
            self._token,
            peer_time=offered,
            read_at=read_at,
            boot=self.clock.boot,
        )
        asked = self._world.protocol.lease_to_ask(forward, self.clock.now(), LEASE_S)
        self._store(replace(forward, lease_end=asked))

    def cancel(self, job: str) -> None:
        self.cancelled.add(job)
        if self.jobs[job] == "queued":
            self.jobs[job] = "done"

    def step(self) -> None:
        """Every forward does its next step; what is stored is stored before anything is sent."""
        if self.clock is None:
            return
        for job, state in self.jobs.items():
            key = (job, self.attempts[job])
            if state == "here" and (key in self.node.finished or key in self.node.dead):
                self.jobs[job] = "done" if key in self.node.finished else "queued"
        for forward in self.forwards():
            self._step(forward, self.clock)

    def _step(self, forward: ForwardRecord, clock: LeaseClock) -> None:
        protocol, key, at = self._world.protocol, forward.key, clock.now()
        over = protocol.is_surely_over(forward, at, MARGIN_S)
        tries = self._tries.get(key, 0)
        match forward.stage:
            case ForwardStage.SENDING | ForwardStage.BOUND if forward.job_id in self.cancelled:
                self._store(replace(forward, stage=ForwardStage.ENDING))
            case ForwardStage.SENDING | ForwardStage.BOUND | ForwardStage.ENDING if over:
                self._lose(forward)
            case ForwardStage.SENDING if tries >= MOST_SENDS:
                self._store(replace(forward, stage=ForwardStage.ENDING))
            case ForwardStage.SENDING:
                self._tries[key] = tries + 1
                first = not tries and key not in self._adopted
                self._send("forward", forward, until=forward.lease_end, first=first)
            case ForwardStage.BOUND:
                self._send("watch", forward)
                if at >= self._renew_at.setdefault(key, at + LEASE_S / 3):
                    self._renew_at[key] = at + LEASE_S / 3
                    forward = replace(forward, lease_end=protocol.lease_to_ask(forward, at, LEASE_S))
                    self._store(forward)
                    self._send("renew", forward, until=forward.lease_end)
            case ForwardStage.ENDING:
                self._send("cancel", forward)
            case ForwardStage.ENDED:
                self._send("fetch", forward)
            case ForwardStage.LOST:
                self._send("watch", forward)

    def _send(self, what: str, forward: ForwardRecord, *, until: float = 0.0, first: bool = False) -> None:
        self._world.send(Message(what, forward.peer, forward.key, forward.token, self.life, first, until))

    def hear(self, told: Message) -> None:
        """Takes an answer."""
        if self.clock is None or told.life != self.life:
            return  # the call has ended with its caller
        forward = self._world.protocol.read_clock(self._load(told.origin), told.peer_time, self.clock.now())
        self._store(forward)
        match told.what, forward.stage:
            case "forward", ForwardStage.SENDING:
                if told.answer == "bound":
                    self._store(replace(forward, stage=ForwardStage.BOUND))
                elif told.first and self._tries.get(told.origin) == 1:
                    self._bring_back(forward)
                else:
                    self._store(replace(forward, stage=ForwardStage.ENDING))
            case ("watch", ForwardStage.BOUND) | ("cancel", ForwardStage.ENDING):
                if told.answer == "finished":
                    self._store(replace(forward, stage=ForwardStage.ENDED))
                elif told.answer in ("ended", "never"):
                    self._bring_back(forward)
                elif told.answer == "GUEST_NOT_FOUND":
                    self._store(replace(forward, stage=ForwardStage.ENDING))
            case "fetch", ForwardStage.ENDED if told.answer == "finished":
                self.collected.add(told.origin)
                self._store(replace(forward, stage=ForwardStage.SETTLED))
                self.jobs[told.origin[0]] = "done"
            case "watch", ForwardStage.LOST if told.answer != "lives":
                if told.answer == "finished":
                    self.collected.add(told.origin)
                self._store(replace(forward, stage=ForwardStage.SETTLED))

    def _bring_back(self, forward: ForwardRecord) -> None:
        self._store(replace(forward, stage=ForwardStage.SETTLED))
        self._again(forward.job_id)

    def _lose(self, forward: ForwardRecord) -> None:
        self._store(replace(forward, stage=ForwardStage.LOST))
        self._again(forward.job_id)

    def _again(self, job: str) -> None:
        self.jobs[job] = "done" if job in self.cancelled else "queued"


class World:
    """Everything there is.

    Args:
        folder: an empty folder, for the files of the lease clocks.
        protocol: what decides.
        rates: of the clocks: of the origin, then of every executing centre and its node.
        offsets_s: of the wall clocks, likewise.
        apart: the nodes of the executing centres are hosts of their own.
        kill_s: how long nodes take to kill.
    """

    def __init__(
        self,
        folder: Path,
        protocol: Protocol,
        rates: list[tuple[float, float]],
        offsets_s: list[float],
        *,
        apart: bool,
        kill_s: float,
    ) -> None:
        self.time = 1_000_000.0
        self.protocol = protocol
        self.kill_s = kill_s
        self.work_s = 20.0
        self.full = False
        self.has_room = True
        self.witness = Witness(time=lambda: self.time)
        self.network: list[Message] = []
        host = Host(lambda: self.time, rates[0][0], offsets_s[0])
        self.origin = Origin(self, folder, host, Node(self, host))
        self.executors: dict[str, Executor] = {}
        for name, (rate, node_rate), offset_s in zip("bcdef", rates[1:], offsets_s[1:], strict=False):
            host = Host(lambda: self.time, rate, offset_s)
            node = Node(self, Host(lambda: self.time, node_rate, offset_s) if apart else host)
            self.executors[name] = Executor(self, name, folder, host, node)
        self.apart = apart

    def nodes(self) -> Iterator[Node]:
        yield self.origin.node
        for one in self.executors.values():
            yield one.node

    def passes(self, seconds: float) -> None:
        """Lets time pass; whatever ends meanwhile ends when it does."""
        until = self.time + seconds
        while True:
            ends = [(*end, node) for node in self.nodes() if (end := node.next_end()) is not None]
            at, key, node = min(ends, key=lambda end: end[0], default=(until, ("", 0), self.origin.node))
            if at >= until:
                break
            self.time = max(self.time, at)
            node.end(key)
        self.time = until

    def send(self, message: Message) -> None:
        self.network.append(message)
        del self.network[:-MOST_MESSAGES]  # the oldest are lost

    def deliver(self, message: Message) -> None:
        """Lets a message arrive."""
        if message.answer:
            self.origin.hear(message)
        else:
            answer = self.executors[message.peer].answer(message)
            if answer is not None:
                self.send(answer)

    def flow(self, passes: Callable[[Message], bool] = lambda message: True) -> None:
        """Everybody does what is due, and the network delivers, in order, what it lets through."""
        self.origin.step()
        for executor in self.executors.values():
            executor.look()
        while (message := next(filter(passes, self.network), None)) is not None:
            self.network.remove(message)
            self.deliver(message)
        for executor in self.executors.values():
            executor.look()
