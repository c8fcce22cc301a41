"""The options that jobs and sessions share: what they need, when an unused share may be taken back, where they run."""

from __future__ import annotations

import enum
import inspect
import shlex
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from puhui.cli.terminal import Mistake
from puhui.rpc.moment import duration
from puhui.rpc.quantities import parse_duration, parse_percent, parse_size, to_mib
from puhui.v1 import job_pb2

__all__ = ["Reclaim", "SpecOptions", "pair", "reclaim_mode", "takes_options"]

T = TypeVar("T")


class Reclaim(enum.StrEnum):
    """How an idle share may be taken back."""

    DETACH = "detach"
    CHECKPOINT = "checkpoint"
    STOP = "stop"
    NEVER = "never"


def reclaim_mode(word: str) -> job_pb2.ReclaimMode.ValueType:
    """Returns the mode that a word stands for."""
    return job_pb2.ReclaimMode.Value(f"RECLAIM_MODE_{word.upper()}")


@dataclass(frozen=True)
class SpecOptions:
    """What was written on the command line; None is not said."""

    profile: Annotated[str | None, typer.Option(help="Exact slice, such as 2g.20gb; wins over --memory.")] = None
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Device memory, such as 12GB; wins over the prediction.")
    ] = None
    cpus: Annotated[float | None, typer.Option(min=0, help="Host CPUs; 0 is no limit.")] = None
    host_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Host memory, such as 8GB.")] = None
    network: Annotated[
        bool | None, typer.Option("--network/--no-network", help="Whether the container gets a network; default: no.")
    ] = None
    name: Annotated[str | None, typer.Option(help="A name for people.")] = None
    image: Annotated[str | None, typer.Option(help="Container image.")] = None
    env: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Environment; may be repeated.")] = None
    input: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SIZE",
            help="Size of data that the code will read, for the prediction alone: the data itself is not brought in. "
            "May be repeated.",
        ),
    ] = None
    max_duration: Annotated[str | None, typer.Option(metavar="TIME", help="End the command after, say, 10m.")] = None
    stop_grace: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time between SIGTERM and SIGKILL, such as 20s.")
    ] = None
    priority: Annotated[int | None, typer.Option(min=-100, max=100, help="Higher goes first; 0 is normal.")] = None
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Label; may be repeated.")] = None
    tenant: Annotated[str | None, typer.Option(help="Name of the tenant; else default.")] = None
    idle_after: Annotated[
        str | None, typer.Option(metavar="TIME", help="Unused for this long, the share may be taken back.")
    ] = None
    idle_below: Annotated[
        str | None, typer.Option(metavar="PERCENT", help="Utilization below this is unused, such as 1%.")
    ] = None
    start_grace: Annotated[
        str | None, typer.Option(metavar="TIME", help="Until it has used its card, it counts as busy for this long.")
    ] = None
    reclaim: Annotated[
        Reclaim | None,
        typer.Option(
            help="How its share may be taken back: this way or a milder one. stop ends what runs, and only when "
            "somebody waits for the share.",
            show_default=False,
        ),
    ] = None
    warn_signal: Annotated[
        bool | None,
        typer.Option("--warn-signal/--no-warn-signal", help="Send SIGUSR1 to what runs before its share is taken."),
    ] = None
    on_reclaim: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="Run this in the container before its share is taken.")
    ] = None
    on_reclaim_limit: Annotated[
        str | None, typer.Option(metavar="TIME", help="Longest that it may take; default: 10s.")
    ] = None
    here_only: Annotated[
        bool | None, typer.Option("--here-only/--no-here-only", help="Never let a peer run it; default: no.")
    ] = None
    prefer: Annotated[
        list[str] | None,
        typer.Option(metavar="PEER", help="Ask this peer first when it would have to wait; may be repeated."),
    ] = None
    max_wait: Annotated[
        str | None, typer.Option(metavar="TIME", help="Ask peers only when it would wait longer than this here.")
    ] = None
    peer_label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only peers with this label may run it; may be repeated."),
    ] = None
    not_peer_label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="No peer with this label may run it; may be repeated."),
    ] = None

    def apply(self, spec: job_pb2.JobSpec) -> None:
        """Writes what was said into a spec, over what is there.

        Raises:
            Mistake: something of it cannot be meant.
        """
        for option in ("name", "image", "priority", "tenant"):
            value = getattr(self, option)
            if value is not None:
                setattr(spec, option, value)
        for option in ("profile", "cpus", "network"):
            value = getattr(self, option)
            if value is not None:
                setattr(spec.resources, option, value)
        if self.host_memory is not None:
            spec.resources.host_memory_mib = to_mib(_parsed("--host-memory", parse_size, self.host_memory))
        if self.memory is not None:
            spec.resources.memory_mib = to_mib(_parsed("--memory", parse_size, self.memory))
        if self.max_duration is not None:
            spec.max_duration.CopyFrom(duration(_parsed("--max-duration", parse_duration, self.max_duration)))
        if self.stop_grace is not None:
            spec.stop_grace.CopyFrom(duration(_parsed("--stop-grace", parse_duration, self.stop_grace)))
        for text in self.env or ():
            key, value = pair("--env", text)
            spec.env[key] = value
        for text in self.label or ():
            key, value = pair("--label", text)
            spec.labels[key] = value
        for text in self.input or ():
            key, value = pair("--input", text)
            spec.inputs.add(name=key, size_bytes=_parsed("--input", parse_size, value))
        self._apply_idle(spec)
        self._apply_peers(spec)

    def _apply_idle(self, spec: job_pb2.JobSpec) -> None:
        # Touched only when something of it was said: what is not said is up to tenant and centre.
        for option in ("idle_after", "start_grace", "on_reclaim_limit"):
            text = getattr(self, option)
            if text is not None:
                length_s = _parsed("--" + option.replace("_", "-"), parse_duration, text)
                getattr(spec.idle, option).CopyFrom(duration(length_s))
        if self.idle_below is not None:
            spec.idle.idle_below_percent = _parsed("--idle-below", _threshold, self.idle_below)
        if self.reclaim is not None:
            spec.idle.reclaim_mode = reclaim_mode(self.reclaim)
        if self.warn_signal is not None:
            spec.idle.warn_signal = self.warn_signal
        if self.on_reclaim is not None:
            words = _parsed("--on-reclaim", _words, self.on_reclaim)
            del spec.idle.on_reclaim[:]
            spec.idle.on_reclaim.extend(words)

    def _apply_peers(self, spec: job_pb2.JobSpec) -> None:
        if self.here_only and self.prefer:
            raise Mistake("USAGE", "--here-only and --prefer: it cannot be both")
        both = set(self.peer_label or ()) & set(self.not_peer_label or ())
        if both:
            raise Mistake("USAGE", f"--peer-label and --not-peer-label {min(both)}: it cannot be both")
        if self.here_only is not None:
            spec.peers.here_only = self.here_only
        if self.prefer:
            del spec.peers.preferred_peers[:]
            spec.peers.preferred_peers.extend(self.prefer)
        if self.max_wait is not None:
            spec.peers.max_wait.CopyFrom(duration(_parsed("--max-wait", parse_duration, self.max_wait)))
        for text in self.peer_label or ():
            key, value = pair("--peer-label", text)
            spec.peers.required_labels[key] = value
        for text in self.not_peer_label or ():
            key, value = pair("--not-peer-label", text)
            spec.peers.forbidden_labels[key] = value
        _require_one_mind(spec.peers)


def _require_one_mind(peers: job_pb2.PeerPolicy) -> None:
    """Refuses what command line and job file say together and cannot be meant, in the words of both."""
    preferred = list(peers.preferred_peers)
    twice = next((name for name in preferred if preferred.count(name) > 1), "")
    if twice:
        raise Mistake("USAGE", f"--prefer {twice} is there twice; name each peer once, the dearest first")
    if peers.here_only and preferred:
        raise Mistake(
            "USAGE",
            f"it is to run here only, and to prefer {', '.join(preferred)}: it cannot be both; leave out one of "
            "--here-only and --prefer, or of here_only and preferred in the job file",
        )
    labels = sorted(set(peers.required_labels.items()) & set(peers.forbidden_labels.items()))
    if labels:
        raise Mistake(
            "USAGE",
            f"{'='.join(labels[0])} is asked for and forbidden: it cannot be both; leave out one of --peer-label and "
            "--not-peer-label, or of labels and not_labels in the job file",
        )


def takes_options(kind: type[Any], command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command, whose first parameter is of that kind (a dataclass), all of its options on the command line."""
    hints = get_type_hints(kind, include_extras=True)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]
    _, *own = inspect.signature(command, eval_str=True).parameters.values()

    def wrapper(**given: Any) -> None:
        chosen = {option.name: given.pop(option.name) for option in options}
        command(kind(**chosen), **given)

    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    parameters = [*options, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return wrapper


def pair(option: str, text: str) -> tuple[str, str]:
    """Returns the two halves of KEY=VALUE.

    Raises:
        Mistake: it is not written so.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise Mistake("USAGE", f"{option} {text}: write it as KEY=VALUE")
    return key, value


def _parsed(option: str, parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise Mistake("USAGE", f"{option}: {error}") from error


def _threshold(text: str) -> float:
    percent = parse_percent(text)
    if not percent:
        raise ValueError("nothing is below 0%; write 1% or 0.5%")
    return percent


def _words(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError:
        raise ValueError("a quotation mark is not closed") from None
    if not words:
        raise ValueError("it is empty; name a command, such as 'python3 save.py'")
    return words
