"""Stays with one command that was started beside a process of the process runtime, as conmon does in a container.

    python -m nodedaemon.exec_keeper FOLDER

FOLDER/spec.json says what to run; `nodedaemon.exec_process` says what else is in FOLDER. Standard library only: it must
start fast.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import selectors
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import IO, Any

from nodedaemon.process_keeper import ROOM_S, append, dropped, has_room, log_lines, restore_signals, tell

_READ_BYTES = 32768
_MOST_HELD = 65536


class _Keeper:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spec: dict[str, Any] = json.loads((folder / "spec.json").read_text())
        (folder / "spec.json").unlink()
        self._selector = selectors.DefaultSelector()
        self._held = b""
        """Standard input that the command has not taken yet."""
        self._input_over = False
        self._connections: list[socket.socket] = []
        self._master = -1
        self._stdin = -1

    def run(self) -> int:
        (self._folder / "conmon.pid").write_text(str(os.getpid()))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.chdir(self._folder)  # a socket's path must be short
        listener.bind("attach")
        listener.listen()
        os.mkfifo("ctl", 0o600)
        control = os.open("ctl", os.O_RDWR | os.O_NONBLOCK)
        try:
            process = self._start()
        except OSError as error:
            tell({"error": error.strerror or str(error), "directory": error.filename == self._spec["cwd"]})
            return 0
        (self._folder / "pid").write_text(str(process.pid))
        tell({"pid": process.pid})
        ended = os.pidfd_open(process.pid)
        os.set_blocking(self._stdin, False)
        for source, what in ((listener, "attach"), (control, "size"), (ended, "end")):
            self._selector.register(source, selectors.EVENT_READ, what)
        with Path("log").open("ab", buffering=0) as log:
            self._copy(log)
        code = process.wait()
        while not has_room(lambda: _write_code(self._folder / "exit", 128 - code if code < 0 else code)):
            time.sleep(ROOM_S)
        return 0

    def _start(self) -> subprocess.Popen[bytes]:
        spec = self._spec
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        slave = -1
        if spec["tty"]:
            self._master, slave = pty.openpty()
            self._resize(spec["rows"] or 24, spec["columns"] or 80)
            streams = {"stdin": slave, "stdout": slave, "stderr": slave}

        def begin() -> None:
            restore_signals()
            if slave >= 0:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        process = subprocess.Popen(
            spec["command"],
            cwd=spec["cwd"],
            env=spec["env"],
            start_new_session=True,
            preexec_fn=begin,
            **streams,
            **dropped(spec),
        )
        if slave >= 0:
            os.close(slave)
            self._stdin = os.dup(self._master)
            self._selector.register(self._master, selectors.EVENT_READ, "stdout")
        else:
            assert process.stdin is not None  # noqa: S101 - all three are pipes
            assert process.stdout is not None  # noqa: S101
            assert process.stderr is not None  # noqa: S101
            self._stdin = os.dup(process.stdin.fileno())
            process.stdin.close()
            self._selector.register(process.stdout, selectors.EVENT_READ, "stdout")
            self._selector.register(process.stderr, selectors.EVENT_READ, "stderr")
        return process

    def _copy(self, log: IO[bytes]) -> None:
        """Copies until the command has ended and all that it wrote is in the log."""
        over = False
        while True:
            ready = self._selector.select(0 if over else None)
            output = [key for key, _ in ready if key.data in ("stdout", "stderr")]
            for key in output:
                try:
                    data = os.read(key.fd, _READ_BYTES)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""  # nobody has the terminal open any more
                if data:
                    append(log, log_lines(data, key.data.encode()))
                else:
                    self._selector.unregister(key.fileobj)
            if over:
                if not output:
                    return
                continue
            for key, _ in ready:
                if key.data == "end":
                    over = True
                else:
                    self._serve(key)

    def _serve(self, key: selectors.SelectorKey) -> None:
        if key.data == "attach":
            connection, _ = key.fileobj.accept()  # type: ignore[union-attr]
            self._connections.append(connection)
            self._selector.register(connection, selectors.EVENT_READ, "input")
        elif key.data == "input":
            self._take(key.fileobj)
        elif key.data == "room":
            self._pass_on()
        elif key.data == "size":
            for line in os.read(key.fd, _READ_BYTES).decode().splitlines():
                _, rows, columns = line.split()
                self._resize(int(rows), int(columns))

    def _take(self, connection: Any) -> None:
        data = b""
        with contextlib.suppress(ConnectionResetError):
            data = connection.recv(_READ_BYTES)
        if data:
            self._held += data
        else:
            self._selector.unregister(connection)
            self._connections.remove(connection)
            connection.close()
            self._input_over = self._master < 0
        self._pass_on()

    def _pass_on(self) -> None:
        """Gives the command what it takes of its standard input, and reads more only when there is room."""
        if self._stdin < 0:
            return
        try:
            self._held = self._held[os.write(self._stdin, self._held) :] if self._held else b""
        except BlockingIOError:
            pass  # called again when there is room
        except OSError:
            self._held, self._input_over = b"", True
        waiting = self._stdin in self._selector.get_map()
        if self._held and not waiting:
            self._selector.register(self._stdin, selectors.EVENT_WRITE, "room")
        elif waiting and not self._held:
            self._selector.unregister(self._stdin)
        if self._input_over and not self._held:
            os.close(self._stdin)
            self._stdin = -1
        for connection in self._connections:
            full = len(self._held) > _MOST_HELD
            known = connection in self._selector.get_map()
            if full and known:
                self._selector.unregister(connection)
            elif not full and not known:
                self._selector.register(connection, selectors.EVENT_READ, "input")

    def _resize(self, rows: int, columns: int) -> None:
        if self._master >= 0:
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _write_code(folder: Path, code: int) -> None:
    (folder / "code.new").write_text(str(code))
    (folder / "code.new").replace(folder / "code")


def main(folder: Path) -> int:
    """Runs the command and stays until it has ended. Returns 0."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    return _Keeper(folder).run()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
