"""Hot-plug for rootless containers: cap nodes are mounted into a running container, and unmounted again.

A container has a directory of the host, read-only, at /dev/nvidia-caps. A node is hung on an empty file of it by
`nodedaemon.hotplug_mounter`, inside the container's own mount namespace, with the rights of the user that owns the
containers. Removing the file on the host takes the node away. Nothing is mounted on the host, nothing is shared with
it, and nothing is left when the container is gone, however it goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import grpc
import structlog

from nodedaemon import hotplug_mounter
from nodedaemon.checkpoint import Process
from nodedaemon.devices import CAPS_PATH
from nodedaemon.runtime import Mount
from puhui.rpc.errors import Refusal

__all__ = ["MountPlug"]

_log = structlog.get_logger(__name__)

_ANSWER_S = 20.0
_MOST_NAMED = 5


class MountPlug:
    """Mounts cap nodes into running containers.

    Args:
        uid: user that owns the containers.
        gid: that user's group.
        device: whether the nodes are devices; emulated ones are plain files.
    """

    def __init__(self, uid: int, gid: int, *, device: bool) -> None:
        self._uid = uid
        self._gid = gid
        self._device = device
        self._mounter: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    def place(self, folder: Path) -> str:  # noqa: D102 - see HotPlug
        return CAPS_PATH

    async def prepare(self, folder: Path, nodes: Mapping[str, Path]) -> list[Mount]:  # noqa: D102
        await asyncio.to_thread(_make_files, folder, nodes)
        hung = [Mount(source, f"{CAPS_PATH}/{name}", device=self._device) for name, source in nodes.items()]
        return [Mount(folder, CAPS_PATH), *hung]

    async def show(self, folder: Path, nodes: Mapping[str, Path], pid: int) -> bool:  # noqa: D102
        changed = await asyncio.to_thread(_make_files, folder, nodes)
        answer = await self._ask(
            {
                "do": "show",
                "pid": pid,
                "folder": str(folder),
                "target": CAPS_PATH,
                "nodes": {name: str(source) for name, source in nodes.items()},
            }
        )
        return changed or bool(answer["changed"])

    async def holders(self, pid: int, files: Collection[Path]) -> list[int]:  # noqa: D102
        answer = await self._ask({"do": "holders", "pid": pid, "files": [str(file) for file in files]})
        unknown = answer["unknown"]
        if unknown and not answer["holders"]:
            some = ", ".join(str(pid) for pid in unknown[:_MOST_NAMED])
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "HOLDERS_UNKNOWN",
                f"what process {some} of the container has open cannot be seen, so it may hold the slice; end it, or "
                "stop the container",
                pids=some,
            )
        return [int(pid) for pid in answer["holders"]]

    async def signal(self, pid: int, number: int, processes: Collection[Process] | None) -> list[int]:  # noqa: D102
        whom = [[one.pid, one.started] for one in processes] if processes is not None else None
        answer = await self._ask({"do": "signal", "pid": pid, "signal": number, "processes": whom})
        return [int(one) for one in answer["signalled"]]

    async def _ask(self, request: dict[str, object]) -> dict[str, Any]:
        line = json.dumps(request).encode() + b"\n"
        async with self._turn:
            answer = await self._exchange(line)
            if answer is None:
                # It was killed. Requests may be repeated.
                answer = await self._exchange(line)
        if answer is None:
            raise _unavailable("the process that does it ended twice; see the daemon's log")
        if "error" not in answer:
            return answer
        if answer["errno"] == errno.ESRCH:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "CONTAINER_NOT_RUNNING",
                f"the container's command has just ended: cannot {answer['step']}: {answer['error']}",
            )
        if answer["errno"] == errno.ENOSYS:
            raise _unavailable("this kernel cannot do it: use Linux 5.12 or later")
        raise _unavailable(f"cannot {answer['step']}: {answer['error']}")

    async def _exchange(self, line: bytes) -> dict[str, Any] | None:
        """Returns the answer to one request; None when the mounter ended over it."""
        mounter = self._mounter
        if mounter is None or mounter.returncode is not None:
            mounter = self._mounter = await self._launch()
        assert mounter.stdin is not None  # noqa: S101 - both are pipes
        assert mounter.stdout is not None  # noqa: S101
        answered = False
        try:
            async with asyncio.timeout(_ANSWER_S):
                mounter.stdin.write(line)
                await mounter.stdin.drain()
                said = await mounter.stdout.readline()
            answered = said.endswith(b"\n")
        except (BrokenPipeError, ConnectionResetError):
            return None
        except TimeoutError as error:
            raise _unavailable(f"the kernel has not done it within {_ANSWER_S:g} s; see `dmesg`") from error
        finally:
            if not answered:
                # What it says next would be taken for the answer to another request.
                await self._end(mounter)
        answer: dict[str, Any] | None = json.loads(said) if answered else None
        return answer

    async def _launch(self) -> asyncio.subprocess.Process:
        try:
            mounter = await asyncio.create_subprocess_exec(
                # By its file and without site packages: it starts in a few milliseconds.
                *(sys.executable, "-I", "-S", hotplug_mounter.__file__, str(self._uid), str(self._gid)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise _unavailable(f"the process that does it cannot be started: {error.strerror}") from error
        _log.debug("mounter runs", pid=mounter.pid)
        return mounter

    async def _end(self, mounter: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            mounter.kill()
        await mounter.wait()
        _log.warning("mounter ended", pid=mounter.pid, code=mounter.returncode)

    async def close(self) -> None:  # noqa: D102
        mounter, self._mounter = self._mounter, None
        if mounter is not None and mounter.stdin is not None:
            mounter.stdin.close()
            await mounter.wait()


def _make_files(folder: Path, nodes: Mapping[str, Path]) -> bool:
    """Makes a directory hold one file for each node and no other, and says whether anything had to be changed.

    Whatever is mounted on a file that goes is unmounted by the kernel, in every namespace. The files are closed to
    all: whoever is quicker than the mount finds nothing to open.
    """
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)  # the umask is the operator's; the containers' user must get in
    present = {entry.name for entry in folder.iterdir()}
    for name in present - nodes.keys():
        (folder / name).unlink()
    for name in nodes.keys() - present:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0))
    return present != set(nodes)


def _unavailable(why: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "HOTPLUG_UNAVAILABLE",
        f"slices cannot be changed in this running container: {why}; stop it and create it anew with its slices, and "
        "let the operator run `puhui-nodedaemon doctor`",
    )
