"""Real work on a daemon that dies again and again: one attempt after the other, as a control plane carries it out.

Every mutation has a request_id, and is repeated with a growing pause until it is answered.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import grpc

from puhui.rpc.errors import Refusal
from puhui.v1.card_pb2 import AttemptRef, Placement, Slice
from puhui.v1.node_pb2 import Container, NodeEvent
from puhui.v1.node_service_pb2 import (
    AttachSliceRequest,
    CreateContainerRequest,
    CreateSliceRequest,
    CreateSliceResponse,
    DestroySliceRequest,
    DestroySliceResponse,
    DetachSliceRequest,
    ExecRequest,
    ExecStart,
    NodeServiceReadLogsRequest,
    RemoveContainerRequest,
    ResumeContainerRequest,
    SuspendContainerRequest,
)
from tests.chaos.victim import Victim
from tests.chaos.witness import Witness
from tests.integration.node.client import Node

# Writes numbered lines in pieces of any length, and holds the cards that it sees for a while.
_CODE = """
import os, random, sys, time
lines, code, seed = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
chance, here, held = random.Random(seed), os.environ['PUHUI_CAPS'], []
for n in range(lines):
    text = f'{seed} {n} ' + 'x' * chance.randrange(200) + chr(10)
    at = chance.randrange(len(text))
    sys.stdout.write(text[:at])
    sys.stdout.flush()
    sys.stdout.write(text[at:])
    sys.stdout.flush()
    if n == lines // 4:
        for name in os.listdir(here):
            try:
                held.append(open(os.path.join(here, name)))
            except OSError:
                pass  # it comes or goes at this moment
    if n == lines // 2:
        for one in held:
            one.close()
    time.sleep(.02)
sys.exit(code)
"""

_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.5
_CALL_S = 30.0
_PATIENCE_S = 120.0
# What may be otherwise a moment later, and what nobody could reach.
_PASSING = {
    "DRIVER_REFUSED",
    "SLICE_NOT_VERIFIED",
    "SLICE_IN_USE",
    "SLICE_STILL_SEEN",
    "HOLDERS_UNKNOWN",
    "HOTPLUG_UNAVAILABLE",
    "CAP_NODE_MISSING",
    "RUNTIME_UNAVAILABLE",
    "RUNTIME_REFUSED",
    "SUSPEND_STUCK",
    "DAEMON_STOPPING",
}
_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


def written(lines: int, seed: int) -> bytes:
    """Returns what the code writes."""
    chance, text = random.Random(seed), ""
    for n in range(lines):
        line = f"{seed} {n} " + "x" * chance.randrange(200) + "\n"
        chance.randrange(len(line))
        text += line
    return text.encode()


async def _create_slice(request: CreateSliceRequest, node: Node) -> CreateSliceResponse:
    return await node.stub.CreateSlice(request, timeout=_CALL_S)


async def _destroy_slice(request: DestroySliceRequest, node: Node) -> DestroySliceResponse:
    return await node.stub.DestroySlice(request, timeout=_CALL_S)


class Worker:
    """Carries out attempts, one after the other.

    Attributes:
        done: attempts that are finished.
        exempt: what somebody deletes by hand, by UUID of the slice or id of the container: nothing is promised of it.
        slices: what this worker has now.
        container: what this worker has now.
    """

    def __init__(self, victim: Victim, witness: Witness, seed: int) -> None:
        self.done = 0
        self.exempt: set[str] = set()
        self.slices: list[Slice] = []
        self.container: Container | None = None
        self.said: list[str] = []
        self._victim = victim
        self._witness = witness
        self._chance = random.Random(seed)
        self._numbers = 0

    async def work(self, enough: asyncio.Event) -> None:
        """Carries out attempts until there were enough."""
        while not enough.is_set():
            await self._attempt()
            self.done += 1

    async def _attempt(self) -> None:
        owner = (await self._victim.node()).attempt()
        lines, code, seed = self._chance.randint(40, 200), self._chance.randrange(256), self._chance.randrange(10**6)
        first = await self._cut(owner)
        command = ["python3", "main.py", str(lines), str(code), str(seed)]
        bundle_id = await self._repeat(lambda node: node.put_code(_CODE))
        request = CreateContainerRequest(
            owner=owner,
            command=command,
            bundle_id=bundle_id,
            slice_uuids=[first.uuid],
            request_id=self._name(owner, "container"),
        )
        try:
            self.container = (
                await self._repeat(lambda node: node.stub.CreateContainer(request, timeout=_CALL_S))
            ).container
        except Refusal as error:
            # Somebody destroyed its slice by hand before the container was there.
            if error.reason != "SLICE_NOT_FOUND" or first.uuid not in self.exempt:
                raise
            await self._give_back(owner)
            return
        container = self.container
        async with asyncio.TaskGroup() as tasks:
            log = tasks.create_task(self._follow(owner))
            tasks.create_task(self._disturb(owner))
            end = tasks.create_task(self._witness.end(owner))
        self._judge(container, code, written(lines, seed), end.result(), log.result())
        if self._chance.random() < 0.5:
            await self._remove(owner)
            await self._give_back(owner)
        else:
            await self._give_back(owner)
            await self._remove(owner)

    def _judge(self, container: Container, code: int, expected: bytes, end: NodeEvent, log: bytes) -> None:
        if container.id in self.exempt:
            assert expected.startswith(log), "output that nobody wrote"
            return
        assert end.container.id == container.id, (end, container)
        assert end.container.HasField("exit_code"), end
        assert end.container.exit_code == code, end
        assert log == expected, f"{len(log)} bytes instead of {len(expected)}"

    # Parts of an attempt ----------------------------------------------------------------------------------

    async def _cut(self, owner: AttemptRef) -> Slice:
        """Cuts a slice somewhere; another place when one is taken."""
        while True:
            inventory = await self._repeat(lambda node: node.inventory())
            gpu = self._chance.choice([one for one in inventory.gpus if one.profiles])
            profile = self._chance.choice(
                [one for one in gpu.profiles if one.name in ("1g.10gb", "2g.20gb", "1g.20gb")]
            )
            place = self._chance.choice(profile.placements)
            request = CreateSliceRequest(
                owner=owner,
                gpu_uuid=gpu.uuid,
                profile=profile.name,
                placement=Placement(start=place.start, size=place.size),
                request_id=self._name(owner, "slice"),
            )
            try:
                answer = await self._repeat(partial(_create_slice, request))
            except Refusal as error:
                if error.reason != "PLACEMENT_TAKEN":
                    raise
                await asyncio.sleep(_FIRST_PAUSE_S)
                continue
            made: Slice = answer.slice
            self.slices.append(made)
            return made

    async def _disturb(self, owner: AttemptRef) -> None:
        """Does to a container, while it runs, what may be done to it."""
        deeds: list[Callable[[AttemptRef], Awaitable[None]]] = [self._exec, self._suspend, self._plug]
        self._chance.shuffle(deeds)
        for deed in deeds[: self._chance.randint(1, 3)]:
            try:
                await deed(owner)
            except Refusal as error:
                if error.reason in ("CONTAINER_NOT_RUNNING", "CONTAINER_NOT_FOUND"):
                    # It ended meanwhile, or somebody removed it. The daemon may learn that a moment later than Podman
                    # told us: a container that was frozen is still called suspended until then.
                    return
                if not (error.reason == "SLICE_NOT_FOUND" and self._robbed()):
                    raise

    def _robbed(self) -> bool:
        return any(one.uuid in self.exempt for one in self.slices)

    async def _exec(self, owner: AttemptRef) -> None:
        number = self._chance.randrange(256)
        start = ExecStart(
            owner=owner,
            command=["sh", "-c", f"for n in 1 2 3 4 5; do echo $n; sleep .02; done; exit {number}"],
            request_id=self._name(owner, "exec"),
        )
        output = b""

        async def call(node: Node) -> int:
            nonlocal output
            again = ExecStart(output_offset=len(output))
            again.MergeFrom(start)

            async def parts() -> AsyncIterator[ExecRequest]:
                yield ExecRequest(start=again)

            async for response in node.stub.Exec(parts(), timeout=_CALL_S):
                if response.WhichOneof("part") == "exit_code":
                    return response.exit_code
                assert response.output.offset == len(output), (response, output)
                output += response.output.data
            raise AssertionError("an exec ended without an exit code")

        try:
            code = await self._repeat(call)
        except Refusal as error:
            if error.reason == "EXEC_LOST" and self.container is not None and self.container.id in self.exempt:
                return
            raise
        if (code, output) != (number, b"1\n2\n3\n4\n5\n"):
            # The container ended first, and its commands with it.
            assert code == 137, (code, number, output)
            assert b"1\n2\n3\n4\n5\n".startswith(output), output
            async with asyncio.timeout(_PATIENCE_S):
                await self._witness.end(owner)

    async def _suspend(self, owner: AttemptRef) -> None:
        freeze = SuspendContainerRequest(owner=owner, request_id=self._name(owner, "suspend"))
        await self._repeat(lambda node: node.stub.SuspendContainer(freeze, timeout=_CALL_S))
        await asyncio.sleep(self._chance.random() * 0.5)
        thaw = ResumeContainerRequest(owner=owner, request_id=self._name(owner, "resume"))
        await self._repeat(lambda node: node.stub.ResumeContainer(thaw, timeout=_CALL_S))

    async def _plug(self, owner: AttemptRef) -> None:
        one = await self._cut(owner)
        attach = AttachSliceRequest(owner=owner, slice_uuid=one.uuid, request_id=self._name(owner, "attach"))
        answer = await self._repeat(lambda node: node.stub.AttachSlice(attach, timeout=_CALL_S))
        assert one.uuid in answer.container.slice_uuids, answer
        await asyncio.sleep(self._chance.random() * 0.3)
        detach = DetachSliceRequest(owner=owner, slice_uuid=one.uuid, request_id=self._name(owner, "detach"))
        answer = await self._repeat(lambda node: node.stub.DetachSlice(detach, timeout=_CALL_S))
        assert one.uuid not in answer.container.slice_uuids, answer

    async def _follow(self, owner: AttemptRef) -> bytes:
        """Reads the log to its end, from where it was left whenever the daemon is gone."""
        output = b""

        async def read(node: Node) -> None:
            nonlocal output
            request = NodeServiceReadLogsRequest(owner=owner, offset=len(output), follow=True)
            async for response in node.stub.ReadLogs(request, timeout=_CALL_S):
                assert response.chunk.offset == len(output), (response.chunk.offset, len(output))
                output += response.chunk.data

        await self._repeat(read)
        return output

    async def _remove(self, owner: AttemptRef) -> None:
        request = RemoveContainerRequest(owner=owner, discard_results=True, request_id=self._name(owner, "remove"))
        await self._repeat(lambda node: node.stub.RemoveContainer(request, timeout=_CALL_S))
        self.container = None

    async def _give_back(self, owner: AttemptRef) -> None:
        while self.slices:
            one = self.slices[-1]
            request = DestroySliceRequest(
                owner=owner, slice_uuid=one.uuid, request_id=self._name(owner, f"destroy-{len(self.slices)}")
            )
            await self._repeat(partial(_destroy_slice, request))
            self.slices.pop()

    # Asking -----------------------------------------------------------------------------------------------

    async def _repeat(self, call: Callable[[Node], Awaitable[Any]]) -> Any:
        """Asks again and again until there is an answer, and returns it.

        Raises:
            Refusal: an answer that would be the same the next time.
        """
        pause = _FIRST_PAUSE_S
        self.said = []
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                node = await self._victim.node()
                try:
                    return await call(node)
                except grpc.aio.AioRpcError as error:
                    refusal = Refusal.of(error)
                    if refusal.code not in _UNREACHABLE and refusal.reason not in _PASSING:
                        raise refusal from error
                    self.said.append(f"{refusal.reason} {refusal.message}")
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)

    def _name(self, owner: AttemptRef, what: str) -> str:
        self._numbers += 1
        return f"{owner.job_id}/{what}-{self._numbers}"
