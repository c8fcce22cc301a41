"""A job that somebody stays with: its events as remarks, its output as this program's own."""

from __future__ import annotations

import codecs
import threading
from typing import Any

from puhui.cli.message_json import json_of
from puhui.cli.story import tell, tell_end
from puhui.cli.terminal import UnreadError, terminal
from puhui.client import Centre, Refusal
from puhui.v1 import job_pb2
from puhui.v1.job_service_pb2 import WatchJobResponse
from puhui.v1.stream_pb2 import LOG_STREAM_STDERR, LogChunk

__all__ = ["ChunkJson", "OutputReader", "follow", "show_update"]

_WITH_COMMAND = frozenset({job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_IDLE, job_pb2.JOB_STATE_RESUMING})


class ChunkJson:
    """Log chunks as JSON: protobuf's own fields, and the text, which no chunk border cuts in two."""

    def __init__(self) -> None:
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}

    def of(self, chunk: LogChunk) -> dict[str, Any]:
        """Returns what `json.dumps` takes for a chunk."""
        decoder = self._decoders.setdefault(chunk.stream, codecs.getincrementaldecoder("utf-8")(errors="replace"))
        document: dict[str, Any] = json_of(chunk)
        return {**document, "text": decoder.decode(chunk.data)}


class OutputReader:
    """Reads the output of one attempt in a thread of its own and writes it to stdout and stderr."""

    def __init__(self, centre: Centre, job_id: str, attempt: int) -> None:
        self.attempt = attempt
        self.failure: Refusal | UnreadError | None = None
        self._centre = centre
        self._chunks = centre.logs(job_id, attempt=attempt, follow=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits until all output has been written, and says so if it could not be read.

        Raises:
            UnreadError: nobody reads it.
        """
        self._thread.join()
        if isinstance(self.failure, UnreadError):
            raise self.failure
        if self.failure is not None:
            terminal().note(f"the rest of the output could not be read: {self.failure.message}", "output")
            self.failure = None

    def _read(self) -> None:
        screen, as_json = terminal(), ChunkJson()
        try:
            for chunk in self._chunks:
                if screen.as_json:
                    screen.json({"log": as_json.of(chunk)})
                else:
                    screen.write(chunk.data, to_stderr=chunk.stream == LOG_STREAM_STDERR)
        except Refusal as failure:
            self.failure = failure
        except UnreadError as failure:
            # Nobody needs the rest of the story, and this ends it.
            self.failure = failure
            self._centre.close()


def follow(centre: Centre, job_id: str) -> job_pb2.Job:
    """Shows what becomes of a job until it has ended, and returns it.

    Raises:
        Refusal: the centre could not be reached for too long.
        UnreadError: nobody reads what is written.
    """
    story = _Story(centre, job_id)
    try:
        for update in centre.updates(job_id):
            story.go_on(update)
    except Refusal:
        story.require_reader()
        raise
    job = centre.get(job_id)
    if terminal().as_json:
        terminal().json({"job": json_of(job)})
    else:
        terminal().note(tell_end(job), "ended")
    return job


class _Story:
    def __init__(self, centre: Centre, job_id: str) -> None:
        self._centre = centre
        self._job_id = job_id
        self._reader: OutputReader | None = None

    def go_on(self, update: WatchJobResponse) -> None:
        # The job in an update may be newer than the event; the event says how it was then.
        event = update.event
        if event.state in _WITH_COMMAND:
            show_update(update)
            # An event may be about an earlier attempt: its slice was kept, and is dropped now.
            if self._reader is None or self._reader.attempt < event.attempt:
                self._reader = OutputReader(self._centre, self._job_id, event.attempt)
        else:
            # What the command wrote comes before what is said about its end.
            if self._reader is not None:
                self._reader.finish()
            show_update(update)

    def require_reader(self) -> None:
        """Raises UnreadError when what ended the story is that nobody reads it."""
        if self._reader is not None and isinstance(self._reader.failure, UnreadError):
            raise self._reader.failure


def show_update(update: WatchJobResponse) -> None:
    """Says what one event was."""
    if terminal().as_json:
        terminal().json({"event": json_of(update.event)})
        return
    for label, text in tell(update):
        terminal().note(text, label)
