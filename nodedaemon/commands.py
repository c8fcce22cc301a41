"""What a command may be that is run in a container, and where it is to be looked for. Pure, but for looking."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nodedaemon.runtime import CODE_PATH

__all__ = ["SEARCH_PATH", "Found", "candidates", "command_problem", "env_problem", "is_image_name"]

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH of a container whose environment names none."""

_MOST_BYTES = 128 * 2**10  # of one argument, on Linux; here of all together, as containers' runtimes add their own
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_HOST_PART = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_PATH_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# The grammar of github.com/distribution/reference, which Podman holds names to.
_IMAGE = re.compile(
    rf"(?:{_HOST_PART}(?:\.{_HOST_PART})*(?::[0-9]+)?/)?{_PATH_PART}(?:/{_PATH_PART})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@[A-Za-z][A-Za-z0-9]*:[0-9a-fA-F]{32,})?"
)
_MOST_IMAGE_CHARACTERS = 255 + 1 + 128 + 1 + 135


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


def command_problem(command: Sequence[str]) -> str:
    """Returns what is wrong with a command and its arguments, to be said after its name; empty when nothing is."""
    if not command or not command[0]:
        return "names nothing to run"
    if any("\0" in word for word in command):
        return "holds a NUL character"
    if sum(len(word.encode()) + 1 for word in command) > _MOST_BYTES:
        return f"has more than {_MOST_BYTES // 2**10} KiB of arguments; put them in a file"
    return ""


def env_problem(env: Mapping[str, str]) -> str:
    """Returns what is wrong with an environment, to be said after its name; empty when nothing is."""
    for name, value in env.items():
        if not _ENV_NAME.fullmatch(name):
            return f"has the name {name[:80]!r}: a name is letters, digits, '_', '.' and '-', and no digit first"
        if "\0" in value:
            return f"holds a NUL character in {name[:80]}"
    if sum(len(name.encode()) + len(value.encode()) + 2 for name, value in env.items()) > _MOST_BYTES:
        return f"has more than {_MOST_BYTES // 2**10} KiB; put what is long in a file"
    return ""


def is_image_name(image: str) -> bool:
    """Says whether an image may be called so: [HOST/]NAME[:TAG][@DIGEST], or an id."""
    return len(image) <= _MOST_IMAGE_CHARACTERS and _IMAGE.fullmatch(image) is not None
