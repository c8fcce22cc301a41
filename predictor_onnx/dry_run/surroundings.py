"""Keeps a dry run from spending its time on other programs, on waiting and on the network.

The container is the wall; this only makes what it would refuse, or wait for, end at once.
"""

from __future__ import annotations

import builtins
import io
import multiprocessing.process
import os
import socket
import subprocess
import time
from typing import Any, Final, Self

_OFFLINE: Final = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0",
}  # fmt: skip


class _Program:
    """A program that was not started, and that ended well without a word."""

    def __init__(self, args: Any = (), *_: Any, **kwargs: Any) -> None:
        self.args, self.pid, self.returncode = args, 0, 0
        words = kwargs.get("text") or kwargs.get("universal_newlines") or kwargs.get("encoding")
        self._nothing: Any = "" if words else b""
        self.stdin: Any = io.StringIO() if words else io.BytesIO()
        self.stdout: Any = io.StringIO() if words else io.BytesIO()
        self.stderr: Any = io.StringIO() if words else io.BytesIO()

    def __class_getitem__(cls, _: Any) -> type[_Program]:
        return cls

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def communicate(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self._nothing, self._nothing

    def wait(self, *_: Any, **__: Any) -> int:
        return 0

    def poll(self) -> int:
        return 0

    def kill(self) -> None:
        pass

    terminate = kill

    def send_signal(self, _: int) -> None:
        pass


def _no_process(*_: Any, **__: Any) -> Any:
    raise OSError("a dry run starts no other process")


def _no_network(*_: Any, **__: Any) -> Any:
    raise socket.gaierror(socket.EAI_FAIL, "a dry run has no network")


def _unreachable(_self: socket.socket, address: Any) -> None:
    raise OSError(f"a dry run has no network: {address!r}")


def neutralise() -> None:
    """Do so, for the rest of this process."""
    os.environ.update(_OFFLINE)
    changes: dict[Any, dict[str, Any]] = {
        subprocess: {"Popen": _Program},
        os: {
            "system": lambda _: 0, "fork": _no_process, "forkpty": _no_process, "posix_spawn": _no_process,
            "posix_spawnp": _no_process, "execv": _no_process, "execve": _no_process, "popen": lambda *_: io.StringIO(),
            "kill": lambda *_: None, "killpg": lambda *_: None,
        },
        multiprocessing.process.BaseProcess: {"start": _no_process},
        socket: {"getaddrinfo": _no_network, "gethostbyname": _no_network, "create_connection": _no_network},
        socket.socket: {"connect": _unreachable, "connect_ex": _unreachable},
        time: {"sleep": lambda _: None},
        builtins: {"input": lambda *_: ""},
    }  # fmt: skip
    for place, names in changes.items():
        for name, instead in names.items():
            setattr(place, name, instead)
