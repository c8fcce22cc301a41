"""A slice changes hands while nobody sees or holds it, and never otherwise."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from puhui.v1.card_pb2 import AttemptRef, Slice
from puhui.v1.node_pb2 import NodeEventKind
from puhui.v1.node_service_pb2 import TransferSliceRequest
from tests.integration.node.client import Node, refused

pytestmark = pytest.mark.podman

_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_HOLD = """
import glob, os, sys
os.open(max(glob.glob('/dev/nvidia-caps/*')), os.O_RDONLY)
print('holding', flush=True)
sys.stdin.read()
import time; time.sleep(600)
"""


async def _transfer(node: Node, owner: AttemptRef, one: Slice, heir: AttemptRef, request_id: str = "") -> Slice:
    request = TransferSliceRequest(owner=owner, slice_uuid=one.uuid, new_owner=heir, request_id=request_id)
    return (await node.stub.TransferSlice(request, timeout=30)).slice


async def test_a_warm_slice_goes_to_another_attempt_which_uses_it(node: Node) -> None:
    owner, heir = node.attempt(token=3), node.attempt(token=5)
    one = await node.cut(owner)
    for _ in range(2):  # a repeated request is answered as before, by its id and without
        given = await _transfer(node, owner, one, heir, "r-1")
        assert (given.uuid, given.owner) == (one.uuid, heir)
    assert (await _transfer(node, owner, one, heir)).owner == heir
    event = await node.event(heir, NodeEventKind.NODE_EVENT_KIND_SLICE_TRANSFERRED)
    assert (event.reason, event.slice.owner, event.owner) == ("SLICE_TRANSFERRED", heir, heir)
    with refused(grpc.StatusCode.NOT_FOUND, "SLICE_NOT_FOUND"):
        await node.destroy(owner, one)
    await node.start(heir, "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])", slices=[given])
    await node.exited(heir)
    assert await node.log(heir) == f"{one.uuid}\n".encode()
    # Its first owner is not told any more that it has it.
    with refused(_PRECONDITION, "PLACEMENT_TAKEN"):
        await node.cut(owner)


async def test_what_is_seen_or_held_is_not_transferred_and_who_has_it_is_named(node: Node) -> None:
    owner, heir = node.attempt(), node.attempt()
    one = await node.cut(owner)
    container = await node.start(owner, _HOLD, slices=[one])
    await node.said(owner, b"holding\n")
    with refused(_PRECONDITION, "SLICE_IN_USE") as refusal:
        await _transfer(node, owner, one, heir)
    assert container.id[:12] in refusal.message
    await node.stop(owner, 0)
    assert (await _transfer(node, owner, one, heir)).owner == heir


async def test_tokens_of_both_attempts_and_the_centre_are_looked_at(node: Node) -> None:
    owner, heir = node.attempt(token=3), node.attempt(token=5)
    one = await node.cut(owner)
    await node.cut(heir, start=1)
    low = AttemptRef()
    low.CopyFrom(owner)
    low.fencing_token = 2
    with refused(_PRECONDITION, "STALE_FENCING_TOKEN"):
        await _transfer(node, low, one, heir)
    low.CopyFrom(heir)
    low.fencing_token = 4
    with refused(_PRECONDITION, "STALE_FENCING_TOKEN"):
        await _transfer(node, owner, one, low)
    with refused(_INVALID, "OWNER_INVALID"):
        await _transfer(node, owner, one, AttemptRef(centre="elsewhere", job_id="j-1", attempt=1))
    with refused(_INVALID, "OWNER_INVALID") as refusal:
        await _transfer(node, owner, one, AttemptRef())
    assert "new_owner.centre" in refusal.message
    with refused(_PRECONDITION, "SLICE_NOT_FOUND"):
        await _transfer(node, heir, one, node.attempt())
    with refused(_PRECONDITION, "SLICE_NOT_FOUND"):
        await _transfer(node, owner, Slice(uuid="MIG-none"), heir)


async def test_attempts_that_give_to_each_other_do_not_wait_for_each_other(node: Node) -> None:
    first, second = node.attempt(), node.attempt()
    mine, yours = await node.cut(first), await node.cut(second, start=1)
    given = await asyncio.gather(
        *(_transfer(node, first, mine, second) for _ in range(5)),
        *(_transfer(node, second, yours, first) for _ in range(5)),
    )
    assert [one.owner for one in given] == [second] * 5 + [first] * 5
