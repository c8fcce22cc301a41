"""The upload of a guest: one header, then its bundle in chunks, unless this peer has sent that before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

import grpc

from controlplane.bundles import Bundles
from controlplane.guest_request import invalid
from controlplane.records import PeerRecord
from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, stream_pb2
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["Desk", "GuestUploads"]

_Messages = AsyncIterator[wire.ForwardJobRequest]


class Desk(Protocol):
    """Who gave the offers; `OfferDesk` is one."""

    def take(self, offer_id: str, peer: str, origin: card_pb2.AttemptRef) -> None:
        """Takes an offer. Raises a Refusal, FAILED_PRECONDITION with OFFER_EXPIRED."""

    def settle(self, peer: str, origin: card_pb2.AttemptRef) -> None:
        """Ends the promises for an attempt."""

    def note_bundle(self, peer: str, bundle_id: str) -> None:
        """Notes that a peer has sent a bundle."""

    def has_sent(self, peer: str, bundle_id: str) -> bool:
        """Whether a peer has sent a bundle that is here still."""


@dataclass(frozen=True)
class _Part:
    """A message of an upload, as `Bundles.receive` reads it."""

    header: stream_pb2.BundleHeader
    chunk: bytes


class GuestUploads:
    """Receives what peers upload.

    Args:
        bundles: where code is.
        desk: who remembers what was sent before.
        silent_s: who sends nothing for so long in the middle of a request is not waited for, in seconds.
        upload_s: a bundle must have come within this time, in seconds.
    """

    def __init__(self, bundles: Bundles, desk: Desk, silent_s: float, upload_s: float) -> None:
        self._bundles = bundles
        self._desk = desk
        self._silent_s = silent_s
        self._upload_s = upload_s

    async def next(self, messages: _Messages) -> wire.ForwardJobRequest | None:
        """Returns the next message; None when there are no more.

        Raises:
            Refusal: DEADLINE_EXCEEDED with UPLOAD_STALLED.
        """
        try:
            async with asyncio.timeout(self._silent_s):
                return await anext(messages, None)
        except TimeoutError as error:
            raise _stalled(f"nothing has come for {self._silent_s:.0f} s") from error

    async def bundle(
        self, peer: PeerRecord, header: stream_pb2.BundleHeader, messages: _Messages, count: Callable[[int], None]
    ) -> None:
        """Receives a bundle, if there is one. One that this peer has sent before need not come again.

        Args:
            peer: who sends it.
            header: what is announced.
            messages: what comes.
            count: told of the bytes that come; refuses when they are too many.

        Raises:
            Refusal: the upload is malformed or too slow, or the bundle is not harmless, or not here.
            OSError: the disk is full.
        """
        try:
            async with asyncio.timeout(self._upload_s):
                await self._receive(peer, header, messages, count)
        except TimeoutError as error:
            raise _stalled(f"the bundle has not come within {self._upload_s:.0f} s") from error

    async def _receive(
        self, peer: PeerRecord, header: stream_pb2.BundleHeader, messages: _Messages, count: Callable[[int], None]
    ) -> None:
        if not header.bundle_id:
            return
        most = peer.terms.most_bundle_bytes
        if most and header.size_bytes > most:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "BUNDLE_TOO_LARGE",
                f"bundles of at most {most} bytes are taken from {peer.name}",
                limit_bytes=str(most),
            )
        second = await self.next(messages)
        if second is None:
            # Never one that somebody else has sent: to know its name is not to have it.
            if not self._desk.has_sent(peer.name, header.bundle_id):
                raise Refusal(
                    grpc.StatusCode.NOT_FOUND,
                    "BUNDLE_NOT_FOUND",
                    "you have not sent this bundle, or it is here no longer; send it behind the header",
                )
            await self._bundles.require(header.bundle_id)
            return
        await self._bundles.receive(self._parts(header, second, messages, count), prove=True)
        self._desk.note_bundle(peer.name, header.bundle_id)

    async def _parts(
        self,
        header: stream_pb2.BundleHeader,
        second: wire.ForwardJobRequest,
        messages: _Messages,
        count: Callable[[int], None],
    ) -> AsyncGenerator[_Part, None]:
        yield _Part(header, b"")
        message: wire.ForwardJobRequest | None = second
        while message is not None:
            if message.WhichOneof("part") != "chunk":
                raise invalid("HEADER_MISSING", "the header comes once, and first")
            count(len(message.chunk))
            yield _Part(stream_pb2.BundleHeader(), message.chunk)
            message = await self.next(messages)


def _stalled(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "UPLOAD_STALLED", f"{message}; try again")
