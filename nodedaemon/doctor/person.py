"""Whose daemon is examined: the user that owns its containers, and what that user may do."""

from __future__ import annotations

import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Person"]

_SECONDS = 10


@dataclass(frozen=True)
class Person:
    """A user of this host.

    Use `find` to get one.
    """

    name: str
    uid: int
    gid: int
    home: Path

    @classmethod
    def find(cls, name: str) -> Person | None:
        """Returns whom containers of a daemon started by this process would belong to; None when there is no such user.

        Args:
            name: the user when this process is root; otherwise this process's own user is taken.
        """
        try:
            entry = pwd.getpwnam(name) if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
        except KeyError:
            return None
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))

    def run(self, *command: str) -> subprocess.CompletedProcess[str] | None:
        """Runs a program as this user, for a moment; None when it cannot be started or does not end."""
        become = os.geteuid() == 0
        try:
            return subprocess.run(
                command,
                cwd="/",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": "/"},
                user=self.uid if become else None,
                group=self.gid if become else None,
                extra_groups=os.getgrouplist(self.name, self.gid) if become else None,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None

    def may(self, flag: str, path: Path) -> bool | None:
        """Says whether test(1) with a flag holds for this user, such as "-r"; None when it cannot be said."""
        done = self.run("test", flag, str(path))
        return None if done is None or done.returncode > 1 else done.returncode == 0
