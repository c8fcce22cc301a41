"""Dry runs: a job's own code on tensors without data, in a container of its image that has no card and no network.

Nothing is asked of the image but a Python with torch: the program that watches comes in the container's environment.
What it finds is written by a stranger's code, and counts for the tenant that sent the code and for that code only.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import grpc
import structlog

from controlplane.node_client import NodeClient
from controlplane.orphans import DRY_RUN_PREFIX
from controlplane.prediction import Code, DryStep, dry_run_program, dry_step_of
from controlplane.records import BundleRecord
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id
from puhui.rpc.moment import duration
from puhui.v1 import card_pb2, node_service_pb2, stream_pb2

__all__ = ["DryRuns", "Sandbox"]

_log = structlog.get_logger(__name__)

_LIMIT_S: Final = 60
_REMOVED_WITHIN_S: Final = 15.0
_AT_ONCE: Final = 2
_REMEMBERED: Final = 256
_MOST_OUTPUT: Final = 1 << 20
#: Kept of the standard output: the finding is its last line.
_TAIL: Final = 1 << 17
_LIMITS: Final = node_service_pb2.ContainerLimits(cpus=1, host_memory_mib=8192, pids=256)
#: The watching program is an archive that Python runs. Environment variables bear 128 KiB each.
_VARIABLE: Final = "PUHUI_DRY_RUN"
_BOOT: Final = f"""\
import base64, os, sys
path = "/tmp/puhui-dry-run.zip"
with open(path, "wb") as file:
    file.write(base64.b64decode(os.environ.pop("{_VARIABLE}")))
os.execv(sys.executable, [sys.executable, "-I", path, "--within", sys.argv[1], "--", *sys.argv[2:]])
"""


class Sandbox(Protocol):
    """A node that runs rootless containers; a `NodeLink` is one."""

    node_id: str

    @property
    def client(self) -> NodeClient:
        """Its daemon."""


@dataclass(frozen=True)
class _Asked:
    tenant: str
    fingerprint: str


class DryRuns:
    """Conducts them: two at a time, one on a node, each for a minute at most; findings are remembered for a while."""

    def __init__(self, centre: str, sandboxes: Callable[[], Iterable[Sandbox]]) -> None:
        """Begins nothing.

        Args:
            centre: its name.
            sandboxes: the nodes in contact that run rootless containers.
        """
        self._centre = centre
        self._sandboxes = sandboxes
        self._found: OrderedDict[_Asked, DryStep | None] = OrderedDict()
        self._going: dict[_Asked, asyncio.Task[None]] = {}
        self._busy: set[str] = set()
        self.living: set[str] = set()
        """Ids of those whose container may be there."""

    def known(self, tenant: str, fingerprint: str) -> DryStep | None:
        """Returns what a dry run of this code has found; None when there was none, or it found nothing."""
        return self._found.get(_Asked(tenant, fingerprint))

    async def of(
        self, tenant: str, fingerprint: str, code: Code, bundle: BundleRecord, archive: Path, within_s: float
    ) -> DryStep | None:
        """Returns what a dry run finds, if it does so in time; it goes on for whoever asks next.

        Args:
            tenant: whose code it is.
            fingerprint: of the code; "" is not dry-run, as nobody could find its result again.
            code: the code.
            bundle: its bundle.
            archive: the bundle's archive, which is there until this returns.
            within_s: longest wait, in seconds.
        """
        asked = _Asked(tenant, fingerprint)
        if asked in self._found or not fingerprint:
            return self._found.get(asked)
        task = self._going.get(asked)
        if task is None:
            free = [one for one in self._sandboxes() if one.node_id not in self._busy]
            if not free or len(self._going) >= _AT_ONCE:
                return None
            self._busy.add(free[0].node_id)
            task = self._going[asked] = asyncio.create_task(self._conduct(asked, free[0], code, bundle, archive))
            task.add_done_callback(lambda _: self._going.pop(asked, None))
        await asyncio.wait({task}, timeout=within_s)
        return self._found.get(asked)

    async def close(self) -> None:
        """Ends what goes on, and removes its containers."""
        tasks = list(self._going.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _conduct(self, asked: _Asked, sandbox: Sandbox, code: Code, bundle: BundleRecord, archive: Path) -> None:
        owner = card_pb2.AttemptRef(
            centre=self._centre, job_id=new_id(DRY_RUN_PREFIX), attempt=1, fencing_token=1
        )  # fmt: skip
        self.living.add(owner.job_id)
        try:
            async with asyncio.timeout(_LIMIT_S + _REMOVED_WITHIN_S):
                header = stream_pb2.BundleHeader(bundle_id=bundle.id, size_bytes=bundle.size_bytes)
                await sandbox.client.put_bundle(header, archive)
                await sandbox.client.create_container(_request(owner, code, bundle.id))
                output = await _output(sandbox.client, owner)
            step, why = dry_step_of(output)
            if step is None:
                _log.info("a dry run found nothing", dry_run=owner.job_id, why=why)
            self._remember(asked, step)
        except (Refusal, TimeoutError, OSError) as error:
            # Of the code it says nothing, so it is tried again when it is asked for again. (An archive that came inside
            # a request may be gone when nobody waits any longer.)
            _log.warning("a dry run did not come to its end", dry_run=owner.job_id, why=str(error))
        finally:
            await asyncio.shield(self._remove(sandbox, owner))

    async def _remove(self, sandbox: Sandbox, owner: card_pb2.AttemptRef) -> None:
        try:
            async with asyncio.timeout(_REMOVED_WITHIN_S):
                await sandbox.client.remove_container(
                    node_service_pb2.RemoveContainerRequest(
                        owner=owner, discard_results=True, request_id=f"{owner.job_id}/remove"
                    )
                )
        except (Refusal, TimeoutError) as error:
            if isinstance(error, Refusal) and error.code is grpc.StatusCode.NOT_FOUND:
                return
            # It goes when the node is next heard of anew: see `orphans`.
            _log.warning("the container of a dry run is left", dry_run=owner.job_id, why=str(error))
        finally:
            self._busy.discard(sandbox.node_id)
            self.living.discard(owner.job_id)

    def _remember(self, asked: _Asked, step: DryStep | None) -> None:
        self._found[asked] = step
        while len(self._found) > _REMEMBERED:
            self._found.popitem(last=False)


def _request(owner: card_pb2.AttemptRef, code: Code, bundle_id: str) -> node_service_pb2.CreateContainerRequest:
    request = node_service_pb2.CreateContainerRequest(
        owner=owner, image=code.image, bundle_id=bundle_id, limits=_LIMITS, network=False,
        command=["python3", "-I", "-c", _BOOT, str(_LIMIT_S), *code.command],
        env={**code.environment, _VARIABLE: base64.b64encode(dry_run_program()).decode()},
        request_id=f"{owner.job_id}/create",
    )  # fmt: skip
    request.max_duration.CopyFrom(duration(_LIMIT_S))
    request.stop_grace.CopyFrom(duration(1))
    return request


async def _output(client: NodeClient, owner: card_pb2.AttemptRef) -> bytes:
    """Returns the end of what it writes to its standard output, when its command has ended."""
    kept, seen = b"", 0
    async with contextlib.aclosing(client.read_logs(owner, 0, 0, True)) as chunks:
        async for chunk in chunks:
            seen += len(chunk.data)
            if chunk.stream == stream_pb2.LOG_STREAM_STDOUT:
                kept = (kept + chunk.data)[-_TAIL:]
            if seen > _MOST_OUTPUT:
                break
    return kept
