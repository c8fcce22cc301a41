"""How things are called in what people read."""

from __future__ import annotations

import re

from google.protobuf.timestamp_pb2 import Timestamp

from puhui.rpc.moment import moment
from puhui.v1 import card_pb2, job_pb2, prediction_pb2

__all__ = [
    "age",
    "card_name",
    "count",
    "job_state",
    "memory_slices",
    "mib",
    "overruled_line",
    "placement",
    "plain_enum",
    "prediction_line",
    "readable",
    "run_end",
    "run_length",
    "short_uuid",
    "size",
    "span",
]

_MANY_MIB = re.compile(r"\b(\d{6,}) MiB\b")


def card_name(model: str, emulated: bool) -> str:
    """Returns the name of a GPU, with the label that every emulated one carries."""
    return model.removeprefix("NVIDIA ") + (" (emulated)" if emulated else "")


def size(size_bytes: float) -> str:
    """Returns a size in bytes, readable."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" or size_bytes >= 100 else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def mib(size_mib: float) -> str:
    """Returns a size in MiB, readable."""
    return size(size_mib * 2**20)


def readable(text: str) -> str:
    """Returns a centre's sentence with its large amounts of memory in units that people can read."""
    return _MANY_MIB.sub(lambda match: mib(int(match[1])), text)


def count(number: int, singular: str, plural: str = "") -> str:
    """Returns a number with its noun."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def span(length_s: float) -> str:
    """Returns a length of time, readable."""
    if length_s < 9.95:
        return f"{length_s:.1f}s"
    for unit, seconds, smaller, smaller_s in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if length_s >= seconds:
            whole, rest = divmod(int(length_s), seconds)
            return f"{whole}{unit}{rest // smaller_s}{smaller}" if rest // smaller_s else f"{whole}{unit}"
    return f"{int(max(length_s, 10))}s"


def age(since: Timestamp, now_s: float) -> str:
    """Returns how long ago a moment was."""
    return span(max(now_s - moment(since), 0)) if since.seconds else "-"


def plain_enum(name: str, prefix: str) -> str:
    """Returns the name of an enum value without what all of its enum begin with, in lower case."""
    return name.removeprefix(prefix).lower().replace("_", " ")


def job_state(state: job_pb2.JobState.ValueType) -> str:
    """Returns the name of a job's state."""
    return plain_enum(job_pb2.JobState.Name(state), "JOB_STATE_")


def placement(place: card_pb2.Placement) -> str:
    """Returns which memory slices of a GPU a slice sits on."""
    last = place.start + max(place.size, 1) - 1
    return str(place.start) if last == place.start else f"{place.start}–{last}"


def memory_slices(place: card_pb2.Placement) -> str:
    """Returns which memory slices a slice sits on, with the noun."""
    return f"memory slice{'s' if place.size > 1 else ''} {placement(place)}"


def short_uuid(uuid: str) -> str:
    """Returns enough of a UUID to tell it from others on a screen."""
    return uuid[:12]


def overruled_line(prediction: prediction_pb2.Prediction, origin: prediction_pb2.SizingOrigin.ValueType) -> str:
    """Returns what is left to say of a prediction when the user has named a size; "" when the user has not."""
    if origin not in (prediction_pb2.SIZING_ORIGIN_PROFILE, prediction_pb2.SIZING_ORIGIN_MEMORY):
        return ""
    asked = "profile" if origin == prediction_pb2.SIZING_ORIGIN_PROFILE else "memory"
    if prediction.tier == prediction_pb2.PREDICTION_TIER_NO_ACCELERATOR:
        said = "no use of a GPU was found"
    elif prediction.tier == prediction_pb2.PREDICTION_TIER_UNKNOWN:
        said = "the code could not be sized"
    else:
        said = mib(prediction.required_mib)
    return f"{said}; the {asked} that you asked for wins"


def prediction_line(prediction: prediction_pb2.Prediction) -> str:
    """Returns what a piece of code was predicted to need."""
    tier = plain_enum(prediction_pb2.PredictionTier.Name(prediction.tier), "PREDICTION_TIER_")
    if prediction.tier == prediction_pb2.PREDICTION_TIER_NO_ACCELERATOR:
        return prediction.reason or "the code uses no accelerator library"
    memory = prediction.memory
    quantiles = f"p50 {mib(memory.p50_mib)}, p90 {mib(memory.p90_mib)}, p99 {mib(memory.p99_mib)}"
    why = f": {prediction.reason}" if prediction.reason else ""
    sure = plain_enum(
        prediction_pb2.PredictionConfidence.Name(prediction.confidence), "PREDICTION_CONFIDENCE_"
    )  # fmt: skip
    said = f", confidence {sure}" if prediction.confidence else ""
    return f"{mib(prediction.required_mib)} ({quantiles}; tier {tier}{said}){why}"


def run_end(run: job_pb2.Run) -> str:
    """Returns how a run ended, or how far it is, in a few words."""
    if run.HasField("exit_code"):
        return f"exit code {run.exit_code}"
    if run.HasField("end_time"):
        return "given up"
    return "runs" if run.HasField("start_time") else "waits"


def run_length(run: job_pb2.Run, now_s: float) -> str:
    """Returns how long the command of a run has run."""
    if not run.HasField("start_time"):
        return "-"
    return span(max((moment(run.end_time) if run.HasField("end_time") else now_s) - moment(run.start_time), 0))
