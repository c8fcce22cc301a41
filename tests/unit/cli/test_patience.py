"""What is waited out, and what is told at once."""

from collections.abc import Callable, Iterator

import grpc
import pytest

from puhui.client import Centre
from puhui.client.patience import Contact, Patience, Trouble
from puhui.rpc.errors import Refusal


class Failure(grpc.RpcError):
    """A failed call, as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "it failed"


def failing(*codes: grpc.StatusCode) -> Callable[[], str]:
    left = list(codes)

    def attempt() -> str:
        if left:
            raise Failure(left.pop(0))
        return "answer"

    return attempt


def contact(told: list[Trouble] | None = None, **seconds: float) -> Contact:
    return Contact("here:1", Patience(**seconds), told.append if told is not None else None)


LOST = grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("code", [LOST, grpc.StatusCode.CANCELLED])
def test_a_lost_connection_is_tried_again(code: grpc.StatusCode) -> None:
    told: list[Trouble] = []
    centre = contact(told)
    assert centre.call(failing(code)) == "answer"
    assert told == []  # never answered before: the user is only told when it is given up
    assert centre.call(failing(code, code)) == "answer"
    assert [(trouble.address, trouble.failure) for trouble in told] == [("here:1", "it failed")] * 2


def test_patience_ends() -> None:
    centre = contact(first_s=0, call_s=0.15)
    with pytest.raises(Refusal, match="puhui up") as caught:
        centre.call(failing(LOST))
    assert caught.value.reason == "CENTRE_UNREACHABLE"
    centre.call(failing())
    assert centre.call(failing(LOST)) == "answer"
    with pytest.raises(Refusal, match="it did answer before"):
        centre.call(failing(LOST, LOST, LOST))


def test_after_closing_nothing_is_tried_again() -> None:
    centre = contact()
    centre.call(failing())
    centre.close()
    with pytest.raises(Refusal) as caught:
        centre.call(failing(grpc.StatusCode.CANCELLED))
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert caught.value.reason == "CONNECTION_CLOSED"


def test_who_asks_on_a_closed_connection_is_told_so() -> None:
    """As a thread may that reads on while another closes."""
    centre = Centre("unix:/nowhere/centre.sock")
    centre.close()
    asked: list[Callable[[], object]] = [lambda: centre.get("job-1"), lambda: list(centre.watch("job-1"))]
    for ask in asked:
        with pytest.raises(Refusal) as caught:
            ask()
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.CANCELLED, "CONNECTION_CLOSED")


def test_another_mistake_is_not_taken_for_a_closed_connection() -> None:
    def attempt() -> str:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        contact().call(attempt)


def test_no_answer_in_time_is_not_taken_for_a_failure() -> None:
    with pytest.raises(Refusal, match="not known whether") as caught:
        contact().call(failing(grpc.StatusCode.DEADLINE_EXCEEDED))
    assert caught.value.reason == "CENTRE_TOO_SLOW"


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED])
def test_an_answer_is_an_answer(code: grpc.StatusCode) -> None:
    attempt = failing(code)
    with pytest.raises(Refusal) as caught:
        contact().call(attempt)
    assert caught.value.code is code


def test_a_stream_has_its_patience_anew_after_each_message() -> None:
    tries = iter([["a", "b"], ["c"], ["d"]])

    def attempt() -> Iterator[str]:
        messages = next(tries)
        yield from messages
        if messages != ["d"]:
            raise Failure(LOST)

    assert list(contact(stream_s=0.15).stream(attempt)) == ["a", "b", "c", "d"]
