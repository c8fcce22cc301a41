"""What is left on a node of attempts that are over, and its removal."""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Iterable

import structlog

from controlplane.jobs import FINAL_STATES, PLACED_STATES
from controlplane.node_client import NodeClient, is_unreachable
from controlplane.reservations import Reservations
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, node_pb2, node_service_pb2

__all__ = ["DRY_RUN_PREFIX", "remove_orphans"]

_log = structlog.get_logger(__name__)

DRY_RUN_PREFIX = "d"
"""Begins the ids under which dry runs own their containers; those of jobs begin with another."""


async def remove_orphans(
    client: NodeClient,
    centre: str,
    store: Store,
    reservations: Reservations,
    slices: Iterable[card_pb2.Slice],
    containers: Iterable[node_pb2.Container],
    dry_runs: Collection[str] = (),
) -> None:
    """Removes containers and slices of attempts of this centre that are over and hold no share, and of dry runs.

    What belongs to a job that this centre does not know is left alone: it may be somebody else's.

    Raises:
        Refusal: the node cannot be reached.
    """
    for container in containers:
        owner = container.owner
        if owner.centre != centre:
            continue
        left = owner.job_id.startswith(f"{DRY_RUN_PREFIX}-") and owner.job_id not in dry_runs
        if left or await _over(owner, store, reservations, living=True):
            _log.warning("removing an orphaned container", job=owner.job_id, attempt=owner.attempt)
            await _tolerate(
                client.remove_container(
                    node_service_pb2.RemoveContainerRequest(
                        owner=owner, discard_results=True, request_id=_request_id(owner, "remove-orphan")
                    )
                )
            )
    for piece in slices:
        owner = piece.owner
        if (
            not piece.HasField("owner")
            or owner.centre != centre
            or not await _over(owner, store, reservations, living=False)
        ):
            continue
        _log.warning("destroying an orphaned slice", job=owner.job_id, attempt=owner.attempt, slice=piece.uuid)
        await _tolerate(
            client.destroy_slice(
                node_service_pb2.DestroySliceRequest(
                    owner=owner, slice_uuid=piece.uuid, request_id=_request_id(owner, "destroy-orphan")
                )
            )
        )


async def _over(owner: card_pb2.AttemptRef, store: Store, reservations: Reservations, *, living: bool) -> bool:
    """Returns whether an attempt is over, so that nothing of it may be left.

    Args:
        owner: the attempt.
        store: the centre's memory.
        reservations: what is held.
        living: an attempt without a share may have it nevertheless: its container lives on, or its workspace is needed.
    """
    if reservations.holds((owner.job_id, owner.attempt)):
        return False
    record = await store.job(owner.job_id)
    if record is None:
        return False
    newest = len(record.job.attempts)
    if living and record.state not in FINAL_STATES and owner.attempt == record.carry_from:
        return False  # its workspace is still needed, wherever the job waits meanwhile
    if living and record.state in PLACED_STATES and owner.attempt == newest:
        return False
    return owner.attempt <= newest


def _request_id(owner: card_pb2.AttemptRef, step: str) -> str:
    return f"{owner.job_id}/{owner.attempt}/{step}"


async def _tolerate(call: Awaitable[None]) -> None:
    try:
        await call
    except Refusal as refusal:
        if is_unreachable(refusal):
            raise
        # It is shown as held as long as it exists, and the next look tries again.
        _log.warning("an orphan could not be removed", reason=refusal.reason, why=refusal.message)
