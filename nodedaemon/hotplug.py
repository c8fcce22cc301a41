"""Hot-plug: slices appear in a living container, and vanish from it, while its command runs.

A process may use a slice when it can open the slice's cap nodes. Every container has a directory of its own for them
from its beginning, so that a slice can come at any time; `HotPlug` says what is in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from nodedaemon.checkpoint import Process
from nodedaemon.frozen import processes_in_sessions
from nodedaemon.hotplug_mounter import catches, file_kind, open_files, send
from nodedaemon.runtime import Mount

__all__ = ["HotPlug", "LinkPlug"]


class HotPlug(Protocol):
    """Decides which cap nodes a container sees."""

    def place(self, folder: Path) -> str:
        """Returns where a command finds the cap nodes.

        Args:
            folder: the container's directory for them on the host.
        """

    async def prepare(self, folder: Path, nodes: Mapping[str, Path]) -> list[Mount]:
        """Makes the directory of a container that is to be created, and returns what the container must be given.

        Args:
            folder: the directory; made if missing.
            nodes: where each node that it is to see from its start is on the host, by name.

        Raises:
            OSError: the disk is full, say.
        """

    async def show(self, folder: Path, nodes: Mapping[str, Path], pid: int) -> bool:
        """Makes a living container see exactly these nodes, and makes sure that it does. Repeating it does no harm.

        Args:
            folder: its directory.
            nodes: where each node is on the host, by name.
            pid: its init process.

        Returns:
            Whether anything had to be changed.

        Raises:
            Refusal: FAILED_PRECONDITION with CONTAINER_NOT_RUNNING or HOTPLUG_UNAVAILABLE. What it sees then is
                between what it saw and what was asked for; a node that was to vanish has vanished.
        """

    async def holders(self, pid: int, files: Collection[Path]) -> list[int]:
        """Returns the ids of the processes of a living container that have one of these files open, ascending.

        Args:
            pid: its init process.
            files: files of the host, device nodes or not.

        Raises:
            Refusal: FAILED_PRECONDITION with HOLDERS_UNKNOWN: a process cannot be looked into;
                HOTPLUG_UNAVAILABLE; CONTAINER_NOT_RUNNING.
        """

    async def signal(self, pid: int, number: int, processes: Collection[Process] | None) -> list[int]:
        """Signals processes of a living container.

        Args:
            pid: its init process.
            number: the signal.
            processes: to whom; None is whoever in it, but for its init process, has a handler for this signal. One
                that has none would be ended by most.

        Returns:
            The ids of those who were sent it, ascending.

        Raises:
            Refusal: as `holders` does.
        """

    async def close(self) -> None:
        """Lets go. What containers see stays as it is."""


class LinkPlug:
    """For plain processes on emulated cards: the nodes are links in a directory, which isolates nothing."""

    def place(self, folder: Path) -> str:  # noqa: D102 - see HotPlug
        return str(folder)

    async def prepare(self, folder: Path, nodes: Mapping[str, Path]) -> list[Mount]:  # noqa: D102
        await asyncio.to_thread(_link, folder, nodes)
        return []

    async def show(self, folder: Path, nodes: Mapping[str, Path], pid: int) -> bool:  # noqa: D102
        return await asyncio.to_thread(_link, folder, nodes)

    async def holders(self, pid: int, files: Collection[Path]) -> list[int]:  # noqa: D102
        # Nothing tells for sure which processes belong together, so every one of the host counts.
        return await asyncio.to_thread(_open_anywhere, files)

    async def signal(self, pid: int, number: int, processes: Collection[Process] | None) -> list[int]:  # noqa: D102
        if processes is None:
            # One that is nobody's container: its command, and whatever is of its session.
            sessions = await asyncio.to_thread(processes_in_sessions, frozenset([pid]))
            processes = [Process(*one) for one in sessions if catches(one[0], number)]
        return sorted(one.pid for one in processes if send(one.pid, one.started, number))

    async def close(self) -> None:
        """Does nothing."""


def _open_anywhere(files: Collection[Path]) -> list[int]:
    wanted = {file_kind(file.stat()) for file in files}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if wanted & open_files(int(entry.name)):
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended, or is another user's: the plain processes' are seen
    return sorted(found)


def _link(folder: Path, nodes: Mapping[str, Path]) -> bool:
    """Makes a directory hold exactly these links, and says whether anything had to be changed."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    present = {link.name: link.readlink() for link in folder.iterdir()}
    for name, source in present.items():
        if nodes.get(name) != source:
            (folder / name).unlink()
    for name, source in nodes.items():
        if present.get(name) != source:
            (folder / name).symlink_to(source)
    return present != dict(nodes)
