"""Containers that begin without code and without a slice: a session, say, which gets one when it runs something."""

from __future__ import annotations

import pytest

from tests.integration.node.client import Node
from tests.integration.node.exec_call import run

pytestmark = pytest.mark.podman


async def test_a_session_begins_with_nothing_and_is_given_slices_of_any_gpu(node: Node) -> None:
    owner = node.attempt()
    container = await node.start(owner, bare=True, command=["sleep", "600"])
    assert list(container.slice_uuids) == []
    look = "pwd; ls -A; ls /dev/nvidia-caps | wc -l; echo $CUDA_VISIBLE_DEVICES; touch x 2>/dev/null || echo shut"
    output = (await run(node, owner, "sh", "-c", look)).output
    assert output == b"/workspace/code\n0\n\nshut\n"
    for gpu, profile in ((0, "1g.10gb"), (1, "1g.10gb")):
        one = await node.cut(owner, profile, gpu=gpu, name=f"on {gpu}")
        await node.attach(owner, one)
        output = (await run(node, owner, "sh", "-c", "ls /dev/nvidia-caps | wc -l; echo $CUDA_VISIBLE_DEVICES")).output
        assert output == f"2\n{one.uuid}\n".encode()
        await node.detach(owner, one)
    (after,) = await node.containers()
    assert (after.id, after.pid) == (container.id, container.pid)
