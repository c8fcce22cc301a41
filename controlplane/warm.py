"""Slices that were taken back and are kept for their tenant: dropped after a time, or when somebody needs the room."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from controlplane import happenings
from controlplane.faults import retry_delay_s
from controlplane.jobs import transition
from controlplane.node_client import is_unreachable
from controlplane.nodes import Nodes
from controlplane.records import Change, JobRecord, Reservation
from controlplane.reservations import AttemptKey, Reservations
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now
from puhui.v1 import card_pb2, node_service_pb2

__all__ = ["WarmShares"]

_log = structlog.get_logger(__name__)


class WarmShares:
    """Drops warm slices. Taking one over is the scheduler's.

    Args:
        centre: name of the centre.
        store: its memory.
        nodes: where the slices are.
        reservations: which of them are warm.
    """

    def __init__(self, centre: str, store: Store, nodes: Nodes, reservations: Reservations) -> None:
        self._centre = centre
        self._store = store
        self._nodes = nodes
        self._reservations = reservations
        self._changed = asyncio.Event()
        self._dropping: dict[AttemptKey, asyncio.Task[None]] = {}

    def wake(self) -> None:
        """There may be another warm slice, or one less."""
        self._changed.set()

    def evict(self, key: AttemptKey, for_job: str) -> None:
        """Drops a warm slice now, because a job waits for the room."""
        held = self._reservations.get(key)
        if held is not None and held.is_warm:
            self._drop(held, for_job)

    async def run(self) -> None:
        """Drops what has been kept long enough, for ever."""
        try:
            while True:
                self._changed.clear()
                at, next_s = now(), None
                for held in self._reservations.warm():
                    if held.warm_until <= at:
                        self._drop(held, "")
                    else:
                        left_s = held.warm_until - at
                        next_s = left_s if next_s is None else min(next_s, left_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(next_s):
                        await self._changed.wait()
        finally:
            tasks = list(self._dropping.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _drop(self, held: Reservation, for_job: str) -> None:
        if held.key in self._dropping or held.key in self._reservations.spoken_for:
            return
        # From here on nobody takes it over.
        self._reservations.mark_leaving(held.key, for_job)
        task = asyncio.create_task(self._destroy(held, for_job), name=f"drop {held.job_id}/{held.attempt}")
        self._dropping[held.key] = task
        task.add_done_callback(lambda _: self._dropping.pop(held.key, None))

    async def _destroy(self, held: Reservation, for_job: str) -> None:
        tries = 0
        while True:
            link = self._nodes.link(held.node_id)
            record = await self._store.job(held.job_id)
            if link is None or record is None:
                raise RuntimeError(f"a warm slice of {held.job_id} on {held.node_id} is kept, but one is not known")
            request = node_service_pb2.DestroySliceRequest(
                owner=card_pb2.AttemptRef(
                    centre=self._centre,
                    job_id=held.job_id,
                    attempt=held.attempt,
                    fencing_token=record.job.attempts[held.attempt - 1].fencing_token,
                ),
                slice_uuid=held.slice_uuid,
                request_id=f"{held.job_id}/{held.attempt}/drop-{held.warm_until:.6f}",
            )
            try:
                await link.client.destroy_slice(request)
                break
            except Refusal as refusal:
                if refusal.reason == "SLICE_NOT_FOUND":
                    break
                tries += 1
                _log.warning("a warm slice cannot be destroyed yet", slice=held.slice_uuid, why=str(refusal))
                if is_unreachable(refusal) and not link.in_contact:
                    await link.contact()
                else:
                    await asyncio.sleep(retry_delay_s(tries))
        self._nodes.slice_gone(held.node_id, held.slice_uuid)
        await self._forget(held, for_job)

    async def _forget(self, held: Reservation, for_job: str) -> None:
        def decide(record: JobRecord, _: int) -> Change:
            dropped = happenings.WarmSliceDropped(held.attempt, held.slice_uuid, for_job)
            after, event = transition(record, dropped, now())
            return Change(after, (event,), release_warm=held)

        tries = 0
        while True:
            try:
                await self._store.change_job(held.job_id, decide)
                break
            except OSError as error:
                tries += 1
                _log.error("the store cannot be written; trying again", job=held.job_id, why=str(error))
                await asyncio.sleep(retry_delay_s(tries))
        if self._reservations.get(held.key) == held:
            self._reservations.release(held.key)
