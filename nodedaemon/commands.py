"""Where a container's command is to be looked for."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import Path

from nodedaemon.runtime import CODE_PATH

__all__ = ["SEARCH_PATH", "Found", "candidates"]

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH of a container whose environment names none."""


@dataclass(frozen=True)
class Found:
    """The command is a file of the code: no need to look into the image."""

    problem: str = ""
    """Why it cannot be run; empty when it can."""


def candidates(command: str, search_path: str, code: Path) -> Found | list[str]:
    """Returns where in the image a command may be, or what is known of it already.

    Args:
        command: first word of a container's command.
        search_path: PATH in the container.
        code: the code on this host, which the container sees at CODE_PATH and starts in.
    """
    if "/" not in command:
        return [posixpath.join(folder or CODE_PATH, command) for folder in search_path.split(":")]
    inside = posixpath.normpath(posixpath.join(CODE_PATH, command))
    if not inside.startswith(CODE_PATH + "/"):
        return [inside]
    path = code / inside.removeprefix(CODE_PATH + "/")
    if path.is_symlink():
        return Found()  # it may lead into the image
    if not path.is_file():
        return Found(f"the code has no file {command!r}")
    if not path.stat().st_mode & 0o111:
        return Found(f"{command} is not executable: run it with its interpreter, such as python3 {command}")
    return Found()
