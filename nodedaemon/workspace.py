"""The directory of an attempt: its workspace, its log and its results.

attempts/CENTRE/JOB/ATTEMPT/
    workspace/           the container's /workspace; code/ is where the code is mounted, outputs/ is kept
    code/                the container's /workspace/code when it has no bundle; empty
    caps/                the container's /dev/nvidia-caps
    output.log           all output, in the k8s-file format
    artifacts.tar.gz     what was in outputs/, packed when it is first asked for
    execs/ID/            a command that ran in the container beside its own; see nodedaemon.exec_process
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nodedaemon.owner import Owner

__all__ = ["AttemptFolder", "Attempts"]


@dataclass(frozen=True)
class AttemptFolder:
    """Where the things of one attempt are."""

    path: Path

    @property
    def workspace(self) -> Path:
        """The container's /workspace."""
        return self.path / "workspace"

    @property
    def outputs(self) -> Path:
        """The container's /workspace/outputs."""
        return self.workspace / "outputs"

    @property
    def caps(self) -> Path:
        """The container's /dev/nvidia-caps."""
        return self.path / "caps"

    @property
    def log(self) -> Path:
        """All output."""
        return self.path / "output.log"

    @property
    def artifacts(self) -> Path:
        """The packed results."""
        return self.path / "artifacts.tar.gz"


class Attempts:
    """The directories of all attempts of this node.

    Args:
        root: directory for them.
        uid: user that the containers' files belong to.
        gid: that user's group.
    """

    def __init__(self, root: Path, uid: int, gid: int) -> None:
        self._root = root
        self._uid = uid
        self._gid = gid
        self._make(root)

    def folder(self, owner: Owner) -> AttemptFolder:
        """Returns where the things of an attempt are, or would be."""
        return AttemptFolder(self._root / owner.centre / owner.job_id / str(owner.attempt))

    def make(self, owner: Owner) -> AttemptFolder:
        """Makes the directory of an attempt, empty.

        Raises:
            OSError: the disk is full.
        """
        folder = self.folder(owner)
        for path in (folder.path.parents[1], folder.path.parent, folder.path, folder.workspace, folder.outputs):
            self._make(path)
        self._make(folder.workspace / "code")
        folder.log.touch(mode=0o600)  # so that it can be followed before anything is written
        self._give(folder.log)
        return folder

    def make_empty_code(self, owner: Owner) -> Path:
        """Makes the directory that stands for the code of an attempt without a bundle, which only its owner reaches.

        Raises:
            OSError: the disk is full.
        """
        code = self.folder(owner).path / "code"
        self._make(code)
        return code

    def exec_folder(self, owner: Owner, exec_id: str) -> Path:
        """Returns where the things of a command beside the container's own are, or would be."""
        return self.folder(owner).path / "execs" / exec_id

    def make_exec(self, owner: Owner, exec_id: str) -> Path:
        """Makes the directory of a command beside the container's own.

        Raises:
            OSError: the disk is full.
        """
        folder = self.exec_folder(owner, exec_id)
        for path in (folder.parent, folder, folder / "exit"):
            self._make(path)
        log = folder / "log"
        log.touch(mode=0o600)  # so that it can be followed before anything is written
        self._give(log)
        return folder

    def _make(self, path: Path) -> None:
        path.mkdir(mode=0o700, exist_ok=True)
        self._give(path)

    def _give(self, path: Path) -> None:
        if os.geteuid() == 0 and self._uid != 0:
            os.chown(path, self._uid, self._gid, follow_symlinks=False)

    def remove(self, owner: Owner) -> None:
        """Removes the directory of an attempt, and those above it that are empty then.

        Raises:
            PermissionError: not everything may be removed, files of other users, say; the runtime can make it
                removable.
        """
        path = self.folder(owner).path
        _remove_tree(path)
        for parent in (path.parent, path.parents[1]):
            try:
                parent.rmdir()
            except OSError:
                return  # other attempts are there


def _remove_tree(path: Path) -> None:
    # rm follows no link and has no limit on depth; Python's own rmtree fails a thousand folders deep.
    done = subprocess.run(["rm", "-rf", "--", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip()[-300:])
