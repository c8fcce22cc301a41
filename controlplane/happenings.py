"""What can happen to a job. `jobs.transition` says when it can, and what it makes of the job."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.endings import Ending
from puhui.v1 import card_pb2, job_pb2, node_pb2, prediction_pb2

__all__ = [
    "Adopted",
    "CancelRequested",
    "CommandEnded",
    "ContainerRemoved",
    "ContainerStarted",
    "Ended",
    "Happening",
    "NotStarted",
    "Predicted",
    "Requeued",
    "Reserved",
    "ResultsCollected",
    "ResultsDelayed",
    "ResultsLost",
    "SliceCreated",
    "SliceDestroyed",
    "Stopped",
    "Submitted",
    "Waits",
]


@dataclass(frozen=True)
class Happening:
    """Something that happened to a job."""


@dataclass(frozen=True)
class Submitted(Happening):
    """It was accepted."""


@dataclass(frozen=True)
class Predicted(Happening):
    """Its need is known."""

    prediction: prediction_pb2.Prediction | None
    sizing: prediction_pb2.Sizing


@dataclass(frozen=True)
class Waits(Happening):
    """No slice of its size is free."""

    message: str


@dataclass(frozen=True)
class Reserved(Happening):
    """A share is reserved for a new attempt."""

    attempt: job_pb2.Attempt
    sizing: prediction_pb2.Sizing
    node_name: str


@dataclass(frozen=True)
class Adopted(Happening):
    """A control plane takes up an attempt that it does not know from before, under a new token."""

    fencing_token: int


@dataclass(frozen=True)
class SliceCreated(Happening):
    """The slice exists."""

    slice: card_pb2.Slice


@dataclass(frozen=True)
class ContainerStarted(Happening):
    """The command runs."""

    container: node_pb2.Container


@dataclass(frozen=True)
class Requeued(Happening):
    """The node could not do it; nothing of the attempt is left there."""

    reason: str
    message: str


@dataclass(frozen=True)
class CancelRequested(Happening):
    """Somebody wants it to end."""

    message: str = ""


@dataclass(frozen=True)
class CommandEnded(Happening):
    """The command ended by itself, or the node ended it."""

    container: node_pb2.Container


@dataclass(frozen=True)
class NotStarted(Happening):
    """It cannot start, or what it ran in is lost."""

    ending: Ending


@dataclass(frozen=True)
class Stopped(Happening):
    """The command was ended because somebody asked for it. No container: it had not started."""

    container: node_pb2.Container | None = None


@dataclass(frozen=True)
class ResultsCollected(Happening):
    """Log and artifacts are here."""

    log_bytes: int
    artifacts: job_pb2.JobArtifacts


@dataclass(frozen=True)
class ResultsDelayed(Happening):
    """Log and artifacts cannot be had yet; they are not given up."""

    message: str


@dataclass(frozen=True)
class ResultsLost(Happening):
    """Not all of log and artifacts can be had, and that is borne: the share must not wait for them for ever."""

    why: str
    log_bytes: int
    artifacts: job_pb2.JobArtifacts


@dataclass(frozen=True)
class ContainerRemoved(Happening):
    """The container is gone."""

    attempt: int


@dataclass(frozen=True)
class SliceDestroyed(Happening):
    """The slice is gone and its share is given back."""

    attempt: int
    slice_uuid: str = ""


@dataclass(frozen=True)
class Ended(Happening):
    """Everything that can be done is done."""

    unconfirmed: str = ""
    """Why the share is still held, if it is."""
