"""Whether a container uses its cards (step S6): samples in, state out. Pure.

A card is in use when GPM (Hopper and later) tells that its multiprocessors or its engine worked. Before Hopper the
driver tells only who holds a card and how much of its memory is in use: a process that sleeps with the card open looks
the same as one that computes, and so counts as use; on such a GPU only a container whose processes have let go of the
card becomes idle. What cannot be read counts as use, and so does what was not looked at.

Times named `at_s` are of the monotonic clock: a jump of the wall clock makes nothing idle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import grpc

from nodedaemon import memory_peak
from nodedaemon.memory_peak import MemoryPeak
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import seconds, timestamp
from puhui.v1.idle_pb2 import Idleness, IdleWatch
from puhui.v1.node_service_pb2 import UtilizationSample, UtilizationSource

__all__ = [
    "FEWEST_SAMPLES",
    "Glance",
    "IdlePolicy",
    "IdleState",
    "begin",
    "describe",
    "hold",
    "pause",
    "policy_of",
    "release",
    "sampling_interval_s",
    "step",
]

FEWEST_SAMPLES = 3
"""As many samples without use make a container idle, at the least."""
_SAMPLES_WANTED = 5
_SHORTEST_INTERVAL_S = 0.1
_LONGEST_INTERVAL_S = 5.0
_GAP_INTERVALS = 3
_ROUNDING_S = 1e-9


@dataclass(frozen=True)
class IdlePolicy:
    """What a container is watched for."""

    idle_after_s: float
    """Unused for this long is idle."""
    idle_below_percent: float
    """Utilization below this is unused."""
    start_grace_s: float
    """A container that has not used a card yet counts as busy for this long after its start."""

    @property
    def interval_s(self) -> float:
        """Time between samples, in seconds."""
        return sampling_interval_s(self.idle_after_s)

    @property
    def gap_s(self) -> float:
        """Longer than this without a sample, and what happened meanwhile is unknown; in seconds."""
        return _GAP_INTERVALS * self.interval_s


@dataclass(frozen=True)
class Glance:
    """All cards of a container, looked at once: at least one sample of each."""

    at_s: float
    samples: Sequence[UtilizationSample]
    commands: int = 0
    """Commands beside the container's own that run in it."""


@dataclass(frozen=True)
class IdleState:
    """What is known of a container's use of its cards."""

    idle: bool = False
    signal: str = ""
    reading: str = ""
    """What the signal says, for people."""
    used: bool = False
    """Whether it has been seen to use a card since it was made."""
    unused_since_s: float | None = None
    unused_samples: int = 0
    """How many samples in a row were without use, none of them after a gap."""
    seen_s: float | None = None
    """When its cards were looked at last, since they were attached."""
    held_to_s: float | None = None
    """Up to when its seconds are counted; None while it has no card."""
    counting: bool = False
    """Whether what has passed since then counts as use, should nobody look again."""
    busy_seconds: float = 0.0
    held_seconds: float = 0.0
    before: tuple[tuple[str, int | None], ...] = ()
    """Cards that could be read the last time, and the MiB in use on them."""
    memory: MemoryPeak = field(default_factory=MemoryPeak)
    """The most memory that was seen in use since it was made."""


def sampling_interval_s(idle_after_s: float) -> float:
    """Returns the time between samples for a threshold, both in seconds: a fifth of it, from 0.1 s to 5 s."""
    return min(max(idle_after_s / _SAMPLES_WANTED, _SHORTEST_INTERVAL_S), _LONGEST_INTERVAL_S)


def policy_of(watch: IdleWatch) -> IdlePolicy:
    """Returns what a request wants to be watched.

    Raises:
        Refusal: INVALID_ARGUMENT with IDLE_AFTER_TOO_SHORT, or SPEC_INVALID, naming the field.
    """
    policy = IdlePolicy(seconds(watch.idle_after), watch.idle_below_percent, seconds(watch.start_grace))
    if policy.idle_after_s < FEWEST_SAMPLES * policy.interval_s - _ROUNDING_S:
        shortest_s = FEWEST_SAMPLES * _SHORTEST_INTERVAL_S
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "IDLE_AFTER_TOO_SHORT",
            f"idle_after of {policy.idle_after_s:g} s is shorter than {FEWEST_SAMPLES} samples, and a node takes one "
            f"every {policy.interval_s:g} s; choose {shortest_s:g} s or more",
            shortest_ms=f"{shortest_s * 1000:g}",
        )
    field, problem = "", ""
    if not 0 < policy.idle_below_percent <= 100:
        field, problem = "idle_below_percent", "must be above 0 and at most 100"
    elif policy.start_grace_s < 0:
        field, problem = "start_grace", "must not be negative"
    if problem:
        field = f"idle_watch.{field}"
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", f"{field} {problem}", field=field)
    return policy


# What a container has --------------------------------------------------------------------------------------


def hold(state: IdleState, at_s: float) -> IdleState:
    """Returns the state of a container that has cards from now on, or others than before. The clock begins anew.

    What it held and nobody looked at until now, while the daemon was away, counts as held and as busy.
    """
    return replace(_stopped(_counted(state, at_s, busy=state.counting)), held_to_s=at_s, counting=True)


def begin(state: IdleState) -> IdleState:
    """Returns the state of a container in which a command begins now. The clock begins anew."""
    reading = "a command has just begun in it"
    return replace(_restarted(state), signal="command", reading=reading)


def pause(state: IdleState, at_s: float) -> IdleState:
    """Returns the state of a container that keeps its cards and is frozen: it cannot use them, and is not watched."""
    return replace(_stopped(_counted(state, at_s, busy=state.counting)), held_to_s=at_s)


def release(state: IdleState, at_s: float) -> IdleState:
    """Returns the state of a container that has no card any more."""
    return replace(_stopped(_counted(state, at_s, busy=state.counting)), held_to_s=None)


def _stopped(state: IdleState) -> IdleState:
    return replace(
        state,
        idle=False,
        signal="",
        reading="",
        unused_since_s=None,
        unused_samples=0,
        seen_s=None,
        counting=False,
        before=(),
    )


def _counted(state: IdleState, at_s: float, *, busy: bool) -> IdleState:
    """Counts the seconds up to a time."""
    if state.held_to_s is None:
        return state
    passed_s = max(at_s - state.held_to_s, 0.0)
    return replace(
        state,
        held_to_s=max(at_s, state.held_to_s),
        held_seconds=state.held_seconds + passed_s,
        busy_seconds=state.busy_seconds + (passed_s if busy else 0.0),
    )


# What it does with them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Verdict:
    """What a sample says. `sure` is whether it was read at all: what was not counts as busy, yet not as a first use."""

    busy: bool
    sure: bool
    signal: str
    reading: str


def step(policy: IdlePolicy, state: IdleState, glance: Glance, started_s: float) -> IdleState:
    """Returns the state after a look at a container's cards. Where `idle` differs from before, that is to be told.

    One sample with use ends idleness; to become idle takes all of idle_after, at least three samples and no gap.

    Args:
        policy: what the container is watched for.
        state: what was known; the container has cards.
        glance: what was seen now.
        started_s: when the container began.
    """
    verdict = _judge_all(policy, state, glance.samples)
    gap = state.seen_s is not None and glance.at_s - state.seen_s > policy.gap_s
    used = state.used or (verdict.busy and verdict.sure)
    counted = _counted(state, glance.at_s, busy=verdict.busy or gap)
    counted = replace(
        counted,
        used=used,
        memory=memory_peak.seen(state.memory, glance.samples),
        seen_s=glance.at_s,
        counting=verdict.busy,
        signal=verdict.signal,
        reading=verdict.reading,
        before=tuple(
            (one.uuid, one.memory_used_mib if one.HasField("memory_used_mib") else None)
            for one in glance.samples
            if one.source not in _UNREAD
        ),
    )
    if verdict.busy:
        return _restarted(counted)
    if not used and glance.at_s < started_s + policy.start_grace_s:
        left_s = math.ceil(started_s + policy.start_grace_s - glance.at_s)
        reading = f"it has not used its card yet, and has {left_s} s more to begin with"
        return replace(_restarted(counted), signal="start_grace", reading=reading)
    if glance.commands and not any(one.processes for one in glance.samples):
        # To take its card would be to take it from under a command that is about to open it. One that holds it can be
        # checkpointed, and waits.
        ran = "a command runs" if glance.commands == 1 else f"{glance.commands} commands run"
        reading = f"{ran} in it and may still open its card"
        return replace(_restarted(counted), signal="command", reading=reading)
    if state.unused_since_s is None or gap:
        reading = verdict.reading
        if gap and state.seen_s is not None:
            reading += f"; before that it was not looked at for {glance.at_s - state.seen_s:.1f} s"
        return replace(_restarted(counted), unused_since_s=glance.at_s, unused_samples=1, reading=reading)
    samples = state.unused_samples + 1
    idle = samples >= FEWEST_SAMPLES and glance.at_s - state.unused_since_s >= policy.idle_after_s
    return replace(counted, unused_samples=samples, idle=idle)


def _restarted(state: IdleState) -> IdleState:
    return replace(state, idle=False, unused_since_s=None, unused_samples=0)


_SOURCES_OF_RATES = (UtilizationSource.UTILIZATION_SOURCE_GPM, UtilizationSource.UTILIZATION_SOURCE_DRIVER_RATES)
_UNREAD = (UtilizationSource.UTILIZATION_SOURCE_UNAVAILABLE, UtilizationSource.UTILIZATION_SOURCE_UNSPECIFIED)


def _judge_all(policy: IdlePolicy, state: IdleState, samples: Sequence[UtilizationSample]) -> _Verdict:
    """Returns the verdict that weighs most: use that was read, then what could not be read, then no use."""
    if not samples:
        return _unknown("nothing was read")
    before = dict(state.before)
    verdicts = [_judge(policy, one, before) for one in samples]
    return max(verdicts, key=lambda one: (one.busy and one.sure, one.busy))


def _judge(policy: IdlePolicy, sample: UtilizationSample, before: dict[str, int | None]) -> _Verdict:
    if sample.source in _SOURCES_OF_RATES:
        return _judge_rates(policy, sample)
    if sample.source in _UNREAD:
        return _unknown(sample.notice or "its use cannot be read")
    # The first sample of a card is always one of presence: whether there is more to come is told by the second.
    if sample.uuid not in before:
        return _unknown("its card has been looked at only once")
    if sample.processes:
        holders = "1 process holds" if sample.processes == 1 else f"{sample.processes} processes hold"
        return _Verdict(True, True, "processes", f"{holders} its card, and this GPU does not tell whether they compute")
    memory, earlier = sample.memory_used_mib, before[sample.uuid]
    if sample.HasField("memory_used_mib") and earlier is not None and memory != earlier:
        return _Verdict(True, True, "memory", f"memory in use went from {earlier} to {memory} MiB")
    return _Verdict(False, True, "processes", "no process holds it")


def _judge_rates(policy: IdlePolicy, sample: UtilizationSample) -> _Verdict:
    """Judges by what is told of the two: while the engine does nothing no multiprocessor does, and the reverse."""
    told = [
        (name, percent)
        for name, field, percent in (
            ("multiprocessors", "multiprocessor_percent", sample.multiprocessor_percent),
            ("engine", "engine_percent", sample.engine_percent),
        )
        if sample.HasField(field)  # type: ignore[arg-type]
    ]
    threshold = policy.idle_below_percent
    if not told or any(not math.isfinite(percent) for _, percent in told):
        return _unknown(sample.notice or "its use cannot be read")
    for name, percent in told:
        if percent >= threshold:
            return _Verdict(True, True, name, f"{name} {percent:.3g} % ({threshold:g} % or more is use)")
    name, percent = told[0]
    return _Verdict(False, True, name, f"{name} {percent:.3g} % (below {threshold:g} %)")


def _unknown(why: str) -> _Verdict:
    return _Verdict(True, False, "unavailable", why)


# What is told ----------------------------------------------------------------------------------------------


def describe(state: IdleState, at_s: float, time_s: float) -> Idleness:
    """Returns a state for the wire.

    Args:
        state: the state.
        at_s: now, on the monotonic clock.
        time_s: now, in seconds since the epoch: only for showing.
    """
    held_s = max(at_s - state.held_to_s, 0.0) if state.held_to_s is not None else 0.0
    idleness = Idleness(
        idle=state.idle,
        signal=state.signal,
        # What was used when it was looked at last is so until it is looked at again.
        busy_seconds=state.busy_seconds + (held_s if state.counting else 0.0),
        held_seconds=state.held_seconds + held_s,
        memory_samples=state.memory.samples,
    )
    if state.memory.samples:
        idleness.peak_memory_mib = state.memory.mib
    if state.unused_since_s is not None:
        idleness.unused_since.CopyFrom(timestamp(time_s - (at_s - state.unused_since_s)))
    idleness.message = _sentence(state, idleness)
    return idleness


def _sentence(state: IdleState, idleness: Idleness) -> str:
    if state.held_to_s is None:
        return "has no card"
    if not state.signal:
        return "has a card that has not been looked at yet" if state.counting else "is frozen, and not watched"
    if state.unused_since_s is not None:
        since = idleness.unused_since.ToDatetime().strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"has not used its card since {since}: {state.reading}"
    if state.signal in ("unavailable", "start_grace", "command"):
        return f"counts as busy: {state.reading}"
    return f"uses its card: {state.reading}"
