from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest

from puhui.rpc.channel import open_blocking_channel, open_channel
from puhui.rpc.errors import Refusal


@pytest.mark.parametrize("opened", [open_channel, open_blocking_channel])
@pytest.mark.parametrize("address", ["10.0.0.1:7070", "centre.example:7070", "[2001:db8::1]:7070", "0.0.0.0:7070"])
async def test_nothing_is_said_in_plaintext_to_another_machine(opened: Callable[[str], object], address: str) -> None:
    with pytest.raises(Refusal) as caught:
        opened(address)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PLAINTEXT_REFUSED")
