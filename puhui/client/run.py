"""A run instruction: a command in a session, its input on the way there and its output on the way back."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import grpc

from puhui.client.patience import Contact
from puhui.rpc.errors import Refusal
from puhui.v1.job_service_pb2 import RunJobRequest, RunJobResponse, RunStart, TerminalSize
from puhui.v1.job_service_pb2_grpc import JobServiceStub

__all__ = ["RunCall"]

_PIECE_BYTES = 64 * 2**10
_MOST_WAITING_BYTES = 4 * _PIECE_BYTES
# A connection whose other end is gone without a word is noticed within this time, by its keepalive.
_DOUBT_S = 45.0
_HANG_UP_S = 2.0
_PAUSE_S = 0.2
_MOST_EMPTY_ENDS = 20


class RunCall:
    """One run. Iterate it once, in one thread, for what becomes of it; its input may come from other threads.

    When the connection breaks, the same run is taken up again where its output was: no byte of output is lost or
    comes twice. Input has no such receipt. It is sent once the command runs; what was sent shortly before a break may
    not have arrived. A command on a terminal goes on then, as a person sees what is missing; any other is hung up and
    refused, because it would work on half its input and say nothing.

    Attributes:
        started: the command runs, or has run.
        connected: the centre has been heard since the connection was made.
        exit_code: exit code of the command, once it has ended.
    """

    def __init__(self, contact: Contact, jobs: JobServiceStub, start: RunStart) -> None:
        self.started = False
        self.connected = False
        self.exit_code: int | None = None
        self._contact = contact
        self._jobs = jobs
        self._start = start
        self._offset = 0
        # Signal handlers come here while the same thread is here already.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[RunJobRequest] = deque()
        self._waiting_bytes = 0
        self._connection = 0
        self._accepts = False
        self._input_ended = False
        self._size: TerminalSize | None = None
        self._sent_at: float | None = None
        self._in_doubt = False
        self._hung_up = False
        self._over = False
        self._call: Any = None

    def __iter__(self) -> Iterator[RunJobResponse]:
        """Yields events of the session, the run, its output, and at last its exit code.

        It ends without an exit code after `hang_up` only.

        Raises:
            Refusal: the centre refuses the run, or cannot be reached for too long; ABORTED with INPUT_IN_DOUBT.
        """
        empty_ends = 0
        try:
            while True:
                for response in self._contact.stream(self._attempt):
                    empty_ends = 0
                    part = response.WhichOneof("part")
                    if part == "output" and not self._take(response):
                        continue
                    if part == "exit_code":
                        self.exit_code = response.exit_code
                        self._require_whole_input()
                    yield response
                    if part == "exit_code":
                        return
                if self._hung_up:
                    return
                empty_ends += 1
                if empty_ends >= _MOST_EMPTY_ENDS:
                    raise Refusal(
                        grpc.StatusCode.UNAVAILABLE,
                        "RUN_LOST",
                        "the centre ends the call again and again without saying how the run ended; "
                        f"`puhui runs {self._start.job_id}` shows what it knows",
                        job_id=self._start.job_id,
                    )
                time.sleep(_PAUSE_S)
        except Refusal as refusal:
            if isinstance(refusal.__cause__, grpc.RpcError):
                refusal.__cause__.__traceback__ = None  # for the same reason as in `Contact.stream`
            raise
        finally:
            with self._changed:
                self._over = True
                self._call = None
                self._connection += 1
                self._changed.notify_all()

    def write(self, data: bytes) -> bool:
        """Sends standard input. Waits while much of it waits. Returns whether anybody still takes some."""
        for begin in range(0, len(data), _PIECE_BYTES):
            piece = data[begin : begin + _PIECE_BYTES]
            with self._changed:
                self._changed.wait_for(lambda: self._deaf() or self._waiting_bytes < _MOST_WAITING_BYTES)
                if self._deaf():
                    return False
                self._waiting_bytes += len(piece)
                self._put(RunJobRequest(stdin=piece))
        return True

    def end_input(self) -> None:
        """Says that standard input has ended."""
        self._put(RunJobRequest(stdin_closed=True))

    def send_signal(self, number: int) -> None:
        """Sends the command a signal, once it runs."""
        self._put(RunJobRequest(signal=number))

    def resize(self, columns: int, rows: int) -> None:
        """Says that the terminal has another size, in characters."""
        with self._changed:
            self._size = TerminalSize(columns=columns, rows=rows)
            self._put(RunJobRequest(terminal_size=self._size))

    def hang_up(self) -> None:
        """Ends the run, with SIGHUP if it has started, and the iteration soon after."""
        with self._changed:
            self._hung_up = True
            call = self._call
            if call is None:
                return
            if self.started and self.connected:
                self._waiting.appendleft(RunJobRequest(signal=signal.SIGHUP))
                self._changed.notify_all()
                timer = threading.Timer(_HANG_UP_S, call.cancel)
                timer.daemon = True
                timer.start()
            else:
                call.cancel()

    def _put(self, request: RunJobRequest) -> None:
        with self._changed:
            self._waiting.append(request)
            self._changed.notify_all()

    def _deaf(self) -> bool:
        return self._over or self._in_doubt or self._hung_up

    def _take(self, response: RunJobResponse) -> bool:
        """Takes note of output; leaves of it what has not been there yet, and says whether that is anything."""
        chunk = response.output
        end = chunk.offset + len(chunk.data)
        if end <= self._offset:
            return False
        if chunk.offset < self._offset:
            chunk.data = chunk.data[self._offset - chunk.offset :]
            chunk.offset = self._offset
        self._offset = end
        return True

    def _require_whole_input(self) -> None:
        if self._in_doubt:
            raise Refusal(
                grpc.StatusCode.ABORTED,
                "INPUT_IN_DOUBT",
                "the connection broke while the command was given input, so what it got of it is not known, and it "
                "was hung up; run it again",
                job_id=self._start.job_id,
                exit_code=str(self.exit_code),
            )

    def _attempt(self) -> Iterator[RunJobResponse]:
        if self._hung_up:
            return
        with self._changed:
            self._connection += 1
            number = self._connection
            if number > 1:
                self._go_on()
            call: Any = self._jobs.RunJob(self._requests(number))
            self._call = call
        announced = 0
        try:
            for response in call:
                self.connected = True
                part = response.WhichOneof("part")
                announced += part == "run"
                # The first `run` says that it is accepted, the second that it has started.
                begun = part == "run" and (announced > 1 or response.run.HasField("start_time"))
                if not self._accepts and (begun or part == "output"):
                    self.started = True
                    with self._changed:
                        self._accepts = True
                        self._changed.notify_all()
                yield response
        except grpc.RpcError:
            if not self._hung_up:
                raise
        finally:
            with self._changed:
                self.connected = self._accepts = False
                if self._connection == number:
                    self._connection += 1  # nothing more is taken out for this one
                self._changed.notify_all()
                self._call = None
            call.cancel()

    def _go_on(self) -> None:
        """Prepares what a further connection of the same run begins with."""
        just_sent = self._sent_at is not None and time.monotonic() - self._sent_at < _DOUBT_S
        if just_sent and not self._start.tty and self.exit_code is None:
            self._in_doubt = True
            self._waiting.clear()
            self._waiting.append(RunJobRequest(signal=signal.SIGHUP))
            return
        if self._input_ended:
            self._waiting.append(RunJobRequest(stdin_closed=True))
        if self._size is not None:
            self._waiting = deque(one for one in self._waiting if not one.HasField("terminal_size"))
            self._waiting.appendleft(RunJobRequest(terminal_size=self._size))

    def _requests(self, number: int) -> Iterator[RunJobRequest]:
        """Yields what connection `number` sends; the input of the command only once that runs."""
        start = RunStart()
        start.CopyFrom(self._start)
        start.output_offset = self._offset
        yield RunJobRequest(start=start)

        def gone() -> bool:
            # A call that has ended takes what it is given and drops it.
            return number != self._connection or (self._call is not None and not self._call.is_active())

        def ready() -> bool:
            return number != self._connection or (self._accepts and bool(self._waiting))

        while True:
            with self._changed:
                self._changed.wait_for(ready)
                if gone():
                    return
                request = self._waiting.popleft()
                part = request.WhichOneof("part")
                if part == "stdin":
                    self._waiting_bytes -= len(request.stdin)
                    self._sent_at = time.monotonic()
                    self._changed.notify_all()
                elif part == "stdin_closed":
                    self._input_ended = True
            yield request
