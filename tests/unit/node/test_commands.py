"""What nobody could run is refused before anything is made, naming the field."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from nodedaemon.commands import is_image_name
from nodedaemon.container_request import require_sound
from nodedaemon.exec_request import require_sound_start
from puhui.rpc.errors import Refusal
from puhui.v1.node_service_pb2 import ContainerLimits, CreateContainerRequest, ExecStart

_LONG = "x" * 2**16


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("command", CreateContainerRequest()),
        ("command", CreateContainerRequest(command=["a", "b\0"])),
        ("command", CreateContainerRequest(command=["a", _LONG, _LONG])),
        ("env", CreateContainerRequest(command=["a"], env={"": "1"})),
        ("env", CreateContainerRequest(command=["a"], env={"A=B": "1"})),
        ("env", CreateContainerRequest(command=["a"], env={"1A": "1"})),
        ("env", CreateContainerRequest(command=["a"], env={"A B": "1"})),
        ("env", CreateContainerRequest(command=["a"], env={"A\n": "1"})),
        ("env", CreateContainerRequest(command=["a"], env={"A": "\0"})),
        ("env", CreateContainerRequest(command=["a"], env={"A": _LONG, "B": _LONG})),
        ("image", CreateContainerRequest(command=["a"], image="Not An Image")),
        ("image", CreateContainerRequest(command=["a"], image="-rf")),
        ("limits.cpus", CreateContainerRequest(command=["a"], limits=ContainerLimits(cpus=float("nan")))),
        ("limits.cpus", CreateContainerRequest(command=["a"], limits=ContainerLimits(cpus=-1))),
        ("max_duration", CreateContainerRequest(command=["a"], max_duration=Duration())),
        ("max_duration", CreateContainerRequest(command=["a"], max_duration=Duration(seconds=1, nanos=2**31 - 1))),
        ("max_duration", CreateContainerRequest(command=["a"], max_duration=Duration(seconds=2**62))),
        ("stop_grace", CreateContainerRequest(command=["a"], stop_grace=Duration(seconds=-1))),
        ("stop_grace", CreateContainerRequest(command=["a"], stop_grace=Duration(nanos=-1))),
    ],
    ids=str,
)
def test_a_container_that_cannot_be_is_refused(field: str, request_: CreateContainerRequest) -> None:
    with pytest.raises(Refusal) as caught:
        require_sound(request_)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID")
    assert caught.value.metadata["field"] == field
    assert caught.value.message.startswith(field)


@pytest.mark.parametrize(
    ("field", "start"),
    [
        ("command", ExecStart(command=["a", _LONG, _LONG])),
        ("env", ExecStart(command=["a"], env={"A B": "1"})),
    ],
    ids=["command", "env"],
)
def test_a_command_that_cannot_be_is_refused(field: str, start: ExecStart) -> None:
    with pytest.raises(Refusal) as caught:
        require_sound_start(start)
    assert (caught.value.reason, caught.value.metadata["field"]) == ("SPEC_INVALID", field)


def test_what_can_be_is_let_through() -> None:
    require_sound(CreateContainerRequest(command=["a", ""], env={"_A.b-1": "x=y\n"}, stop_grace=Duration()))


@pytest.mark.parametrize(
    ("image", "good"),
    [
        ("puhui-base", True),
        ("localhost/puhui-base:latest", True),
        ("registry.example.com:5000/Team/x", False),
        ("registry.example.com:5000/team/x__y.z:V1.2_a@sha256:" + "0" * 64, True),
        ("LOCALHOST/x", True),
        ("0123456789ab", True),
        ("sha256:" + "0" * 64, True),
        ("", False),
        ("a//b", False),
        ("a:", False),
        ("../a", False),
        ("a b", False),
        ("http://a/b", False),
        ("a" * 600, False),
    ],
)
def test_image_names(image: str, good: bool) -> None:
    assert is_image_name(image) is good
