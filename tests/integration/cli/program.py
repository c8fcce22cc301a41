"""The real program `puhui`, as a shell would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = str(Path(sys.executable).parent / "puhui")


@dataclass
class Ended:
    """A run of the program that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """The JSON documents on stdout, one per line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, Any]:
        """The error on stderr, of a run with --json."""
        found: dict[str, Any] = json.loads(self.err.splitlines()[-1])["error"]
        return found


@dataclass
class Puhui:
    """The program, for one test.

    Attributes:
        home: home directory of the user who runs it.
        environment: what it sees; nothing of this process's own settings.
        folder: where it is run.
    """

    home: Path
    environment: dict[str, str]
    folder: Path

    @classmethod
    def at(cls, home: Path, server: str = "") -> Puhui:
        """Returns the program in a home of its own."""
        home.mkdir(exist_ok=True)
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("PUHUI_", "XDG_", "PYTEST_"))
        }
        environment |= {"HOME": str(home), "LC_ALL": "C.UTF-8"}
        # A local centre of the tests runs its jobs as processes, even as root.
        allowed = os.environ.get("PUHUI_NODE_ALLOW_ROOT_PROCESSES")
        environment |= {"PUHUI_NODE_ALLOW_ROOT_PROCESSES": allowed} if allowed else {}
        environment.pop("NO_COLOR", None)
        if server:
            environment["PUHUI_SERVER"] = server
        return cls(home, environment, home)

    def __call__(self, *arguments: str | Path, given: bytes = b"", timeout_s: float = 60) -> Ended:
        """Runs it to its end, with `given` on its standard input."""
        ended = subprocess.run(
            [PROGRAM, *map(str, arguments)],
            env=self.environment,
            cwd=self.folder,
            input=given,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
        return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())

    def start(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        """Starts it, with pipes on its outputs."""
        return subprocess.Popen(
            [PROGRAM, *map(str, arguments)],
            env=self.environment,
            cwd=self.folder,
            stdin=options.pop("stdin", subprocess.DEVNULL),
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=options.pop("stderr", subprocess.PIPE),
            **options,
        )
