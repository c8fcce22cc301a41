"""What the journal holds: slices, containers and commands as they are meant, and what requests were answered."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nodedaemon.driver_facts import Span
from nodedaemon.owner import Owner

__all__ = [
    "Answer",
    "CardRecord",
    "CheckpointRecord",
    "CheckpointStage",
    "ContainerRecord",
    "ContainerStage",
    "ExecRecord",
    "ExecStage",
    "IdleRecord",
    "SliceRecord",
    "SliceStage",
]


class SliceStage(StrEnum):
    """How far the daemon has come with a slice."""

    CREATING = "creating"
    ACTIVE = "active"
    DESTROYING = "destroying"
    ERROR = "error"
    DESTROYED = "destroyed"


class ContainerStage(StrEnum):
    """How far the daemon has come with a container."""

    CREATING = "creating"
    RUNNING = "running"
    SUSPENDED = "suspended"
    EXITED = "exited"
    REMOVED = "removed"

    @property
    def is_alive(self) -> bool:
        """Whether the command has begun and has not ended: it runs, or it is frozen."""
        return self in (ContainerStage.RUNNING, ContainerStage.SUSPENDED)


@dataclass(frozen=True)
class SliceRecord:
    """An intended slice. Ids and UUID are unset while it is being created."""

    id: int
    owner: Owner
    token: int
    gpu_uuid: str
    profile: str
    profile_id: int
    span: Span
    memory_mib: int
    stage: SliceStage
    create_time: float
    boot_id: str
    gi: int | None = None
    ci: int | None = None
    uuid: str = ""
    notice: str = ""


class CheckpointStage(StrEnum):
    """How far the daemon has come with the processes of a container that are taken off their cards."""

    TAKING = "taking"
    TAKEN = "taken"
    RESTORING = "restoring"


@dataclass(frozen=True)
class CardRecord:
    """A slice that processes were taken off."""

    uuid: str
    model: str
    profile: str
    nodes: tuple[str, ...]
    """Names of its cap nodes: the GPU instance's, then the compute instance's."""


@dataclass(frozen=True)
class CheckpointRecord:
    """Processes of a container that are checkpointed, or about to be."""

    stage: CheckpointStage
    init: int
    """Init process of the container."""
    processes: tuple[tuple[int, str], ...]
    """Process ids, and when they began, in clock ticks since the host was started."""
    cards: tuple[CardRecord, ...]


@dataclass(frozen=True)
class ContainerRecord:
    """An intended container. Times are seconds since the epoch."""

    owner: Owner
    token: int
    stage: ContainerStage
    image: str
    bundle_id: str
    slice_uuids: tuple[str, ...]
    stop_grace_s: float
    create_time: float
    max_duration_s: float | None = None
    container_id: str = ""
    pid: int = 0
    start_time: float | None = None
    end_time: float | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    timed_out: bool = False
    digest: str = ""
    """Of the request, to tell a repetition from another one; empty for what an older daemon made."""
    workspace_of: int = 0
    """Attempt of the same job whose workspace it began with: its own for an uploaded one, 0 for an empty one."""
    checkpoint: CheckpointRecord | None = None
    """What of it is checkpointed."""
    lease_expired: bool = False
    """Its lease has run out: it is being killed, or was."""


class ExecStage(StrEnum):
    """How far the daemon has come with a command that it runs in a living container."""

    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class ExecRecord:
    """A command beside a container's own. Times are seconds since the epoch."""

    id: str
    owner: Owner
    token: int
    request_id: str
    digest: str
    """Of the request, to tell a repetition from another one with the same request_id."""
    stage: ExecStage
    tty: bool
    stop_grace_s: float
    start_time: float
    end_time: float | None = None
    exit_code: int | None = None


@dataclass(frozen=True)
class IdleRecord:
    """What a container is watched for, and what was counted of it. Times are of the monotonic clock of the host."""

    owner: Owner
    idle_after_s: float
    idle_below_percent: float
    start_grace_s: float
    started_s: float | None = None
    used: bool = False
    held_to_s: float | None = None
    """Up to when the seconds are counted; None while it has no card."""
    busy_seconds: float = 0.0
    held_seconds: float = 0.0
    peak_memory_mib: int = 0
    memory_samples: int = 0
    """Looks in which memory was seen in use; without any, the peak is not known."""


@dataclass(frozen=True)
class Answer:
    """What a mutation answered, kept so that its repetition answers the same."""

    rpc: str
    digest: str
    message: bytes
