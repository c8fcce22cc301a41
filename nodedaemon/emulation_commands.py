"""The commands of `puhui-nodedaemon emulation`: what an operator does to emulated cards while daemons serve them.

Each names the state directory of a node daemon that was started with --emulate. The cards are those of every process
that uses that directory, so what is done here is what the daemon meets next.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import pynvml
import typer

from nodedaemon.emulation import (
    CardBusyError,
    DamagedStateError,
    Fault,
    Latency,
    NoEmulationError,
    Operator,
    UnknownSliceError,
    UuidPolicy,
    When,
    functions,
)
from nodedaemon.emulation_report import fault_line, latency_lines, report

__all__ = ["app"]

app = typer.Typer(name="emulation", no_args_is_help=True, help="Looks at emulated cards, and makes them go wrong.")
_faults = typer.Typer(name="fault", no_args_is_help=True, help="Makes calls fail, late, or out of date.")
app.add_typer(_faults)


class MigSwitch(StrEnum):
    """What MIG mode can be."""

    ON = "on"
    OFF = "off"


_State = Annotated[
    Path, typer.Option("--state", envvar="PUHUI_NODE_STATE", help="State directory of the daemon with emulated cards.")
]


@app.command()
def show(state: _State) -> None:
    """Shows the cards, their slices with who holds them, and what is set to go wrong."""
    with _operator(state) as operator:
        typer.echo(report(operator.look(), operator.holders()))


@app.command()
def reboot(
    state: _State,
    force: Annotated[
        bool, typer.Option("--force", help="Take slices away from under the processes that hold them.")
    ] = False,
) -> None:
    """Reboots the emulated node: slices vanish, and MIG mode is off on Hopper and later. Ends no process."""
    with _operator(state) as operator:
        pids = operator.reboot(force=force)
    typer.echo("The emulated node was rebooted: it has no slices.")
    if pids:
        seen = ", ".join(str(pid) for pid in pids if pid) or "processes that cannot be seen from here"
        typer.echo(f"A real reboot would have ended those that held them; they still run: {seen}.")


@app.command()
def reset(index: Annotated[int, typer.Argument(help="NVML index of the card.", min=0)], state: _State) -> None:
    """Resets one card: its slices vanish, and a pending MIG mode holds."""
    with _operator(state) as operator:
        try:
            operator.reset_gpu(index)
        except IndexError:
            _fail(f"There is no GPU {index}; `emulation show` lists those there are.")
    typer.echo(f"GPU {index} was reset: it has no slices.")


@app.command()
def mig(
    index: Annotated[int, typer.Argument(help="NVML index of the card.", min=0)],
    mode: Annotated[MigSwitch, typer.Argument(help="on, or off.")],
    state: _State,
) -> None:
    """Turns MIG mode of one card on or off, as `nvidia-smi -i INDEX -mig 1` does. Ampere wants a reset after it."""
    with _operator(state) as operator:
        try:
            done = operator.set_mig(index, enabled=mode is MigSwitch.ON)
        except IndexError:
            _fail(f"There is no GPU {index}; `emulation show` lists those there are.")
    later = "" if done else f" after its reset: `puhui-nodedaemon emulation reset {index}`"
    typer.echo(f"MIG mode of GPU {index} is {mode.value}{later}.")


@_faults.command("add")
def add_fault(
    function: Annotated[str, typer.Argument(help="NVML function, such as nvmlGpuInstanceDestroy.")],
    state: _State,
    code: Annotated[
        str, typer.Option(help="What it answers: a name of nvml.h such as IN_USE, or a number.")
    ] = "SUCCESS",
    count: Annotated[int, typer.Option(min=1, help="How many calls are struck.")] = 1,
    skip: Annotated[int, typer.Option(min=0, help="How many are let pass first.")] = 0,
    delay: Annotated[float, typer.Option(min=0, help="How much longer they take, in seconds.")] = 0.0,
    when: Annotated[
        When, typer.Option(help="before anything is done, or after the work is done: a lost answer.")
    ] = When.BEFORE,
    gpu: Annotated[int | None, typer.Option(min=0, help="Only calls about the GPU with this index.")] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="They see the cards as they were before the change that comes next.")
    ] = False,
) -> None:
    """Makes the next calls of one function go wrong, whichever process makes them."""
    name = function.removesuffix("_v2").removesuffix("_v3")
    if name not in functions():
        _fail(
            f"The emulated driver has no function {function!r}; nvml.h has the names, such as nvmlGpuInstanceDestroy."
        )
    with _operator(state) as operator:
        try:
            fault = Fault(name, _code(code), count, skip, delay, when, gpu, stale)
        except ValueError as error:
            _fail(str(error))
        operator.inject(fault)
    typer.echo(fault_line(fault))


@_faults.command("list")
def list_faults(state: _State) -> None:
    """Lists the faults not yet used."""
    with _operator(state) as operator:
        faults = operator.look().faults
    typer.echo("\n".join(fault_line(fault) for fault in faults) or "No fault waits.")


@_faults.command("clear")
def clear_faults(state: _State) -> None:
    """Forgets every fault not yet used."""
    with _operator(state) as operator:
        count = operator.clear_faults()
    typer.echo(f"Faults forgotten: {count}.")


@app.command()
def latency(
    state: _State,
    default: Annotated[
        float | None, typer.Option(min=0, help="Seconds that every call takes which is not named.")
    ] = None,
    call: Annotated[
        list[str] | None, typer.Option(help="FUNCTION=SECONDS, such as nvmlGpuInstanceDestroy=0.1; may be repeated.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Forget all latencies first.")] = False,
) -> None:
    """Shows or sets how long calls take, beyond their work."""
    named = dict(_seconds(text) for text in call or [])
    with _operator(state) as operator:
        now = Latency() if clear else operator.look().latency
        if default is not None:
            now = replace(now, default_seconds=default)
        now = replace(now, by_function_seconds={**now.by_function_seconds, **named})
        if clear or named or default is not None:
            operator.set_latency(now)
    typer.echo("\n".join(latency_lines(now)))


@app.command()
def uuids(
    policy: Annotated[UuidPolicy, typer.Argument(help="new, or reused.")],
    state: _State,
) -> None:
    """Chooses whether a slice that is created again at the same place gets a new UUID."""
    with _operator(state) as operator:
        operator.set_uuid_policy(policy)
    typer.echo(f"A slice that is created again gets {'a new' if policy is UuidPolicy.NEW else 'its old'} UUID.")


@app.command()
def hold(slice_uuid: Annotated[str, typer.Argument(help="UUID of a slice: MIG-...")], state: _State) -> None:
    """Holds a slice as a process that is of no job: until its input ends, or SIGTERM. Prints its pid first."""
    with _operator(state) as operator:
        node = operator.cap_node(slice_uuid)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        with node.open("rb"):
            typer.echo(os.getpid())
            sys.stdin.buffer.read()
    except OSError as error:
        _fail(f"The slice cannot be held: {error}.")


def _code(text: str) -> int:
    if text.isdecimal():
        return int(text)
    name = text.upper().removeprefix("NVML_").removeprefix("ERROR_")
    value = 0 if name == "SUCCESS" else getattr(pynvml, f"NVML_ERROR_{name}", None)
    if not isinstance(value, int):
        raise ValueError(f"nvml.h has no return code {text!r}; write a name such as IN_USE, or its number.")
    return value


def _seconds(text: str) -> tuple[str, float]:
    function, equals, seconds = text.partition("=")
    name = function.removesuffix("_v2").removesuffix("_v3")
    if name not in functions():
        _fail(f"The emulated driver has no function {function!r}.")
    try:
        value = float(seconds)
    except ValueError:
        value = -1.0
    if not equals or not 0 <= value < float("inf"):
        _fail(f"{text!r} has no seconds; write {name}=0.1.")
    return name, value


@contextmanager
def _operator(state: Path) -> Iterator[Operator]:
    try:
        yield Operator.of_existing(state / "emulation")
    except (CardBusyError, DamagedStateError, NoEmulationError, UnknownSliceError) as error:
        _fail(str(error))
    except PermissionError as error:
        _fail(f"{error}. Run this as the user that the daemon runs as, or as root.")


def _fail(message: str) -> NoReturn:
    typer.echo(f"puhui-nodedaemon: {message}", err=True)
    raise typer.Exit(1)
