"""Runs containers with rootless Podman, through podman-py.

podman-py's own create() inspects the container again, and its wait() asks four times a second. Both are avoided by
speaking the libpod API through podman-py's client: a container's way from nothing to running is two requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import grpc
import structlog
from podman.api.client import APIClient

from nodedaemon.cgroups import ContainerCgroup
from nodedaemon.commands import SEARCH_PATH, Found, candidates
from nodedaemon.exec_process import ExecProcess
from nodedaemon.frozen import continue_all, processes_in_namespace, stop_all
from nodedaemon.podman_account import PodmanAccount, PodmanUnusableError
from nodedaemon.podman_events import container_events
from nodedaemon.podman_exec import ContainerPlace, PodmanExecs
from nodedaemon.podman_leftovers import end_leftovers
from nodedaemon.podman_service import API_VERSION, PodmanService
from nodedaemon.podman_spec import enforced_limits, spec_generator
from nodedaemon.runtime import (
    ContainerExit,
    ContainerGone,
    ContainerPhase,
    ContainerSpec,
    ContainerStatus,
    ExecSpec,
)
from puhui.rpc.errors import Refusal
from puhui.v1.node_pb2 import Runtime, RuntimeKind

__all__ = ["PodmanRuntime"]

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")

_PHASES = {
    "created": ContainerPhase.CREATED,
    "configured": ContainerPhase.CREATED,
    "initialized": ContainerPhase.CREATED,
    "running": ContainerPhase.RUNNING,
    "paused": ContainerPhase.SUSPENDED,
    "stopping": ContainerPhase.RUNNING,
}
_REQUEST_S = 120.0
_KILLED = 137
_NO_IMAGE = "image not known"
_NOT_RUNNING = "container state improper"


class PodmanRuntime:
    """Rootless Podman. It sees only the containers of one daemon.

    Use `open` to get one.
    """

    def __init__(
        self,
        account: PodmanAccount,
        service: PodmanService,
        node_id: str,
        info: dict[str, Any],
        cgroup: ContainerCgroup,
    ) -> None:
        self._account = account
        self._service = service
        self._node_id = node_id
        self._info = info
        self._cgroup = cgroup
        self._limits = enforced_limits(cgroup.controllers)
        self._network_problem = account.network_problem()
        self._threads = ThreadPoolExecutor(16, thread_name_prefix="podman")
        self._local = threading.local()
        self._known_commands: set[tuple[str, str, str]] = set()
        self._execs = PodmanExecs(account, str(info["host"]["conmon"]["path"]), str(info["host"]["ociRuntime"]["path"]))
        self._places: dict[str, ContainerPlace] = {}

    @classmethod
    async def open(cls, account: PodmanAccount, node_id: str, cgroup: ContainerCgroup) -> PodmanRuntime:
        """Starts the service and asks it what this host can do.

        Args:
            account: the user that owns the containers.
            node_id: label of this daemon's containers.
            cgroup: what containers get of this process's cgroup.

        Raises:
            PodmanUnusableError: containers cannot be run here; the text says why.
        """
        service = PodmanService(account, node_id)
        await service.start()
        try:
            client = APIClient(service.url, version=API_VERSION, timeout=_REQUEST_S)
            try:
                info = (await asyncio.to_thread(client.get, "/info")).json()
            finally:
                client.close()
            driver = info["store"]["graphDriverName"]
            if driver == "vfs":
                raise PodmanUnusableError(
                    f"the storage in {account.home} has the driver vfs, which copies every image for every container, "
                    "and it cannot be changed: remove that directory, and import the images again"
                )
        except BaseException:
            await service.stop()
            raise
        return cls(account, service, node_id, info, cgroup)

    async def create(self, spec: ContainerSpec) -> str:  # noqa: D102 - see ContainerRuntime
        if spec.network and self._network_problem:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "NETWORK_UNAVAILABLE",
                f"containers on this node cannot have a network: {self._network_problem}, and restart the daemon",
            )
        told = json.dumps(spec_generator(spec, self._node_id, self._limits, self._cgroup.parent))
        answer = await self._call("POST", "/containers/create", data=told)
        # Older services answer 500 and only say in words that it is the image that is missing.
        if answer.status_code == 404 or (answer.status_code == 500 and _NO_IMAGE in answer.text):
            raise _image_not_found(spec.image)
        container_id = str(_json(answer, "create the container")["Id"])
        try:
            await self._require_command(container_id, spec)
        except BaseException:
            await self.remove(container_id)
            raise
        return container_id

    async def _require_command(self, container_id: str, spec: ContainerSpec) -> None:
        """Refuses a command that is not there: the init process in a container would only notice later."""
        command = spec.command[0]
        image, image_path = await self._image(spec.image)
        search_path = spec.env.get("PATH") or image_path
        where = candidates(command, search_path, spec.code)
        if isinstance(where, Found):
            if where.problem:
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "COMMAND_NOT_FOUND", where.problem, command=command)
            return
        key = (image, command, search_path)
        if key in self._known_commands:
            return
        for path in where:
            answer = await self._call("HEAD", f"/containers/{container_id}/archive", params={"path": path})
            if answer.status_code == 200:
                self._known_commands.add(key)
                return
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "COMMAND_NOT_FOUND",
            f"image {spec.image} has no {command!r}; name a program that it has, or a file of the code as ./NAME",
            command=command,
            image=spec.image,
        )

    async def _image(self, image: str) -> tuple[str, str]:
        """Returns an image's id, and the PATH that it gives its containers."""
        answer = await self._call("GET", f"/images/{image}/json")
        if answer.status_code == 404:
            raise _image_not_found(image)
        facts = _json(answer, "look at the image")
        env = dict(entry.split("=", 1) for entry in facts.get("Config", {}).get("Env") or [] if "=" in entry)
        return str(facts["Id"]), env.get("PATH") or SEARCH_PATH

    async def initialize(self, container_id: str) -> int:  # noqa: D102
        answer = await self._call("POST", f"/containers/{container_id}/init")
        if answer.status_code not in (204, 304):
            raise _refused("initialize the container", answer)
        return (await self._place(container_id)).init

    async def start(self, container_id: str) -> ContainerStatus:  # noqa: D102
        answer = await self._call("POST", f"/containers/{container_id}/start")
        if answer.status_code not in (204, 304):
            raise _refused("start the container", answer)
        found = await self._list({"id": [container_id]})
        if not found:
            raise Refusal(
                grpc.StatusCode.INTERNAL, "RUNTIME_REFUSED", "the container vanished as it was started; submit again"
            )
        return found[0]

    async def signal(self, container_id: str, signal: int) -> None:  # noqa: D102
        answer = await self._call("POST", f"/containers/{container_id}/kill", params={"signal": str(signal)})
        # 404: it is gone. 409, or 500 from older services: its command has ended.
        if answer.status_code not in (204, 404, 409) and _NOT_RUNNING not in answer.text:
            raise _refused("signal the container", answer)

    async def start_exec(self, container_id: str, spec: ExecSpec) -> ExecProcess | None:  # noqa: D102
        return await self._execs.start(await self._place(container_id), spec)

    async def _place(self, container_id: str) -> ContainerPlace:
        """Returns where a living container is, which does not change while it lives."""
        known = self._places.get(container_id)
        if known is not None:
            return known
        facts = _json(await self._call("GET", f"/containers/{container_id}/json"), "look at the container")
        if not facts["State"].get("Pid"):
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING", "the container has ended; start another"
            )
        told = await asyncio.to_thread(Path(facts["OCIConfigPath"]).read_text)
        place = self._places[container_id] = ContainerPlace(
            id=container_id,
            init=int(facts["State"]["Pid"]),
            conmon=int(facts["State"]["ConmonPid"]),
            process=json.loads(told)["process"],
        )
        return place

    async def suspend(self, container_id: str) -> None:  # noqa: D102
        # One that an earlier daemon made may have no cgroup of its own, and then Podman refuses.
        if self._cgroup.freezer and await self._pause(container_id):
            return
        place = await self._place(container_id)
        await stop_all(functools.partial(processes_in_namespace, place.init))

    async def resume(self, container_id: str) -> None:  # noqa: D102
        if self._account.layout == "v2":
            answer = await self._call("POST", f"/containers/{container_id}/unpause")
            if answer.status_code in (200, 204):
                return
            # It has ended, or signals have stopped it.
            if answer.status_code != 409 and _NOT_RUNNING not in answer.text:
                raise _refused("unpause the container", answer)
        place = await self._place(container_id)
        continue_all(await asyncio.to_thread(processes_in_namespace, place.init))

    async def _pause(self, container_id: str) -> bool:
        """Has Podman freeze a container. Returns whether it is frozen, or has nothing left to freeze."""
        answer = await self._call("POST", f"/containers/{container_id}/pause")
        # 409, or 500 from older services: it is frozen already, or has ended.
        if answer.status_code in (200, 204, 409) or _NOT_RUNNING in answer.text:
            return True
        _log.warning("podman does not freeze a container; signals do", container=container_id, said=answer.text[:500])
        return False

    async def remove(self, container_id: str) -> None:  # noqa: D102
        self._places.pop(container_id, None)
        answer = await self._call(
            "DELETE", f"/containers/{container_id}", params={"force": "true", "timeout": "0", "v": "true"}
        )
        if answer.status_code not in (200, 204, 404):
            raise _refused("remove the container", answer)
        oci_runtime = str(self._info["host"]["ociRuntime"]["path"])
        await asyncio.to_thread(end_leftovers, self._account, oci_runtime, container_id)

    async def containers(self) -> list[ContainerStatus]:  # noqa: D102
        # A list does not say that memory was why.
        return [
            replace(found, oom_killed=await self._was_out_of_memory(found.id)) if found.exit_code == _KILLED else found
            for found in await self._list({})
        ]

    async def _list(self, filters: dict[str, list[str]]) -> list[ContainerStatus]:
        filters = {**filters, "label": [f"puhui.node={self._node_id}"]}
        answer = await self._call("GET", "/containers/json", params={"all": "true", "filters": json.dumps(filters)})
        return [_status(entry) for entry in _json(answer, "list the containers") or []]

    async def exits(self) -> AsyncIterator[ContainerExit | ContainerGone | None]:  # noqa: D102
        while True:
            # Whoever reads must look for what happened while nobody listened.
            yield None
            with contextlib.suppress(Refusal):
                async for event in container_events(self._service.url, self._node_id):
                    container_id = str(event["Actor"]["ID"])
                    if event["Action"] == "remove":
                        yield ContainerGone(container_id)
                        continue
                    attributes = event.get("Actor", {}).get("Attributes", {})
                    code = int(attributes.get("containerExitCode", -1))
                    killed = code == _KILLED and await self._was_out_of_memory(container_id)
                    yield ContainerExit(container_id, code, killed, event["timeNano"] / 1e9)
            await asyncio.sleep(0.2)

    async def _was_out_of_memory(self, container_id: str) -> bool:
        answer = await self._call("GET", f"/containers/{container_id}/json")
        return answer.status_code == 200 and bool(answer.json().get("State", {}).get("OOMKilled"))

    async def make_removable(self, folder: Path) -> None:  # noqa: D102
        script = 'chown -R 0:0 "$1" && chmod -R u+rwX "$1"'
        done = await asyncio.to_thread(
            self._account.run, "podman", "unshare", "sh", "-c", script, "sh", str(folder), timeout_s=_REQUEST_S
        )
        if done.returncode != 0:
            raise Refusal(
                grpc.StatusCode.INTERNAL,
                "WORKSPACE_STUCK",
                f"what the container left in {folder} cannot be made readable: {done.stderr.strip()[-300:]}",
            )

    def describe(self) -> Runtime:  # noqa: D102
        host = self._info["host"]
        notices = list(self._account.notices)
        missing = [name for name in ("cpus", "host_memory", "pids") if name not in self._limits]
        if missing:
            notices.append(f"limits on {', '.join(missing)} cannot be enforced: {self._cgroup.no_limits}")
        if not self._cgroup.freezer:
            notices.append(
                f"containers are suspended by SIGSTOP to each of their processes, because {self._cgroup.no_freezer}"
            )
        if self._network_problem:
            notices.append(f"containers cannot have a network: {self._network_problem}")
        return Runtime(
            kind=RuntimeKind.RUNTIME_KIND_PODMAN,
            version=str(self._info["version"]["Version"]),
            oci_runtime=str(host["ociRuntime"]["name"]),
            storage_driver=str(self._info["store"]["graphDriverName"]),
            cgroup_layout=self._account.layout,
            enforced_limits=self._limits,
            user=self._account.name,
            notices=notices,
        )

    async def close(self) -> None:  # noqa: D102
        await self._service.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _call(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            return await self._on_thread(functools.partial(self._request, method, path, **arguments))
        except OSError as error:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                "RUNTIME_UNAVAILABLE",
                f"podman does not answer on this node ({type(error).__name__}); it is being started again",
                retry_after_s=1,
            ) from error

    def _request(self, method: str, path: str, **arguments: Any) -> Any:
        # One client per thread: a requests session is not meant to be shared.
        client = getattr(self._local, "client", None)
        if client is None:
            client = self._local.client = APIClient(self._service.url, version=API_VERSION, timeout=_REQUEST_S)
        if "data" in arguments:
            arguments["headers"] = {"content-type": "application/json"}
        return getattr(client, method.lower())(path, **arguments)

    async def _on_thread(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _status(entry: dict[str, Any]) -> ContainerStatus:
    state = str(entry["State"])
    phase = _PHASES.get(state, ContainerPhase.EXITED)
    ended = phase is ContainerPhase.EXITED
    return ContainerStatus(
        id=str(entry["Id"]),
        labels=entry.get("Labels") or {},
        phase=phase,
        pid=int(entry.get("Pid") or 0) if not ended else 0,
        exit_code=int(entry["ExitCode"]) if ended else None,
        start_time=_seconds(entry.get("StartedAt")),
        end_time=_seconds(entry.get("ExitedAt")) if ended else None,
    )


def _seconds(value: Any) -> float | None:
    """Reads a time: Podman gives seconds in some fields and text in others, and year 1 for never."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = datetime.fromisoformat(value).timestamp()
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _image_not_found(image: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "IMAGE_NOT_FOUND",
        f"this node does not have the image {image}; get it with `puhui-nodedaemon podman -- pull {image}`",
        image=image,
    )


def _json(answer: Any, what: str) -> Any:
    if answer.status_code >= 400:
        raise _refused(what, answer)
    return answer.json()


def _refused(what: str, answer: Any) -> Refusal:
    try:
        said = str(answer.json().get("message", answer.text))
    except ValueError:
        said = str(answer.text)
    return Refusal(
        grpc.StatusCode.INTERNAL,
        "RUNTIME_REFUSED",
        f"podman refused to {what}: {said[:500]}",
        status=str(answer.status_code),
    )
