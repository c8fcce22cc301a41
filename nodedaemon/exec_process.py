"""A command that was started in a living container, and the process that stays with it.

Under Podman that process is conmon, as it is for containers; plain processes have `exec_keeper`, which behaves like it.
It writes the output to a file and outlives the daemon, so output and exit code are never lost. What the two agree on is
a folder:

    log          all output, in the k8s-file format
    conmon.pid   process id of the one that stays
    pid          process id of the command, on this host
    attach       a socket (SOCK_SEQPACKET) that takes standard input
    ctl          a fifo that takes sizes of the terminal
    exit/        gets one file with the exit code
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
from pathlib import Path

__all__ = [
    "EXIT",
    "KEEPER_PID",
    "LOG",
    "PID",
    "ExecProcess",
    "TiedSocket",
    "exit_code",
    "live_command",
    "never_began",
    "settle_start",
]

LOG = "log"
KEEPER_PID = "conmon.pid"
PID = "pid"
EXIT = "exit"

_PACKET_BYTES = 16384  # conmon reads 32 KiB at a time, and of a longer packet it would lose the rest
_END_OF_TRANSMISSION = b"\x04"
_MOST_CHARACTERS = 1000  # conmon refuses larger terminals
_THROWN_BYTES = 65536
_SETTLE_LOOKS = 100
_SETTLE_PAUSE_S = 0.05


class TiedSocket:
    """Keeps what the daemon has open to a keeper open for as long as the keeper lives, whatever becomes of the daemon.

    The keeper takes the end of its only connection to `attach` for the end of standard input, and conmon gives up when
    it cannot tell of the start. So it inherits one end of a pair of sockets that it never reads, and the daemon sends
    the descriptors through the other: while the keeper lives, the kernel holds them there.
    """

    def __init__(self) -> None:
        self._ours, self._keepers = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    @property
    def inherited(self) -> int:
        """Descriptor that the keeper must inherit."""
        return self._keepers.fileno()

    def hold(self, descriptor: int) -> None:
        """Keeps open what a descriptor of this process refers to."""
        socket.send_fds(self._ours, [b"x"], [descriptor])

    def close(self) -> None:
        """Closes this process's ends."""
        self._ours.close()
        self._keepers.close()


class ExecProcess:
    """One command and the process that stays with it. Use `find` to get one."""

    def __init__(self, folder: Path, keeper: int, *, tty: bool) -> None:
        self._folder = folder
        self._tty = tty
        self._attach: socket.socket | None = None
        self._last: socket.socket | None = None
        self._sending = asyncio.Lock()
        self._input_over = False
        self._keeper_id, self._keeper = keeper, os.pidfd_open(keeper)
        self._process_id, self._process = self._find_command()
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._keeper, self._note_end)

    @classmethod
    def find(cls, folder: Path, *, tty: bool, tie: TiedSocket | None = None) -> ExecProcess | None:
        """Finds the command of a folder.

        Args:
            folder: the folder; its name must be unique, and on the keeper's command line.
            tty: whether the command has a terminal.
            tie: keeps its standard input open beyond this daemon; only for who starts it.

        Returns:
            The command, or None when nobody stays with it: it has ended, or it never began.
        """
        keeper = _read_number(folder / KEEPER_PID)
        if keeper is None:
            return None
        try:
            found = cls(folder, keeper, tty=tty) if _is_keeper(keeper, folder) else None
        except ProcessLookupError:
            return None
        if found is not None and tie is not None:
            found._connect(tie)
        return found

    @property
    def log(self) -> Path:
        """Where its output is."""
        return self._folder / LOG

    async def wait(self) -> int | None:
        """Waits until the command has ended and all of its output is written.

        Returns:
            Its exit code, 128 + n when it died of signal n; None when that cannot be known: its keeper was killed.
        """
        await self._ended.wait()
        return exit_code(self._folder)

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._keeper)
        self._ended.set()

    # Standard input ---------------------------------------------------------------------------------------

    async def write(self, data: bytes) -> None:
        """Gives the command standard input, and waits while it takes none. What it will never take is dropped."""
        async with self._sending:
            for at in range(0, len(data), _PACKET_BYTES):
                await self._send(data[at : at + _PACKET_BYTES])

    async def close_input(self) -> None:
        """Ends standard input; a terminal is sent the end-of-transmission character."""
        async with self._sending:
            if self._tty:
                await self._send(_END_OF_TRANSMISSION)
                return
            connection = self._connect()
            if connection is None or self._input_over:
                return
            # An empty packet is the end of a connection to conmon, read only when the command has taken all before it.
            taken = await self._send(b"")
            self._input_over = True
            if not taken:
                return
            await self._hung_up(connection)
            # Conmon 2.1 then closes standard input only if it could always write to the connection (otherwise it looks
            # at memory that it has freed). A fresh one, whose output is taken and thrown away, ends it for certain.
            last = self._dial()
            if last is not None:
                self._last = last
                asyncio.get_running_loop().add_reader(last, _throw_away, last)
                with contextlib.suppress(OSError):  # it has ended
                    last.send(b"")

    async def _hung_up(self, connection: socket.socket) -> None:
        """Waits until the keeper has ended a connection, or has ended."""
        # Only for hang-ups: the connection counts as readable all the time, because nothing is read from it.
        with select.epoll() as hang_ups:
            hang_ups.register(connection, 0)
            over = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(hang_ups.fileno(), over.set)
            try:
                await over.wait()
            finally:
                loop.remove_reader(hang_ups.fileno())

    async def _send(self, data: bytes) -> bool:
        """Sends, and says whether the keeper took it."""
        connection = self._connect()
        if connection is None or self._input_over:
            return False
        try:
            await asyncio.get_running_loop().sock_sendall(connection, data)
        except OSError:  # it has ended, or takes no more
            self._input_over = True
        return not self._input_over

    def _connect(self, tie: TiedSocket | None = None) -> socket.socket | None:
        if self._attach is not None:
            return self._attach
        connection = self._dial()
        if connection is None:
            return None
        if tie is not None:
            tie.hold(connection.fileno())
        # Output is read from the log. Nobody reads it here, so the keeper must not wait for anybody to.
        connection.shutdown(socket.SHUT_RD)
        self._attach = connection
        return connection

    def _dial(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        # A path below /proc, because the folder's own may be longer than a socket's may.
        place = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
        try:
            connection.connect(f"/proc/self/fd/{place}/attach")
        except OSError:  # it has ended
            connection.close()
            return None
        finally:
            os.close(place)
        return connection

    def resize(self, columns: int, rows: int) -> None:
        """Changes the size of the command's terminal."""
        size = f"1 {min(rows, _MOST_CHARACTERS)} {min(columns, _MOST_CHARACTERS)}\n"
        try:
            control = os.open(self._folder / "ctl", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return  # it has ended
        with contextlib.suppress(BlockingIOError, BrokenPipeError), os.fdopen(control, "wb", buffering=0) as fifo:
            fifo.write(size.encode())

    # Signals ----------------------------------------------------------------------------------------------

    def _find_command(self) -> tuple[int, int]:
        """Returns the command's process id and a descriptor of it; -1 for the descriptor when it has ended."""
        process = live_command(self._folder)
        if not process:
            return 0, -1
        try:
            descriptor = os.pidfd_open(process)
        except ProcessLookupError:
            return 0, -1
        # Between the two it may have become another's; the descriptor stays with whom it is.
        if live_command(self._folder) != process:
            os.close(descriptor)
            return 0, -1
        return process, descriptor

    def signal(self, number: int) -> None:
        """Signals the command and what it started in its process group. Nothing happens when it has ended."""
        if self._process < 0:
            self._process_id, self._process = self._find_command()
        if self._process < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            # Says whether the id is still the command's; a group outlives its leader, but then there is no telling.
            signal.pidfd_send_signal(self._process, 0)
            if os.getpgid(self._process_id) == self._process_id:
                os.killpg(self._process_id, number)
            else:
                signal.pidfd_send_signal(self._process, number)

    def close(self) -> None:
        """Lets go of the command, which lives on."""
        if not self._ended.is_set():
            asyncio.get_running_loop().remove_reader(self._keeper)
        for descriptor in (self._keeper, self._process):
            if descriptor >= 0:
                os.close(descriptor)
        self._keeper = self._process = -1
        if self._attach is not None:
            self._attach.close()
        if self._last is not None:
            asyncio.get_running_loop().remove_reader(self._last)
            self._last.close()


def _throw_away(connection: socket.socket) -> None:
    try:
        over = not connection.recv(_THROWN_BYTES)
    except BlockingIOError:
        return
    except OSError:
        over = True
    if over:
        asyncio.get_running_loop().remove_reader(connection)


def live_command(folder: Path) -> int:
    """Returns the process id of the command of a folder while it lives; else 0."""
    keeper, process = _read_number(folder / KEEPER_PID), _read_number(folder / PID)
    # The id may be another process's by now; a child of its keeper can only be the command.
    if keeper is None or process is None or not _is_keeper(keeper, folder) or _parent(process) != keeper:
        return 0
    return process


def _is_keeper(process: int, folder: Path) -> bool:
    try:
        return folder.name.encode() in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def never_began(folder: Path) -> bool:
    """Says whether the command of a folder that nobody stays with was never started."""
    return _read_number(folder / PID) is None and exit_code(folder) is None


async def settle_start(folder: Path) -> None:
    """Waits while a keeper for a folder is being started by a daemon that is gone."""
    for _ in range(_SETTLE_LOOKS):
        if (folder / KEEPER_PID).exists() or not await asyncio.to_thread(_named, folder.name):
            return
        await asyncio.sleep(_SETTLE_PAUSE_S)


def _named(word: str) -> bool:
    """Says whether a process has a word in its command line."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if word.encode() in place.read_bytes():
                return True
    return False


def exit_code(folder: Path) -> int | None:
    """Returns the exit code of the command of a folder that nobody stays with; None when it is not known."""
    files = list((folder / EXIT).iterdir()) if (folder / EXIT).is_dir() else []
    return _read_number(files[0]) if files else None


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _parent(process: int) -> int | None:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may hold anything.
    return int(text.rpartition(")")[2].split()[1])
