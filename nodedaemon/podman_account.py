"""The unprivileged user that owns the containers, and the Podman home of its own.

Containers are never run as root. A daemon that is root hands everything that is Podman's to this user; a daemon that is
not uses its own. All daemons of a host share the home, so that an image is there once.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PROGRAM_PATH", "PodmanAccount", "PodmanUnusableError", "cgroup_layout", "choose_oci_runtime"]

PROGRAM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where every program of rootless containers is looked for."""

_NO_PROCESS_LEFT = "podman system migrate"
"""What Podman says to try when its containers run by the book, but none of their processes is there."""


class PodmanUnusableError(Exception):
    """This host cannot run rootless containers; the text says what is missing and how to get it."""


def cgroup_layout(mounts: str) -> str:
    """Returns how the host has mounted its cgroups: "v2", "hybrid" or "v1".

    Args:
        mounts: content of /proc/self/mounts.
    """
    kinds = {line.split()[1]: line.split()[2] for line in mounts.splitlines() if len(line.split()) > 2}
    if kinds.get("/sys/fs/cgroup") == "cgroup2":
        return "v2"
    if any(kind == "cgroup2" for kind in kinds.values()):
        return "hybrid"
    return "v1"


def choose_oci_runtime(layout: str, present: Sequence[str]) -> tuple[str, str]:
    """Returns the OCI runtime to use and, when it is not the usual one, why, in a sentence.

    Args:
        layout: as `cgroup_layout` returns it.
        present: names of the runtimes that are installed.

    Raises:
        PodmanUnusableError: none of them works on this host.
    """
    # crun refuses a hybrid layout, measured with crun 1.8.1 on Debian 12; runc does not.
    order = ["crun", "runc"] if layout == "v2" else ["runc"]
    for name in order:
        if name in present:
            why = "" if layout == "v2" else f"cgroups are {layout}, with which crun does not start: runc is used"
            return name, why
    wanted = " or ".join(order)
    raise PodmanUnusableError(f"no {wanted} for cgroup layout {layout}: install it with `apt-get install {order[-1]}`")


@dataclass(frozen=True)
class PodmanAccount:
    """A host user and its Podman home.

    Use `find` to get one.
    """

    name: str
    uid: int
    gid: int
    home: Path
    """Puhui's Podman home: storage.conf, containers.conf, storage/."""
    runtime_dir: Path
    """XDG_RUNTIME_DIR of every podman of this user that Puhui starts."""
    oci_runtime: str
    layout: str
    notices: tuple[str, ...]

    @classmethod
    def find(cls, user: str | None) -> PodmanAccount:
        """Finds out which user is to own the containers and whether it can, and prepares its Podman home.

        Args:
            user: name of the user when this process is root; otherwise this process's own user is taken.

        Raises:
            PodmanUnusableError: it cannot; the text says what is missing and how to get it.
        """
        account = cls.look(user)
        account._prepare(account.user_home)
        return account

    @classmethod
    def look(cls, user: str | None) -> PodmanAccount:
        """Finds out what `find` does, and changes nothing on the host.

        Args:
            user: as `find` takes it.

        Raises:
            PodmanUnusableError: as `find` does.
        """
        if os.geteuid() == 0:
            try:
                entry = pwd.getpwnam(user or "puhui")
            except KeyError:
                raise PodmanUnusableError(
                    f"there is no user {user!r} to own the containers: create it with `useradd --system --create-home "
                    f"--home-dir /var/lib/{user} --shell /usr/sbin/nologin {user}` and give it subordinate ids"
                ) from None
            if entry.pw_uid == 0:
                raise PodmanUnusableError("containers are never run as root: name an unprivileged user")
        else:
            entry = pwd.getpwuid(os.geteuid())
        _require_programs()
        _require_subordinate_ids(entry)
        layout = cgroup_layout(Path("/proc/self/mounts").read_text())
        present = [name for name in ("crun", "runc") if shutil.which(name, path=PROGRAM_PATH)]
        oci_runtime, why = choose_oci_runtime(layout, present)
        return cls(
            name=entry.pw_name,
            uid=entry.pw_uid,
            gid=entry.pw_gid,
            home=Path(entry.pw_dir, ".local/share/puhui/podman"),
            runtime_dir=_runtime_dir(entry.pw_uid),
            oci_runtime=oci_runtime,
            layout=layout,
            notices=(why,) if why else (),
        )

    def _prepare(self, user_home: Path) -> None:
        try:
            for folder in [*reversed(_below(self.home, user_home)), self.runtime_dir]:
                self._own(folder)
            self._write(
                "storage.conf",
                # Without a driver named here, vfs is taken, which copies the image for every container.
                # Rootless Podman 4 does not look at graphroot, and puts runroot below XDG_RUNTIME_DIR by itself.
                f'[storage]\ndriver = "overlay"\ngraphroot = "{self.store}"\nrootless_storage_path = "{self.store}"\n',
            )
            self._write(
                "containers.conf",
                f'[engine]\nruntime = "{self.oci_runtime}"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n',
            )
        except OSError as error:
            raise PodmanUnusableError(f"the Podman home of {self.name} cannot be prepared: {error}") from error

    @property
    def user_home(self) -> Path:
        """The user's own home directory."""
        return self.home.parents[3]

    @property
    def store(self) -> Path:
        """Where the images and layers of Puhui's containers are, and nobody else's."""
        return self.home / "storage"

    def _own(self, folder: Path) -> None:
        """Makes a directory that belongs to the user alone, and refuses one that somebody else put there."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir(mode=0o700)
            if os.geteuid() == 0:
                os.chown(folder, self.uid, self.gid)
        except FileExistsError:
            status = folder.lstat()
            if status.st_uid != self.uid or not folder.is_dir() or folder.is_symlink():
                raise PodmanUnusableError(
                    f"{folder} does not belong to {self.name}: remove it, or give it to that user"
                ) from None

    def _write(self, name: str, text: str) -> None:
        path = self.home / name
        if path.exists() and path.read_text() == text:
            return
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(text)
        temporary.chmod(0o644)
        temporary.replace(path)

    def environment(self) -> dict[str, str]:
        """Returns the whole environment of every podman of this user that Puhui starts."""
        return {
            "PATH": PROGRAM_PATH,
            "HOME": str(self.user_home),
            "USER": self.name,
            "LOGNAME": self.name,
            "LANG": "C.UTF-8",
            "XDG_RUNTIME_DIR": str(self.runtime_dir),
            "CONTAINERS_CONF": str(self.home / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.home / "storage.conf"),
        }

    def command(self, *arguments: str, dies_with_parent: bool = False) -> list[str]:
        """Returns an argument list that runs a program as this user; run it with `environment()` in "/".

        Args:
            arguments: the program and its arguments.
            dies_with_parent: end the program when the process that starts it ends, however that happens.
        """
        drop = ["--reuid", str(self.uid), "--regid", str(self.gid), "--init-groups"] if os.geteuid() == 0 else []
        tie = ["--pdeathsig", "TERM"] if dies_with_parent else []
        return ["setpriv", *drop, *tie, "--", *arguments] if drop or tie else list(arguments)

    def run(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a program as this user and returns what came of it.

        Raises:
            OSError: it cannot be started.
            subprocess.TimeoutExpired: it took longer.
        """
        return subprocess.run(
            self.command(*arguments),
            env=self.environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def revive(self) -> None:
        """Makes Podman usable after all processes of this user were killed while its runtime directory stayed.

        Podman then looks for the user namespace in the processes of containers that it believes to run, finds none,
        and refuses every command but the one that is called here.

        Raises:
            PodmanUnusableError: it is of no use.
        """
        lock = os.open(self.runtime_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # Of several daemons that start at once, the first revives it; the others find it alive.
            fcntl.flock(lock, fcntl.LOCK_EX)
            tried = self.run("podman", "unshare", "true")
            if tried.returncode and _NO_PROCESS_LEFT in tried.stderr:
                self.run("podman", "system", "migrate")
                tried = self.run("podman", "unshare", "true")
        finally:
            os.close(lock)
        if tried.returncode:
            raise PodmanUnusableError(
                f"podman does not run as user {self.name}: {tried.stderr.strip()[-500:]}; "
                "look at `podman unshare true` as that user"
            )

    def forbid_nested_namespaces(self) -> None:
        """Keeps what runs in containers from making user namespaces of its own, for as long as this user's one lives.

        In one it could mount the cap nodes of its slices elsewhere, where detaching them would not reach.

        Raises:
            PodmanUnusableError: it cannot be done; the text says why.
        """
        self.revive()
        done = self.run("podman", "unshare", "sh", "-c", "echo 0 > /proc/sys/user/max_user_namespaces")
        if done.returncode:
            raise PodmanUnusableError(
                f"containers of {self.name} cannot be kept from making user namespaces: {done.stderr.strip()[-500:]}; "
                "look at `podman unshare true` as that user"
            )

    def network_problem(self) -> str:
        """Returns why containers of this user cannot have a network, and what to do; empty when they can."""
        if shutil.which("slirp4netns", path=PROGRAM_PATH) is None:
            return "slirp4netns is not installed: install it with `apt-get install slirp4netns`"
        if self.run("test", "-w", "/dev/net/tun").returncode != 0:
            return f"user {self.name} may not write to /dev/net/tun: run `chmod a+rw /dev/net/tun`"
        return ""

    def require_reach(self, folder: Path) -> None:
        """Makes sure that the user can get into a directory.

        Raises:
            PodmanUnusableError: it cannot; the text names the directory that is in the way.
        """
        if self.run("test", "-x", str(folder)).returncode == 0:
            return
        for place in reversed([folder, *folder.parents]):
            if self.run("test", "-x", str(place)).returncode != 0:
                raise PodmanUnusableError(
                    f"user {self.name} cannot reach {folder}: {place} is closed to it; choose a state directory that "
                    f"it can reach, such as one below /var/lib, or run `chmod o+x {place}`"
                )


def _below(folder: Path, top: Path) -> list[Path]:
    """Returns a directory and those above it, as far as they are below `top`."""
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(top) and parent != top)]


def _runtime_dir(uid: int) -> Path:
    shared = Path("/run/puhui", f"podman-{uid}")
    # Made by `prepare`: the user's own daemon and root's `puhui-nodedaemon podman` then see the same Podman.
    if os.geteuid() == 0 or (shared.is_dir() and shared.stat().st_uid == uid):
        return shared
    own = os.environ.get("XDG_RUNTIME_DIR")
    if own and Path(own).is_dir() and Path(own).stat().st_uid == uid:
        return Path(own, "puhui-podman")
    return Path("/tmp", f"puhui-podman-{uid}")  # noqa: S108 - made with mode 0700, and its owner is checked


def _require_programs() -> None:
    for program, package in (("podman", "podman"), ("newuidmap", "uidmap"), ("setpriv", "util-linux")):
        if shutil.which(program, path=PROGRAM_PATH) is None:
            raise PodmanUnusableError(f"{program} is not installed: install it with `apt-get install {package}`")


def _require_subordinate_ids(entry: pwd.struct_passwd) -> None:
    for file, option in (("/etc/subuid", "--add-subuids"), ("/etc/subgid", "--add-subgids")):
        names = {entry.pw_name, str(entry.pw_uid)}
        if Path(file).exists() and any(line.split(":")[0] in names for line in Path(file).read_text().splitlines()):
            continue
        raise PodmanUnusableError(
            f"user {entry.pw_name} has no range in {file}: give it one with "
            f"`usermod {option} 200000-265535 {entry.pw_name}`"
        )
