"""What can happen to a job. `jobs.transition` says when it can, and what it makes of the job."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.endings import Ending
from controlplane.growing import Outgrown
from controlplane.records import TakeOver
from puhui.v1 import card_pb2, idle_pb2, job_pb2, node_pb2, prediction_pb2

__all__ = [
    "Adopted",
    "BroughtBack",
    "CameLate",
    "CancelRequested",
    "CommandEnded",
    "ContainerRemoved",
    "ContainerStarted",
    "Ended",
    "Forwarded",
    "Forwarding",
    "Grows",
    "Happening",
    "KeptLate",
    "Moves",
    "NotStarted",
    "PeerAway",
    "PeerEnded",
    "PeerTold",
    "Predicted",
    "RanOut",
    "ReclaimBegun",
    "ReclaimRefused",
    "Reclaimed",
    "Requeued",
    "Reserved",
    "ResultsCollected",
    "ResultsDelayed",
    "ResultsLost",
    "ResumeRequested",
    "ResumeRetried",
    "ResumeWithdrawn",
    "Resumed",
    "RunAsked",
    "RunEnded",
    "RunStarted",
    "ShareReserved",
    "SliceCreated",
    "SliceDestroyed",
    "Stopped",
    "Submitted",
    "SuspendRequested",
    "Waits",
    "WarmSliceDropped",
    "WorkspaceCarried",
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
    take_over: TakeOver | None = None
    """Whose warm slice it takes over; None when one has to be cut."""


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
    reason: str = "CANCELLED"
    """Why, UPPER_SNAKE."""


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
class RanOut(Happening):
    """Its command failed because the memory of its slice was not enough."""

    outgrown: Outgrown


@dataclass(frozen=True)
class Grows(Happening):
    """Nothing is left of an attempt that ran out of memory, and it waits for a larger slice."""


@dataclass(frozen=True)
class ContainerRemoved(Happening):
    """The container is gone."""

    attempt: int


@dataclass(frozen=True)
class SliceDestroyed(Happening):
    """The slice is gone and its share is given back."""

    attempt: int
    slice_uuid: str = ""
    busy_s: float = 0.0
    """Time in which it was used, in seconds."""


@dataclass(frozen=True)
class Ended(Happening):
    """Everything that can be done is done."""

    unconfirmed: str = ""
    """Why the share is still held, if it is."""


# -- shares that come and go while the container lives (steps S6 to S8)


@dataclass(frozen=True)
class SuspendRequested(Happening):
    """Somebody wants its share taken back now."""

    hardest: job_pb2.ReclaimMode.ValueType
    """The hardest rung that may be taken."""


@dataclass(frozen=True)
class ReclaimBegun(Happening):
    """Its share is being taken back."""

    why: str
    """IDLE, SUSPENDED (somebody asked for it) or NEEDED (it is idle, and another job waits for the share)."""
    hardest: job_pb2.ReclaimMode.ValueType
    idleness: idle_pb2.Idleness | None = None


@dataclass(frozen=True)
class Reclaimed(Happening):
    """Its share was taken back; the container lives on."""

    mode: job_pb2.ReclaimMode.ValueType
    container: node_pb2.Container
    message: str
    warm_s: float
    """The slice is kept for its tenant for this long, in seconds."""
    warning: str = ""
    """What went wrong on the way; "" when nothing did."""


@dataclass(frozen=True)
class ReclaimRefused(Happening):
    """Its share could not be taken back; it goes on as before."""

    reason: str
    message: str


@dataclass(frozen=True)
class WarmSliceDropped(Happening):
    """A slice that was kept for its tenant after a reclaim is gone."""

    attempt: int
    slice_uuid: str
    for_job: str
    """The job that needed the room; "" when its time was over."""


@dataclass(frozen=True)
class ResumeRequested(Happening):
    """It is to have a share again."""

    why: str
    """RUN (a run instruction), RESUME (somebody asked for it), WANTED (what was checkpointed asks for its card), ROOM
    (there is room that nobody waits for)."""


@dataclass(frozen=True)
class ResumeWithdrawn(Happening):
    """Nobody wants it to have a share any longer."""


@dataclass(frozen=True)
class ShareReserved(Happening):
    """A share on its own node is reserved for the living container."""

    attempt: job_pb2.Attempt
    """GPU, profile and placement are those of the share."""
    node_name: str
    take_over: TakeOver | None = None


@dataclass(frozen=True)
class ResumeRetried(Happening):
    """The node could not give it the share; it waits for another."""

    reason: str
    message: str


@dataclass(frozen=True)
class Resumed(Happening):
    """It has a share again."""

    slice: card_pb2.Slice
    restored: bool
    """Processes of it were checkpointed, and are on the share now."""


@dataclass(frozen=True)
class Moves(Happening):
    """It is going to be made anew, with its workspace, as a new attempt."""

    attempt: job_pb2.Attempt
    node_name: str
    take_over: TakeOver | None = None


@dataclass(frozen=True)
class WorkspaceCarried(Happening):
    """The workspace of its last attempt is where the new one begins."""

    size_bytes: int


@dataclass(frozen=True)
class RunAsked(Happening):
    """A run instruction arrived."""

    run: job_pb2.Run


@dataclass(frozen=True)
class RunStarted(Happening):
    """The command of a run has started."""

    run_id: str


@dataclass(frozen=True)
class RunEnded(Happening):
    """A run is over."""

    run_id: str
    exit_code: int | None
    message: str = ""
    busy_s: float = 0.0


@dataclass(frozen=True)
class Forwarding(Happening):
    """It goes to a peer: a new attempt, which the peer is going to be asked to bind."""

    attempt: job_pb2.Attempt
    """With peer, fencing token, and the card that was promised."""
    offer_id: str
    promised_wait_s: float
    transfer_s: float
    """What bringing its code there is expected to take."""


@dataclass(frozen=True)
class Forwarded(Happening):
    """The peer has bound it."""

    peer_job_id: str
    bundle_bytes: int
    """What was sent of its code."""


@dataclass(frozen=True)
class PeerTold(Happening):
    """Something happened to it at its peer."""

    event: job_pb2.JobEvent
    """As the peer told it."""
    job: job_pb2.Job
    """The job as the peer knows it."""


@dataclass(frozen=True)
class PeerEnded(Happening):
    """It has ended at its peer; its results are to be fetched."""

    job: job_pb2.Job
    """The job as the peer knows it."""
    ending: Ending


@dataclass(frozen=True)
class PeerAway(Happening):
    """Its peer is out of contact, or back. It is taken to be running still."""

    reason: str
    message: str


@dataclass(frozen=True)
class BroughtBack(Happening):
    """Its attempt at a peer is over for certain, without a result, and it waits again."""

    reason: str
    message: str
    shun: bool
    """The peer is not asked again for this job."""


@dataclass(frozen=True)
class CameLate(Happening):
    """It was brought back and waits, and now the peer, in contact again, has its result after all."""

    attempt: int
    job: job_pb2.Job
    """The job as the peer knows it."""
    ending: Ending


@dataclass(frozen=True)
class KeptLate(Happening):
    """An attempt that was given up for lost had ended at its peer; what it left is kept as that attempt's."""

    attempt: int
    job: job_pb2.Job
    """The job as the peer knows it."""
    log_bytes: int
    artifacts: job_pb2.JobArtifacts
