"""The data file of measured configurations: one header line, then one JSON line per configuration. Needs no torch.

Only what a GPU did is in such a file. Traced figures have files of their own, and a file whose label is not
``measured`` is refused here, so that the two are never mixed in one accuracy figure.
"""

from __future__ import annotations

import enum
import gzip
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

from predictor_onnx.configuration import Configuration, Precision
from predictor_onnx.errors import PredictorError

LABEL: Final = "measured"
#: Grows when a reader of before would misunderstand the file.
SCHEMA: Final = 1


class RowsRefusedError(PredictorError):
    """A file is not one of measured configurations, or is damaged."""

    code = "FAILED_PRECONDITION"
    reason = "MEASURED_ROWS_REFUSED"


class Ending(enum.Enum):
    """How the measurement of one configuration ended."""

    MEASURED = "measured"
    #: The card was full: memory is known from below only.
    OUT_OF_MEMORY = "out-of-memory"
    #: The network or its library is not there; says nothing of the card.
    CANNOT_BUILD = "cannot-build"
    #: The process died or raised an error.
    CRASHED = "crashed"
    TIMED_OUT = "timed-out"
    #: The process ended well, but its answer is not one.
    GARBLED = "garbled"


@dataclass(frozen=True)
class Header:
    """On what and with what a file's rows were measured.

    Attributes:
        date: when the file was begun, ISO 8601 in UTC.
        card: the product's name as the driver says it.
        total_mib: memory of the card, or of the MIG slice.
        mig_profile: such as ``1g.10gb``; empty for a whole card.
        driver: its version.
        cuda: version that torch was built for.
        cudnn: its version; empty without cuDNN.
        torch: its version.
        timm: its version; empty when it is not installed, as for the next two.
        transformers: its version.
        torchvision: its version.
        cudnn_benchmark: whether cuDNN tried its algorithms out.
        expandable_segments: whether the allocator's segments could grow.
        allocator: what the environment tells torch's allocator, as it was written.
        warm_up: steps before the timed ones.
        schema: version of the file's form.
        label: always ``measured``.
    """

    date: str
    card: str
    total_mib: float
    mig_profile: str
    driver: str
    cuda: str
    cudnn: str
    torch: str
    timm: str
    transformers: str
    torchvision: str
    cudnn_benchmark: bool
    expandable_segments: bool
    allocator: str
    warm_up: int
    schema: int = SCHEMA
    label: str = LABEL

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Reading:
    """What a card showed during the steps of one configuration.

    Attributes:
        allocated_mib: most that tensors took at once (``torch.cuda.max_memory_allocated``).
        reserved_mib: most that torch's allocator held (``torch.cuda.max_memory_reserved``).
        device_mib: most of the card's memory in use: context, kernels and what the allocator held; seen between steps.
        device_source: ``process`` when NVML told it of this process, ``difference`` when it is the growth of all that
            is in use on the card, which counts whatever else began there meanwhile.
        context_mib: device memory that the CUDA context took before any tensor.
        activity_percent: how busy the card was during the timed steps; None when it cannot be told.
        activity_source: ``gpm`` for SM activity; ``utilization-rates`` for the share of time with any kernel running,
            which is more; ``unavailable``.
        tf32_products: whether products of matrices rounded float32 to TF32.
        tf32_convolutions: the same for cuDNN's convolutions, where torch does so unless told otherwise.
        step_ms: median of the timed steps by CUDA events, made-up samples included.
        step_p90_ms: their 90th percentile.
        throughput: samples per second at the median.
        steps: how many were timed.
        parameters: numbers in the network's weights.
    """

    allocated_mib: float
    reserved_mib: float
    device_mib: float
    device_source: str
    context_mib: float
    activity_percent: float | None
    activity_source: str
    tf32_products: bool
    tf32_convolutions: bool
    step_ms: float
    step_p90_ms: float
    throughput: float
    steps: int
    parameters: int


@dataclass(frozen=True)
class Outcome:
    """What became of one configuration.

    Attributes:
        ending: how it ended.
        wall_s: seconds that its process took.
        reading: what was measured; None unless ``ending`` is MEASURED.
        allocated_at_least_mib: after OUT_OF_MEMORY, what tensors had and what they asked for in vain: the step needs
            no less. None when the error did not say.
        device_at_least_mib: after OUT_OF_MEMORY, the memory that was free before: the step needs more on a card.
        detail: the error's words, shortened.
    """

    ending: Ending
    wall_s: float
    reading: Reading | None = None
    allocated_at_least_mib: float | None = None
    device_at_least_mib: float | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        if (self.ending is Ending.MEASURED) != (self.reading is not None):
            raise ValueError("a reading belongs to what was measured, and to nothing else")
        if (self.ending is Ending.OUT_OF_MEMORY) != (self.device_at_least_mib is not None):
            raise ValueError("a lower bound belongs to what ran out of memory, and to nothing else")

    @property
    def censored(self) -> bool:
        """Whether memory is known from below only."""
        return self.ending is Ending.OUT_OF_MEMORY


@dataclass(frozen=True)
class MeasuredRow:
    """One configuration and what became of it on the file's card.

    Attributes:
        family: what must never be on both sides of a split.
        configuration: the step.
        outcome: what became of it.
    """

    family: str
    configuration: Configuration
    outcome: Outcome

    def to_json(self) -> str:
        """One line."""
        outcome = {**asdict(self.outcome), "ending": self.outcome.ending.value}
        configuration = json.loads(self.configuration.to_json())
        return json.dumps({"family": self.family, "configuration": configuration, "outcome": outcome}, sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> MeasuredRow:
        """The row that `to_json` wrote.

        Raises:
            ValueError: the line is something else; the message says what is wrong with it.
        """
        values = json.loads(line)
        if not isinstance(values, dict) or set(values) != {"family", "configuration", "outcome"}:
            raise ValueError("a row has a family, a configuration and an outcome")
        if not isinstance(values["family"], str):
            raise ValueError("family must be str")
        return cls(values["family"], configuration_of(values["configuration"]), outcome_of(values["outcome"]))


def configuration_of(values: Any) -> Configuration:
    """A configuration from the values of its fields; those with a default may be absent.

    Raises:
        ValueError: a field is unknown or missing, or its value is of another type or out of range.
    """
    if not isinstance(values, dict):
        raise ValueError("a configuration is an object")
    found = Configuration.from_json(json.dumps({"precision": Precision.FLOAT32.value, **values}))
    _check_types(Configuration, {field.name: getattr(found, field.name) for field in fields(found)})
    if found.batch < 1 or found.accumulation < 1 or not found.shape or min(found.shape) < 1:
        raise ValueError("batch, accumulation and the sides of shape must be 1 or more")
    return found


def outcome_of(values: Any) -> Outcome:
    """An outcome from the values of its fields, as a row or a worker's answer has them.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(values, dict):
        raise ValueError("an outcome is an object")
    reading = values.get("reading")
    made = {**values, "ending": Ending(values.get("ending")), "reading": None if reading is None else _reading(reading)}
    return Outcome(**_checked(Outcome, made))


def _reading(values: Any) -> Reading:
    return Reading(**_checked(Reading, values))


def _checked(kind: type, values: Any) -> dict[str, Any]:
    """The values, when they are those of the dataclass's fields, all of them.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} must be an object")
    names = {field.name for field in fields(kind)}
    if set(values) != names:
        raise ValueError(f"{kind.__name__} has other fields: {', '.join(sorted(set(values) ^ names))}")
    _check_types(kind, values)
    return values


def _check_types(kind: type, values: dict[str, Any]) -> None:
    hints = get_type_hints(kind)
    for name, value in values.items():
        hint = hints[name]
        if getattr(hint, "__origin__", None) is tuple:
            if not isinstance(value, tuple) or any(type(part) is not int for part in value):
                raise ValueError(f"{name} must be a list of int")
            continue
        allowed = get_args(hint) or (hint,)
        if type(value) not in allowed and not (float in allowed and type(value) is int):
            raise ValueError(f"{name} must be {' or '.join(one.__name__ for one in allowed)}, not {value!r:.60}")
        if isinstance(value, int | float) and (not math.isfinite(value) or value < 0):
            raise ValueError(f"{name} must be 0 or more, not {value!r}")


def header_of(line: str) -> Header:
    """The header of a file from its first line.

    Raises:
        ValueError: it is none, or one of another schema or label.
    """
    values = json.loads(line)
    if not isinstance(values, dict) or "schema" not in values or "label" not in values:
        raise ValueError("its first line is no header of measured rows")
    if values["label"] != LABEL:
        raise ValueError(f"its label is {values['label']!r:.40}, and only {LABEL!r} rows are read here")
    if values["schema"] != SCHEMA:
        raise ValueError(f"its schema is {values['schema']!r:.40}; this version reads {SCHEMA}")
    return Header(**_checked(Header, values))


@dataclass(frozen=True)
class MeasuredFile:
    """A whole file, read and found right."""

    header: Header
    rows: tuple[MeasuredRow, ...]


def read(path: Path) -> MeasuredFile:
    """A file of measured rows, plain or compressed (``.gz``).

    Raises:
        RowsRefusedError: it cannot be read, is of another schema or label, or a line of it is damaged.
    """
    number = 1
    rows = []
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            header = header_of(file.readline())
            for line in file:
                number += 1
                if not line.endswith("\n"):
                    raise ValueError("the line was cut")
                rows.append(MeasuredRow.from_json(line))
    except (OSError, EOFError, ValueError) as error:
        raise RowsRefusedError(
            f"{path.name}, line {number}: {error}. Give a file made by 'python -m predictor_onnx.measure'; one whose "
            "last line was cut is mended by continuing it with --resume."
        ) from error
    return MeasuredFile(header, tuple(rows))
