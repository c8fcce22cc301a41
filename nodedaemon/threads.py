"""Threads for calls that block, and may block for ever: a process that ends does not wait for them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["Worker", "on_thread"]

_T = TypeVar("_T")


def on_thread(call: Callable[[], _T], name: str) -> Future[_T]:
    """Runs a call on a thread of its own."""
    answer: Future[_T] = Future()
    # Whoever waits may give up waiting, but not cancel what runs.
    answer.set_running_or_notify_cancel()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            answer.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return answer


class Worker:
    """One thread that runs calls of the event loop, one after the other.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=_serve, args=(self._calls,), name=name, daemon=True).start()

    def run(self, call: Callable[[], _T]) -> asyncio.Future[_T]:
        """Has a call run, and returns what tells its outcome. To cancel that does not stop the call."""
        answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._calls.put((call, answer))
        return answer

    def close(self) -> None:
        """Ends the thread once it has run what it was given."""
        self._calls.put(None)


def _serve(calls: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None]) -> None:
    while (given := calls.get()) is not None:
        call, answer = given
        result, failure = None, None
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            answer.get_loop().call_soon_threadsafe(_settle, answer, result, failure)


def _settle(answer: asyncio.Future[Any], result: Any, failure: BaseException | None) -> None:
    if answer.done():
        return  # cancelled meanwhile
    if failure is not None:
        answer.set_exception(failure)
    else:
        answer.set_result(result)
