"""Asks a node until it answers: not to be reachable is no answer, and never a failure of the job."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from controlplane.faults import Verdict, retry_delay_s, verdict
from controlplane.node_client import NodeClient
from controlplane.node_link import NodeLink
from puhui.rpc.errors import Refusal

__all__ = ["Fenced", "GivenUp", "NodeAsker"]

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")
# The link notices within seconds that a node is out of contact; then its return is waited for instead.
_LONGEST_DELAY_S = 2.0


class Fenced(Exception):  # noqa: N818 - a name for what it is
    """Somebody else commands this attempt."""


class GivenUp(Exception):  # noqa: N818 - a name for what it is
    """The node cannot be asked, and the job's end was asked for."""


class NodeAsker:
    """Asks one attempt's node.

    Args:
        link: returns the connection to the node.
        cancel: set once the job's end was asked for.
    """

    def __init__(self, link: Callable[[], NodeLink], cancel: asyncio.Event) -> None:
        self._link = link
        self._cancel = cancel

    async def ask(self, call: Callable[[NodeClient], Awaitable[_T]], *, give_up: bool = False) -> _T:
        """Asks the node until it answers.

        Args:
            call: what to ask; it may be asked again.
            give_up: stop asking a node out of contact once the job's end is asked for.

        Raises:
            Refusal: the node's answer.
            GivenUp: as `give_up` says.
            Fenced: somebody else commands this attempt.
        """
        tries = 0
        while True:
            link = self._link()
            try:
                return await call(link.client)
            except Refusal as refusal:
                what = verdict(refusal)
                if what is Verdict.FENCED:
                    raise Fenced from refusal
                if what is not Verdict.WAIT:
                    raise
                tries += 1
                _log.info("the node cannot be asked; waiting", node=link.node_id, why=str(refusal))
            await self.until_contact(retry_delay_s(tries), give_up=give_up)

    async def until_contact(self, delay_s: float, *, give_up: bool) -> None:
        """Waits until asking again makes sense: until a node out of contact is back, or else for `delay_s` seconds.

        Raises:
            GivenUp: the job's end was asked for, and `give_up` says to stop then.
        """
        link = self._link()
        back = asyncio.sleep(min(delay_s, _LONGEST_DELAY_S)) if link.in_contact else link.contact()
        waits: list[asyncio.Task[object]] = [asyncio.create_task(_waited(back))]
        if give_up:
            waits.append(asyncio.create_task(self._cancel.wait()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if give_up and self._cancel.is_set():
            raise GivenUp


async def _waited(wait: Awaitable[None]) -> None:
    await wait
