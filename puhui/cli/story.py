"""What becomes of a job, one line per event, for whoever watches `puhui run`."""

from __future__ import annotations

from collections.abc import Callable

from puhui.cli.terminal import LABEL_WIDTH
from puhui.cli.words import card_name, memory_slices, overruled_line, prediction_line, readable, short_uuid, size
from puhui.client.centre import FINAL_STATES
from puhui.v1 import job_pb2
from puhui.v1.job_service_pb2 import WatchJobResponse

__all__ = ["exit_code_of", "tell", "tell_end"]

_NEVER_STARTED = 125


def tell(update: WatchJobResponse) -> list[tuple[str, str]]:
    """Returns what to say about one event: lines, each a label and a text."""
    if update.event.state in FINAL_STATES:
        return []  # `tell_end` says it
    if update.event.peer:
        return [(label, f"[{update.event.peer}] {text}") for label, text in _tell(update)]
    return _tell(update)


def _tell(update: WatchJobResponse) -> list[tuple[str, str]]:
    teller = _TELLERS.get(update.event.reason)
    if teller is not None:
        return teller(update.job, update.event)
    event = update.event
    words = event.reason.lower().replace("_", " ")
    if event.state == job_pb2.JOB_STATE_STOPPING:
        return [("stopping", words)]  # why, `tell_end` says
    return [(words, event.message)] if len(words) <= LABEL_WIDTH else [("event", f"{words}: {event.message}")]


def tell_end(job: job_pb2.Job) -> str:
    """Returns what became of a job that has ended, in one line."""
    code = f"exit code {job.exit_code}" if job.HasField("exit_code") else "no exit code"
    if job.state == job_pb2.JOB_STATE_SUCCEEDED:
        return f"succeeded, {code}{_left(job)}"
    word = "cancelled" if job.state == job_pb2.JOB_STATE_CANCELLED else "failed"
    if job.reason == "EXIT_CODE" and job.HasField("exit_code"):
        by_signal = f" (signal {job.exit_code - 128})" if 128 < job.exit_code < 193 else ""
        return f"{word}, {code}{by_signal}; its log says more{_left(job)}"
    reason = "" if job.reason == word.upper() else f" ({job.reason})"
    why = f": {job.message}" if job.message else ""
    return f"{word}, {code}{reason}{why}{_left(job)}"


def exit_code_of(job: job_pb2.Job) -> int:
    """Returns the code with which a program ends that stands for this job.

    It is the command's own code; 125 when the command never started; never 0 for a job that did not succeed.
    """
    if job.state == job_pb2.JOB_STATE_SUCCEEDED:
        return 0
    if job.HasField("exit_code"):
        code = job.exit_code if job.exit_code >= 0 else 128 - job.exit_code
        return min(max(code, 1), 255)
    return 1 if job.HasField("start_time") else _NEVER_STARTED


def _left(job: job_pb2.Job) -> str:
    if not job.artifacts.file_count:
        return ""
    files = f"{job.artifacts.file_count} file{'s' if job.artifacts.file_count > 1 else ''}"
    return f"; {files} in /workspace/outputs: puhui pull {job.id}"


def _submitted(job: job_pb2.Job, event: job_pb2.JobEvent) -> list[tuple[str, str]]:
    return [("job", f"{job.id} at centre {job.centre}")]


def _predicted(job: job_pb2.Job, event: job_pb2.JobEvent) -> list[tuple[str, str]]:
    lines = []
    if job.prediction.tier:
        overruled = overruled_line(job.prediction, job.sizing.origin)
        lines.append(("predicted", overruled or prediction_line(job.prediction)))
    elif event.message and event.message != job.sizing.reason:
        lines.append(("predicted", event.message))
    if job.sizing.reason:
        lines.append(("slice", readable(job.sizing.reason)))
    return lines


def _reserved(job: job_pb2.Job, event: job_pb2.JobEvent) -> list[tuple[str, str]]:
    attempt = _attempt(job, event)
    if attempt is None:
        return [("placed", event.message)]
    card = card_name(attempt.gpu_model, attempt.emulated)
    where = f"{attempt.profile} on GPU {attempt.gpu_index}, {card}, {memory_slices(attempt.placement)}"
    return [("placed", where + (f" (attempt {attempt.number})" if attempt.number > 1 else ""))]


def _attempt(job: job_pb2.Job, event: job_pb2.JobEvent) -> job_pb2.Attempt | None:
    return next((attempt for attempt in job.attempts if attempt.number == event.attempt), None)


def _cut(job: job_pb2.Job, event: job_pb2.JobEvent) -> list[tuple[str, str]]:
    uuid = event.details.get("slice_uuid", "")
    return [("cut", short_uuid(uuid) if uuid else event.message)]


def _started(job: job_pb2.Job, event: job_pb2.JobEvent) -> list[tuple[str, str]]:
    container = event.details.get("container_id", "")
    attempt = _attempt(job, event)
    runtime = attempt.runtime if attempt is not None else ""
    how = "process (no isolation)" if runtime == "process" else runtime
    return [("started", " ".join(word for word in (how, container[:12]) if word) or event.message)]


def _collected(job: job_pb2.Job, event: job_pb2.JobEvent) -> list[tuple[str, str]]:
    log = event.details.get("log_bytes", "")
    files = event.details.get("artifact_files", "")
    if not log.isdigit() or not files.isdigit():
        return [("collected", event.message)]
    return [("collected", f"{size(int(log))} of output, {files} artifact file{'' if files == '1' else 's'}")]


_TELLERS: dict[str, Callable[[job_pb2.Job, job_pb2.JobEvent], list[tuple[str, str]]]] = {
    "SUBMITTED": _submitted,
    "PREDICTED": _predicted,
    "WAITING_FOR_SLICE": lambda job, event: [("waiting", readable(event.message))],
    "RESERVED": _reserved,
    "SLICE_CREATED": _cut,
    "CONTAINER_STARTED": _started,
    "RESULTS_COLLECTED": _collected,
    "CONTAINER_REMOVED": lambda job, event: [("removed", event.message)],
    "SLICE_DESTROYED": lambda job, event: [("destroyed", event.message)],
    "RESULTS_DELAYED": lambda job, event: [("delayed", event.message)],
    "CANCEL_REQUESTED": lambda job, event: [("cancelling", event.message)],
    "ADOPTED": lambda job, event: [("adopted", event.message)],
    "COMMAND_ENDED": lambda job, event: [],
    "DEVICE_OUT_OF_MEMORY": lambda job, event: [("memory", event.message)],
    "GROWN": lambda job, event: [("waiting", readable(event.message))],
    "RECLAIMED": lambda job, event: [("idle", event.message)],
    "RECLAIM_REFUSED": lambda job, event: [("kept", event.message)],
    "SUSPENDED": lambda job, event: [("suspended", event.message)],
    "SUSPEND_REQUESTED": lambda job, event: [("suspending", event.message)],
    "SHARE_RESERVED": lambda job, event: [("placed", event.message)],
    "RESUME_RETRIED": lambda job, event: [("waiting", readable(event.message))],
    "RESUME_WITHDRAWN": lambda job, event: [("idle", event.message)],
    "SESSION_MOVES": lambda job, event: [("moving", event.message)],
    "MOVES": lambda job, event: [("moving", event.message)],
    "WORKSPACE_CARRIED": lambda job, event: [("workspace", event.message)],
    "WARM_SLICE_DROPPED": lambda job, event: [("destroyed", event.message)],
    "FORWARDING": lambda job, event: [("forwarding", event.message)],
    "FORWARDED": lambda job, event: [("forwarded", event.message)],
    "PEER_OUT_OF_CONTACT": lambda job, event: [("no contact", event.message)],
    "PEER_IN_CONTACT": lambda job, event: [("in contact", event.message)],
    "BROUGHT_BACK": lambda job, event: [("back", event.message)],
    "PEER_ENDED": lambda job, event: [("coming", event.message)],
    "LATE_RESULT": lambda job, event: [("late", event.message)],
    "LATE_RESULT_KEPT": lambda job, event: [("late", event.message)],
    "RUN_ASKED": lambda job, event: [("run", event.message)],
    "RUN_STARTED": lambda job, event: [],
    "RUN_ENDED": lambda job, event: [("run", event.message)],
}
