"""Gives a slice that no container sees to another attempt, so that a warm one need not be cut anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc

from nodedaemon.attachments import Attachments
from nodedaemon.gpus import Gpus
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.records import SliceStage
from nodedaemon.slices import Slices
from puhui.rpc.errors import Refusal
from puhui.v1.card_pb2 import Slice
from puhui.v1.node_pb2 import NodeEventKind

__all__ = ["SliceTransfers"]


@dataclass(frozen=True)
class SliceTransfers:
    """Changes whose slices of this node are.

    Attributes:
        holder_of: says which living container sees a slice, if any.
    """

    journal: Journal
    gpus: Gpus
    slices: Slices
    attachments: Attachments
    holder_of: Callable[[str], str | None]

    async def transfer(self, owner: Owner, uuid: str, new_owner: Owner, new_token: int) -> Slice:
        """Gives a slice to another attempt of the same centre. One that is its already stays so.

        Whoever calls this has both attempts in turn, so that neither gets containers or slices meanwhile.

        Args:
            owner: whose it is.
            uuid: the slice.
            new_owner: whose it is to be.
            new_token: the new owner's fencing token.

        Raises:
            Refusal: INVALID_ARGUMENT with OWNER_INVALID; FAILED_PRECONDITION with SLICE_NOT_FOUND, SLICE_IN_USE, naming
                who sees or holds it, or HOLDERS_UNKNOWN; INTERNAL with DRIVER_REFUSED. It has its owner then.
        """
        if new_owner.centre != owner.centre:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "OWNER_INVALID",
                f"a slice of centre {owner.centre} stays in it, and cannot go to {new_owner}; destroy it instead",
                field="new_owner.centre",
            )
        known = self.journal.slice(uuid)
        if known is not None and known.owner == new_owner and known.stage is SliceStage.ACTIVE:
            return self.slices.book.describe(known)  # given before a crash that swallowed the answer
        record, gpu = self.slices.book.owned(owner, uuid)
        self._require_unseen(owner, uuid)
        try:
            holders = await self.gpus.holders(gpu, record.gi or 0)
        except Refusal as error:
            if error.reason != "DRIVER_PERMISSION":
                raise
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "HOLDERS_UNKNOWN",
                f"the driver does not say who holds slice {uuid} ({error.message}); destroy it, and cut another",
                slice_uuid=uuid,
            ) from error
        if holders:
            raise _in_use(
                uuid,
                f"slice {uuid} is held by process {', '.join(map(str, holders))}; end it, then transfer again",
                holder_pids=",".join(str(one.pid) for one in holders),
            )
        if not self.slices.is_as(record):
            raise _in_use(uuid, f"slice {uuid} is being destroyed, or was found to be gone; look at it with ListSlices")
        with self.journal.atomic():
            # Who had it must be told anew, rather than that it was made for it.
            self.journal.forget_answers(owner)
            kept = self.slices.book.keep(
                replace(record, owner=new_owner, token=new_token),
                NodeEventKind.NODE_EVENT_KIND_SLICE_TRANSFERRED,
                "SLICE_TRANSFERRED",
                f"slice {{slice}} went from {owner} to {new_owner}",
            )
        return self.slices.book.describe(kept)

    def _require_unseen(self, owner: Owner, uuid: str) -> None:
        container = self.holder_of(uuid)
        if container is not None:
            raise _in_use(
                uuid,
                f"container {container[:12]} sees slice {uuid}; detach it with DetachSlice first",
                container_id=container,
            )
        doubt = self.attachments.doubt(owner)
        if doubt is not None:
            raise _in_use(uuid, f"the container of {owner} may still see slice {uuid}: {doubt}")


def _in_use(uuid: str, message: str, container_id: str = "", holder_pids: str = "") -> Refusal:
    return Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "SLICE_IN_USE",
        message,
        slice_uuid=uuid,
        container_id=container_id,
        holder_pids=holder_pids,
    )
