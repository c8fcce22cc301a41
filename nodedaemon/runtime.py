"""The seam between the daemon and what runs containers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from nodedaemon.exec_process import ExecProcess
from puhui.v1.node_pb2 import Runtime

__all__ = [
    "CODE_PATH",
    "OUTPUTS_PATH",
    "WORKSPACE_PATH",
    "ContainerExit",
    "ContainerGone",
    "ContainerPhase",
    "ContainerRuntime",
    "ContainerSpec",
    "ContainerStatus",
    "ExecSpec",
    "Mount",
]

WORKSPACE_PATH = "/workspace"
"""Where a container finds its writable workspace."""
CODE_PATH = "/workspace/code"
"""Where a container finds its code, read-only."""
OUTPUTS_PATH = "/workspace/outputs"
"""Where a container puts what is to be kept."""


class ContainerPhase(StrEnum):
    """Where a container is in its life, as the runtime sees it."""

    CREATED = "created"
    RUNNING = "running"
    SUSPENDED = "suspended"
    EXITED = "exited"


@dataclass(frozen=True)
class Mount:
    """A file, device node or directory of the host that a container is to see."""

    source: Path
    target: str
    read_only: bool = True
    device: bool = False
    """True lets device nodes below it be opened as devices."""


@dataclass(frozen=True)
class ContainerSpec:
    """What to run, and in what."""

    name: str
    """Unique on the host."""
    image: str
    command: Sequence[str]
    env: Mapping[str, str]
    """Environment, but for paths: the runtime adds HOME and PUHUI_OUTPUTS."""
    labels: Mapping[str, str]
    code: Path
    """Directory on the host, mounted read-only at CODE_PATH; the command starts there."""
    workspace: Path
    """Directory on the host, mounted writable at WORKSPACE_PATH; has `code` and `outputs` in it."""
    log: Path
    """Where the output goes, in the k8s-file format."""
    mounts: Sequence[Mount] = field(default=())
    network: bool = False
    cpus: float = 0.0
    """0 is no limit."""
    host_memory_mib: int = 0
    """0 is no limit."""
    pids: int = 0
    """0 is the runtime's default."""


@dataclass(frozen=True)
class ExecSpec:
    """What to run in a living container."""

    folder: Path
    """Directory on the host of this command alone, with `log` and `exit/` in it; see `nodedaemon.exec_process`."""
    command: Sequence[str]
    env: Mapping[str, str]
    """Environment beside the container's own."""
    without: Collection[str] = ()
    """Names that the container's own environment has and the command's must not have."""
    working_directory: str = ""
    """Empty is that of the container's own command."""
    tty: bool = False
    columns: int = 0
    """Width of the terminal, in characters; 0 is the runtime's default."""
    rows: int = 0


@dataclass(frozen=True)
class ContainerStatus:
    """A container, as the runtime sees it. Times are seconds since the epoch."""

    id: str
    labels: Mapping[str, str]
    phase: ContainerPhase
    pid: int = 0
    exit_code: int | None = None
    oom_killed: bool = False
    start_time: float | None = None
    end_time: float | None = None


@dataclass(frozen=True)
class ContainerExit:
    """A container's command has ended."""

    id: str
    exit_code: int
    oom_killed: bool
    end_time: float


@dataclass(frozen=True)
class ContainerGone:
    """A container was removed, by this daemon or by somebody else."""

    id: str


class ContainerRuntime(Protocol):
    """Runs containers. Every method raises Refusal: UNAVAILABLE with RUNTIME_UNAVAILABLE when it is not there."""

    async def create(self, spec: ContainerSpec) -> str:
        """Makes a container without starting it, and returns its id.

        Raises:
            Refusal: FAILED_PRECONDITION with IMAGE_NOT_FOUND; INVALID_ARGUMENT with COMMAND_NOT_FOUND, in which
                case no container is left; INTERNAL with RUNTIME_REFUSED.
        """

    async def initialize(self, container_id: str) -> int:
        """Makes a container's first process, which begins the command only at `start`.

        Returns:
            Its process id on this host; 0 where there is none before `start`.

        Raises:
            Refusal: INTERNAL with RUNTIME_REFUSED.
        """

    async def start(self, container_id: str) -> ContainerStatus:
        """Starts a container's command.

        Raises:
            Refusal: INTERNAL with RUNTIME_REFUSED.
        """

    async def signal(self, container_id: str, signal: int) -> None:
        """Signals a container's command. Nothing happens when it has ended.

        Raises:
            Refusal: INTERNAL with RUNTIME_REFUSED.
        """

    async def start_exec(self, container_id: str, spec: ExecSpec) -> ExecProcess | None:
        """Starts a command in a living container, with the container's user, limits and lack of privileges.

        Returns:
            The command; None when it has ended already.

        Raises:
            Refusal: INVALID_ARGUMENT with COMMAND_NOT_FOUND or SPEC_INVALID; FAILED_PRECONDITION with
                CONTAINER_NOT_RUNNING or CONTAINER_SUSPENDED; INTERNAL with RUNTIME_REFUSED. Nothing runs then.
        """

    async def suspend(self, container_id: str) -> None:
        """Freezes every process of a container, those of `start_exec` too. What is frozen stays so.

        Raises:
            Refusal: DEADLINE_EXCEEDED with SUSPEND_STUCK, and some processes may be frozen; INTERNAL with
                RUNTIME_REFUSED.
        """

    async def resume(self, container_id: str) -> None:
        """Thaws every process of a container.

        Where signals do it, a process that had stopped itself before goes on as well.

        Raises:
            Refusal: INTERNAL with RUNTIME_REFUSED.
        """

    async def remove(self, container_id: str) -> None:
        """Kills what still runs in a container and removes it. Nothing happens when it is gone.

        Args:
            container_id: its id, or its name.

        Raises:
            Refusal: INTERNAL with RUNTIME_REFUSED.
        """

    async def containers(self) -> list[ContainerStatus]:
        """Returns the containers of this daemon, and no others.

        Raises:
            Refusal: INTERNAL with RUNTIME_REFUSED.
        """

    def exits(self) -> AsyncIterator[ContainerExit | ContainerGone | None]:
        """Yields each end of a command and each removal; None whenever some may have been missed.

        Does not end by itself.
        """

    async def make_removable(self, folder: Path) -> None:
        """Makes what a container left in a folder readable and removable for the daemon's user."""

    def describe(self) -> Runtime:
        """Returns what runs the containers here, and what was chosen because of what this host lacks."""

    async def close(self) -> None:
        """Lets go of the runtime. Containers live on."""
