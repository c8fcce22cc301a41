"""The directory of an attempt: its workspace, its log and its results.

attempts/CENTRE/JOB/ATTEMPT/
    workspace/           the container's /workspace; code/ is where the code is mounted, outputs/ is kept
    code/                the container's /workspace/code when it has no bundle; empty
    caps/                the container's /dev/nvidia-caps
    output.log           all output, in the k8s-file format
    carried/             a workspace that was uploaded; the container begins with it
    artifacts.tar.gz     what was in outputs/, packed when it is first asked for
    workspace.tar.gz     what was in workspace/ but for code/, packed when it is first asked for
    execs/ID/            a command that ran in the container beside its own; see nodedaemon.exec_process
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from nodedaemon.owner import Owner

__all__ = ["AttemptFolder", "Attempts", "remove_tree"]


_MOST_TRIES = 100


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

    @property
    def carried(self) -> Path:
        """The workspace that was uploaded."""
        return self.path / "carried"

    @property
    def workspace_archive(self) -> Path:
        """The packed workspace."""
        return self.path / "workspace.tar.gz"


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
        self._locks: WeakValueDictionary[Owner, asyncio.Lock] = WeakValueDictionary()
        self._make(root)

    def lock(self, owner: Owner) -> asyncio.Lock:
        """Returns what is held by whoever packs the workspace of an attempt, or takes it away."""
        return self._locks.setdefault(owner, asyncio.Lock())

    def folder(self, owner: Owner) -> AttemptFolder:
        """Returns where the things of an attempt are, or would be."""
        return AttemptFolder(self._root / owner.centre / owner.job_id / str(owner.attempt))

    def make(self, owner: Owner) -> AttemptFolder:
        """Makes the directory of an attempt. A workspace that is there already keeps what is in it.

        Raises:
            OSError: the disk is full.
        """
        folder = self.make_folder(owner)
        self._make(folder.workspace)
        if not os.path.lexists(folder.outputs):
            self._make(folder.outputs)
        code = folder.workspace / "code"
        if code.is_symlink() or (code.exists() and not code.is_dir()):
            code.unlink()  # an earlier attempt may have put anything where the code is to be mounted
        self._make(code)
        folder.log.touch(mode=0o600)  # so that it can be followed before anything is written
        self._give(folder.log)
        return folder

    def uploaded(self) -> list[Path]:
        """Returns where workspaces are that were uploaded and not used."""
        return list(self._root.glob("*/*/*/carried"))

    def owner_of(self, path: Path) -> Owner:
        """Returns whose directory this is."""
        centre, job_id, attempt = path.relative_to(self._root).parts
        return Owner(centre, job_id, int(attempt))

    def make_folder(self, owner: Owner) -> AttemptFolder:
        """Makes the directory of an attempt with nothing in it. What is in it already stays.

        Raises:
            OSError: the disk is full.
        """
        folder = self.folder(owner)
        for left in reversed(range(_MOST_TRIES)):
            try:
                for path in (folder.path.parents[1], folder.path.parent, folder.path):
                    self._make(path)
                break
            except (FileNotFoundError, FileExistsError):
                # `remove` takes the directories above another attempt away when they are empty, on its own thread:
                # before one is made in them, or between finding one there and looking what it is.
                if not left:
                    raise
        return folder

    def workspace_of(self, owner: Owner, attempt: int) -> Path:
        """Returns where the workspace is, or would be, that an attempt begins with.

        Args:
            owner: the attempt that begins.
            attempt: whose workspace; its own for the uploaded one.
        """
        return (
            self.folder(owner).carried if attempt == owner.attempt else self.folder(owner.of_attempt(attempt)).workspace
        )

    def take_workspace(self, owner: Owner, attempt: int) -> None:
        """Makes a workspace that of an attempt, in one step. One that was taken already stays so.

        Raises:
            OSError: the disk is full.
        """
        source, mine = self.workspace_of(owner, attempt), self.make_folder(owner).workspace
        if source.is_dir():
            source.chmod(0o700)  # code may have shut it
            source.rename(mine)
            if attempt != owner.attempt:
                # What was packed of it is not that attempt's any more.
                self.folder(owner.of_attempt(attempt)).workspace_archive.unlink(missing_ok=True)

    def return_workspace(self, owner: Owner, attempt: int) -> None:
        """Gives a workspace back that was taken, in one step. One that was not taken stays where it is."""
        source, mine = self.workspace_of(owner, attempt), self.folder(owner).workspace
        if mine.is_dir() and source.parent.is_dir() and not source.exists():
            mine.chmod(0o700)
            mine.rename(source)

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

    def remove(self, owner: Owner, *, but_carried: bool = False) -> None:
        """Removes the directory of an attempt, and those above it that are empty then.

        Args:
            owner: the attempt.
            but_carried: keep a workspace that was uploaded and not used.

        Raises:
            PermissionError: not everything may be removed, files of other users, say; the runtime can make it
                removable.
        """
        folder = self.folder(owner)
        path = folder.path
        if but_carried and folder.carried.exists():
            for entry in path.iterdir():
                if entry != folder.carried:
                    remove_tree(entry)
            return
        remove_tree(path)
        for parent in (path.parent, path.parents[1]):
            try:
                parent.rmdir()
            except OSError:
                return  # other attempts are there


def remove_tree(path: Path) -> None:
    """Removes a file or directory, with all in it.

    Raises:
        PermissionError: not everything may be removed.
    """
    # rm follows no link and has no limit on depth; Python's own rmtree fails a thousand folders deep.
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        done = subprocess.run([*command, "--", str(path)], capture_output=True, text=True, check=False)
        if command[0] == "rm" and done.returncode == 0:
            return
    raise PermissionError(done.stderr.strip()[-300:])
