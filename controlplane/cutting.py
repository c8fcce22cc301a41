"""The slice of a share that is reserved: a warm one that is taken over, or one that is cut."""

from __future__ import annotations

from typing import Protocol

import structlog

from controlplane.node_asker import NodeAsker
from controlplane.records import JobRecord, TakeOver
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, job_pb2, node_service_pb2

__all__ = ["Placed", "cut", "discard_warm"]

_log = structlog.get_logger(__name__)


class Placed(Protocol):
    """The attempt that the share is reserved for."""

    @property
    def record(self) -> JobRecord:
        """The job."""

    @property
    def attempt(self) -> job_pb2.Attempt:
        """The attempt."""

    @property
    def owner(self) -> card_pb2.AttemptRef:
        """Under which its node is commanded."""

    @property
    def asker(self) -> NodeAsker:
        """Asks its node."""

    @property
    def store(self) -> Store:
        """The centre's memory."""


async def cut(placed: Placed, step: str) -> card_pb2.Slice:
    """Returns the slice of the share that is reserved for an attempt: a warm one that is taken over, or a new one.

    Args:
        placed: the attempt.
        step: tells this slice from others of the attempt.

    Raises:
        Refusal: the node's.
        GivenUp: the job's end was asked for, and the node cannot be asked.
    """
    record, attempt = placed.record, placed.attempt
    if record.take_over is not None:
        piece = await _taken(placed, record.take_over)
        if piece is not None:
            return piece
    request = node_service_pb2.CreateSliceRequest(
        owner=placed.owner,
        gpu_uuid=attempt.gpu_uuid,
        profile=attempt.profile,
        placement=attempt.placement,
        request_id=f"{record.id}/{attempt.number}/{step}",
    )
    return await placed.asker.ask(lambda client: client.create_slice(request), give_up=True)


async def _taken(placed: Placed, warm: TakeOver) -> card_pb2.Slice | None:
    """Returns the warm slice, the attempt's own now; None when it is gone, or could only be destroyed.

    Raises:
        Refusal: the node's.
        GivenUp: the job's end was asked for, and the node cannot be asked.
    """
    for piece in await placed.asker.ask(lambda client: client.list_slices(), give_up=True):
        if piece.uuid == warm.slice_uuid and _is_of(piece, placed.owner):
            return piece if piece.state != card_pb2.SLICE_STATE_ERROR else None
    former = await _former(placed, warm)
    if former is None or warm.key == (placed.owner.job_id, placed.owner.attempt):
        return None
    request = node_service_pb2.TransferSliceRequest(
        owner=former,
        slice_uuid=warm.slice_uuid,
        new_owner=placed.owner,
        request_id=f"{placed.owner.job_id}/{placed.owner.attempt}/take-over-{placed.record.resumes}",
    )
    try:
        return await placed.asker.ask(lambda client: client.transfer_slice(request), give_up=True)
    except Refusal as refusal:
        if refusal.reason == "SLICE_NOT_FOUND":
            return None
        _log.warning("a warm slice cannot be taken over; another is cut", slice=warm.slice_uuid, why=str(refusal))
    await _destroy(placed, former, warm.slice_uuid, give_up=True)
    return None


async def discard_warm(placed: Placed, warm: TakeOver) -> None:
    """Destroys the warm slice that an attempt was going to take over, whose ever it is by now.

    Raises:
        Refusal: the node's.
    """
    for piece in await placed.asker.ask(lambda client: client.list_slices()):
        if piece.uuid != warm.slice_uuid:
            continue
        owner = placed.owner if _is_of(piece, placed.owner) else await _former(placed, warm)
        if owner is not None and _is_of(piece, owner):
            await _destroy(placed, owner, piece.uuid, give_up=False)


async def _former(placed: Placed, warm: TakeOver) -> card_pb2.AttemptRef | None:
    """Returns under which the owner of a warm slice is commanded."""
    record = await placed.store.job(warm.job_id)
    if record is None:
        return None
    return card_pb2.AttemptRef(
        centre=placed.owner.centre,
        job_id=warm.job_id,
        attempt=warm.attempt,
        fencing_token=record.job.attempts[warm.attempt - 1].fencing_token,
    )


async def _destroy(placed: Placed, owner: card_pb2.AttemptRef, slice_uuid: str, *, give_up: bool) -> None:
    request = node_service_pb2.DestroySliceRequest(owner=owner, slice_uuid=slice_uuid)
    try:
        await placed.asker.ask(lambda client: client.destroy_slice(request), give_up=give_up)
    except Refusal as refusal:
        if refusal.reason != "SLICE_NOT_FOUND":
            raise


def _is_of(piece: card_pb2.Slice, owner: card_pb2.AttemptRef) -> bool:
    return (piece.owner.centre, piece.owner.job_id, piece.owner.attempt) == (owner.centre, owner.job_id, owner.attempt)
