"""Job files: what `puhui run -f job.yaml` reads.

    name: digits
    command: python3 train.py --epochs 6
    resources:
      memory: 12GB
    inputs:
      - name: digits
        size: 400MB
    max_duration: 30m

The code is the folder of the file, unless `directory` names another one. Unknown fields are refused, because a
misspelt limit is a missing limit.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from puhui.cli.spec_options import reclaim_mode
from puhui.cli.terminal import Mistake
from puhui.rpc.moment import duration
from puhui.rpc.quantities import parse_duration, parse_size, to_mib
from puhui.v1 import job_pb2

__all__ = ["JobFile", "read_job_file"]

_MOST_BYTES = 2**20


def _split(value: Any) -> Any:
    try:
        words = shlex.split(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("has a quotation mark that is not closed") from None
    if words in ([], [""]):
        raise ValueError("is empty; say what to run, such as python3 train.py")
    return words


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema({"type": "string", "examples": ["90s", "10m", "1h30m"]}),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"type": "string", "examples": ["24GB", "12Gi"]}),
]
Command = Annotated[
    list[str],
    BeforeValidator(_split),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class ResourcesPart(_Part):
    """What the job needs. What is not said is predicted or defaulted."""

    profile: str = Field(default="", description="Exact MIG profile, such as 2g.20gb. Wins over everything else.")
    memory: Size | None = Field(default=None, description="Device memory. Wins over the prediction.")
    cpus: float = Field(default=0, ge=0, description="Host CPUs; 0 is no limit.")
    host_memory: Size | None = Field(default=None, description="Host memory.")
    pids: int = Field(default=0, ge=0, description="Processes and threads; 0 is the node's default.")
    network: bool = Field(default=False, description="Whether the container gets a network.")


class InputPart(_Part):
    """Data that the job reads beside its code, so that the prediction can count it."""

    name: str = Field(description="A name for people.")
    size: Size = Field(description="Its size.")


class IdlePart(_Part):
    """When an unused share may be taken back."""

    after: Duration | None = Field(default=None, description="Unused for this long is idle.")
    below_percent: float = Field(default=0, ge=0, le=100, description="Utilization below this is unused.")
    reclaim: Literal["", "detach", "checkpoint", "stop", "never"] = Field(
        default="", description="How it may be taken back: this way or a milder one; stop only when somebody waits."
    )
    start_grace: Duration | None = Field(default=None, description="Busy for this long before its card is used first.")
    warn_signal: bool = Field(default=False, description="Send SIGUSR1 to what runs before its share is taken.")
    on_reclaim: Command | None = Field(default=None, description="Command run in the container before that.")
    on_reclaim_limit: Duration | None = Field(default=None, description="Longest that it may take; default 10s.")

    def policy(self) -> job_pb2.IdlePolicy:
        """Returns what a centre is asked for."""
        policy = job_pb2.IdlePolicy(
            idle_below_percent=self.below_percent, warn_signal=self.warn_signal, on_reclaim=self.on_reclaim or ()
        )
        if self.after is not None:
            policy.idle_after.CopyFrom(duration(self.after))
        if self.start_grace is not None:
            policy.start_grace.CopyFrom(duration(self.start_grace))
        if self.on_reclaim_limit is not None:
            policy.on_reclaim_limit.CopyFrom(duration(self.on_reclaim_limit))
        if self.reclaim:
            policy.reclaim_mode = reclaim_mode(self.reclaim)
        return policy


class PeersPart(_Part):
    """Where the job may run."""

    here_only: bool = Field(default=False, description="Never forward it.")
    preferred: list[str] = Field(default_factory=list, description="Peers to ask first.")
    max_wait: Duration | None = Field(default=None, description="Ask peers only when the wait here would be longer.")
    labels: dict[str, str] = Field(default_factory=dict, description="Only peers with these labels may run it.")
    not_labels: dict[str, str] = Field(default_factory=dict, description="No peer with one of these may run it.")

    def policy(self) -> job_pb2.PeerPolicy:
        """Returns what a centre is asked for."""
        policy = job_pb2.PeerPolicy(
            here_only=self.here_only,
            preferred_peers=self.preferred,
            required_labels=self.labels,
            forbidden_labels=self.not_labels,
        )
        if self.max_wait is not None:
            policy.max_wait.CopyFrom(duration(self.max_wait))
        return policy


class JobFile(_Part):
    """A job for Puhui."""

    name: str = Field(default="", description="A name for people: lower-case letters, digits, '.', '_', '-'.")
    type: Literal["batch", "session"] = Field(
        "batch", description="batch runs to its end; session lives until stopped."
    )
    command: Command = Field(description="Command; a string is split as a shell does, but no shell runs it.")
    directory: str = Field(default=".", description="Folder of the code, relative to this file.")
    image: str = Field(default="", description="Container image; empty is the centre's default.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment of the command.")
    resources: ResourcesPart = Field(default_factory=ResourcesPart, description="What it needs.")
    inputs: list[InputPart] = Field(default_factory=list, description="Data that it reads beside its code.")
    priority: int = Field(default=0, ge=-100, le=100, description="Higher goes first; 0 is normal.")
    max_duration: Duration | None = Field(default=None, description="The command is ended when it has run this long.")
    stop_grace: Duration | None = Field(default=None, description="Time between SIGTERM and SIGKILL.")
    labels: dict[str, str] = Field(default_factory=dict, description="Free-form labels.")
    tenant: str = Field(default="", description="Name of the tenant; empty is default.")
    idle: IdlePart | None = Field(default=None, description="When its unused share may be taken back.")
    peers: PeersPart | None = Field(default=None, description="Where it may run.")

    def spec(self) -> job_pb2.JobSpec:
        """Returns what a centre is asked for."""
        resources = self.resources
        spec = job_pb2.JobSpec(
            name=self.name,
            kind=job_pb2.JOB_KIND_SESSION if self.type == "session" else job_pb2.JOB_KIND_BATCH,
            command=self.command,
            image=self.image,
            env=self.env,
            resources=job_pb2.Resources(
                profile=resources.profile,
                memory_mib=to_mib(resources.memory or 0),
                cpus=resources.cpus,
                host_memory_mib=to_mib(resources.host_memory or 0),
                pids=resources.pids,
                network=resources.network,
            ),
            inputs=[job_pb2.DataInput(name=item.name, size_bytes=item.size) for item in self.inputs],
            priority=self.priority,
            labels=self.labels,
            tenant=self.tenant,
        )
        if self.max_duration is not None:
            spec.max_duration.CopyFrom(duration(self.max_duration))
        if self.stop_grace is not None:
            spec.stop_grace.CopyFrom(duration(self.stop_grace))
        if self.idle is not None:
            spec.idle.CopyFrom(self.idle.policy())
        if self.peers is not None:
            spec.peers.CopyFrom(self.peers.policy())
        return spec


_EXPECTED = {
    "missing": "is missing",
    "model_type": "must be fields, each `name: value`",
    "model_attributes_type": "must be fields, each `name: value`",
    "dict_type": "must be fields, each `name: value`",
    "list_type": "must be a list, such as [a, b]",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
}

_PARTS: dict[str, type[BaseModel]] = {
    "": JobFile,
    "resources": ResourcesPart,
    "inputs": InputPart,
    "idle": IdlePart,
    "peers": PeersPart,
}


def read_job_file(path: Path) -> JobFile:
    """Reads a job file.

    Raises:
        Mistake: JOB_FILE_UNREADABLE; JOB_FILE_INVALID, with the lines and fields that are wrong.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise Mistake("JOB_FILE_UNREADABLE", f"{path} is larger than 1 MiB; it is no job file", file=str(path))
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise Mistake("JOB_FILE_UNREADABLE", f"{path}: there is no such file", file=str(path)) from error
    except OSError as error:
        raise Mistake("JOB_FILE_UNREADABLE", f"{path} cannot be read: {error.strerror}", file=str(path)) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Mistake("JOB_FILE_UNREADABLE", f"{path}: {_not_yaml(error)}", file=str(path)) from error
    lines: dict[tuple[str | int, ...], int] = {}
    twice: list[tuple[tuple[str | int, ...], int]] = []
    if root is not None:
        _note_lines(root, (), lines, twice)
    if twice:
        (place, line), *_ = twice
        raise _invalid(path, [(line, ".".join(map(str, place)), "is there twice; keep one")])
    try:
        return JobFile.model_validate(document if document is not None else {})
    except ValidationError as error:
        wrong = []
        for item in error.errors():
            place = item["loc"]
            # A field that is missing has no line of its own; that of its surroundings is close.
            line = next((lines[place[:depth]] for depth in range(len(place), -1, -1) if place[:depth] in lines), 1)
            wrong.append(
                (
                    line,
                    ".".join(map(str, place)) or "the file",
                    _complaint(item["type"], place, item["msg"], item.get("ctx", {})),
                )
            )
        raise _invalid(path, wrong) from error


def _note_lines(
    node: yaml.Node,
    place: tuple[str | int, ...],
    lines: dict[tuple[str | int, ...], int],
    twice: list[tuple[tuple[str | int, ...], int]],
) -> None:
    lines.setdefault(place, node.start_mark.line + 1)
    if len(place) > 8:  # deeper than any field; an alias may even lead in a circle
        return
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            inner = (*place, str(key.value))
            if key.value in seen:
                twice.append((inner, key.start_mark.line + 1))
            seen.add(key.value)
            lines[inner] = key.start_mark.line + 1
            _note_lines(value, inner, lines, twice)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_lines(value, (*place, index), lines, twice)


def _not_yaml(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        problem = (error.problem or "").replace("'<stream end>'", "the end of the file")
        return f"line {error.problem_mark.line + 1}: this is no YAML: {problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return "this is no YAML: it holds a character that is no text"
    return "this is no YAML"


def _complaint(kind: str, place: tuple[str | int, ...], message: str, context: Mapping[str, Any]) -> str:
    if kind == "extra_forbidden":
        part = _PARTS.get(str(place[0]) if len(place) > 1 else "", JobFile)
        close = difflib.get_close_matches(str(place[-1]), part.model_fields, n=1, cutoff=0.6)
        known = f"did you mean {close[0]}?" if close else "there are: " + ", ".join(part.model_fields)
        return f"is no field of a job file; {known}"
    if kind == "string_type":
        return 'must be text; put it in quotes, such as "yes"'
    if kind == "literal_error":
        return "must be " + str(context["expected"]).removeprefix("'', ").replace("'", "")
    if kind in ("greater_than_equal", "less_than_equal"):
        least = kind == "greater_than_equal"
        return f"must be at {'least' if least else 'most'} {context['ge' if least else 'le']:g}"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind == "list_type" and place == ("command",):
        return "must be text, such as python3 train.py, or a list of words"
    return _EXPECTED.get(kind, "is not what belongs here; `puhui schema` says what does")


def _invalid(path: Path, wrong: list[tuple[int, str, str]]) -> Mistake:
    said = "; ".join(f"line {line}: {field}: {complaint}" for line, field, complaint in wrong)
    return Mistake("JOB_FILE_INVALID", f"{path}: {said}", file=str(path), line=str(wrong[0][0]), field=wrong[0][1])
