"""Which failures of a call are waited out, and for how long.

A centre that cannot be reached has not failed: its control plane may be restarting, and jobs run on without
it. So a client that has been answered once keeps trying for a while. One that has never been answered gives
up soon, because the address is probably wrong or nothing runs there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import grpc

from puhui.rpc.errors import Refusal

__all__ = ["Contact", "Patience", "Trouble"]

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a client waits for a centre that cannot be reached, in seconds."""

    first_s: float = 1.0
    """Until the first answer ever."""
    call_s: float = 30.0
    """When a single request gets no answer, though an earlier one did."""
    stream_s: float = 900.0
    """When a stream (events, logs, an archive) breaks off. It goes on where it was."""


@dataclass(frozen=True)
class Trouble:
    """A centre could not be reached, or said that it cannot answer yet, and will be tried again."""

    address: str
    """Address of the centre."""
    failure: str
    """What gRPC said, or the centre."""
    waited_s: float
    """Time since it was last heard of, in seconds."""
    answered: bool = False
    """It was the centre that said so: it is something behind it that is away."""


_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 3.0


class Contact:
    """Whether a centre answers; decides after each failure between another try and giving up."""

    def __init__(self, address: str, patience: Patience, on_trouble: Callable[[Trouble], None] | None) -> None:
        self._address = address
        self._patience = patience
        self._on_trouble = on_trouble
        self._answered = False
        self._closed = False

    def close(self) -> None:
        """Notes that the connection is being closed on this side: nothing is tried again."""
        self._closed = True

    def call(self, attempt: Callable[[], T]) -> T:
        """Returns what `attempt` returns, trying it again while the centre cannot be reached.

        `attempt` must be safe to repeat: a read, or a mutation with a request_id.

        Raises:
            Refusal: the centre refused, or could not be reached for too long (UNAVAILABLE, CENTRE_UNREACHABLE), or the
                connection was closed on this side (CANCELLED, CONNECTION_CLOSED).
        """
        wait = _Wait(self, self._patience.call_s)
        while True:
            try:
                result = attempt()
            except grpc.RpcError as error:
                wait.after(error)
            except ValueError:  # so gRPC tells of a call on a closed channel
                if not self._closed:
                    raise
                raise self._closed_here() from None
            else:
                self._answered = True
                return result

    def stream(self, attempt: Callable[[], Iterator[T]]) -> Iterator[T]:
        """Yields what `attempt` yields; when it breaks off, goes on with what another `attempt` yields.

        `attempt` must begin where the last one stopped.

        Raises:
            Refusal: as `call` does.
        """
        wait = _Wait(self, self._patience.stream_s)
        while True:
            try:
                for item in attempt():
                    self._answered = True
                    wait.reset()
                    yield item
            except grpc.RpcError as error:
                wait.after(error)
                # The error is the call itself, in a circle with its traceback. Freed as late as at Python's end, it may
                # wait for ever for a lock of a thread that is no more.
                error.__traceback__ = None
            except ValueError:  # so gRPC tells of a call on a closed channel
                if not self._closed:
                    raise
                raise self._closed_here() from None
            else:
                self._answered = True
                return

    def longest_s(self, usual_s: float) -> float:
        """Returns how long to wait for the centre now: little when it has never answered."""
        return usual_s if self._answered else min(usual_s, self._patience.first_s)

    def passing(self, refusal: Refusal) -> bool:
        """Says whether another try may help; otherwise the centre has given its answer."""
        if self._closed:
            return False
        if refusal.reason != "UNKNOWN":
            # The centre was reached, and says itself whether what it lacks will pass.
            self._answered = True
            return refusal.code is grpc.StatusCode.UNAVAILABLE and refusal.retry_after_s is not None
        # A server that stops cancels what it serves.
        return refusal.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

    def answer(self, refusal: Refusal) -> Refusal:
        """Returns what a caller is told when trying again would not help."""
        if refusal.reason != "UNKNOWN":
            return refusal
        if self._closed and refusal.code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE):
            return self._closed_here()
        if refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Refusal(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "CENTRE_TOO_SLOW",
                f"{self._address} did not answer in time, so it is not known whether it did what was asked; "
                "look, and try again",
                address=self._address,
            )
        return refusal

    def given_up(self, refusal: Refusal) -> Refusal:
        """Returns what a caller is told who has waited long enough."""
        if refusal.reason != "UNKNOWN":
            return refusal
        advice = (
            "it did answer before, and jobs run on without it; try again, or look at its control plane's log"
            if self._answered
            else "start a local centre with `puhui up`, or name another with --server or PUHUI_SERVER"
        )
        return Refusal(
            grpc.StatusCode.UNAVAILABLE,
            "CENTRE_UNREACHABLE",
            f"no centre answers at {self._address}; {advice}",
            address=self._address,
            failure=refusal.message,
        )

    def _closed_here(self) -> Refusal:
        return Refusal(
            grpc.StatusCode.CANCELLED,
            "CONNECTION_CLOSED",
            f"the connection to {self._address} was closed on this side; open another",
            address=self._address,
        )

    def tell(self, refusal: Refusal, waited_s: float) -> None:
        """Tells whoever listens that another try follows."""
        if self._on_trouble is not None and self._answered:
            self._on_trouble(Trouble(self._address, refusal.message, waited_s, refusal.reason != "UNKNOWN"))


class _Wait:
    """The tries of one call."""

    def __init__(self, contact: Contact, usual_s: float) -> None:
        self._contact = contact
        self._usual_s = usual_s
        self.reset()

    def reset(self) -> None:
        self._since: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def after(self, error: grpc.RpcError) -> None:
        """Pauses before another try, or raises what the caller is told."""
        refusal = Refusal.of(error)
        if not self._contact.passing(refusal):
            raise self._contact.answer(refusal) from error
        now = time.monotonic()
        if self._since is None:
            self._since = now
        waited_s = now - self._since
        pause_s = max(self._pause_s, refusal.retry_after_s or 0)
        if waited_s + pause_s > self._contact.longest_s(self._usual_s):
            raise self._contact.given_up(refusal) from error
        self._contact.tell(refusal, waited_s)
        time.sleep(pause_s)
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
