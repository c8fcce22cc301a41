"""`puhui up` and `puhui down`: a whole centre on this machine, with emulated cards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import grpc
import typer

import puhui
from puhui.cli.fleet import cards_of, runtime_of
from puhui.cli.job_options import json_flag
from puhui.cli.local_centre import LocalCentre, LocalOptions, last_lines
from puhui.cli.local_state import StateFolder, default_state
from puhui.cli.message_json import json_of
from puhui.cli.terminal import Mistake, terminal
from puhui.client import DEFAULT_ADDRESS, Centre, Refusal
from puhui.rpc.notify import ReadySocket, notify_ready, notify_stopping
from puhui.v1 import fleet_service_pb2, job_pb2
from puhui.v1.job_service_pb2 import JobFilter

__all__ = ["add_commands"]

_RUNTIMES = ("auto", "podman", "process")
_JOIN_S = 20.0
_DETACH_S = 130.0

State = Annotated[
    Path | None,
    typer.Option(
        envvar="PUHUI_LOCAL_STATE",
        show_default=False,
        help="Folder of the centre's state; default: /var/lib/puhui/local for root, else below ~/.local/state.",
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Adds `up` and `down`."""
    app.command("up")(_up)
    app.command("down")(_down)


def _up(
    emulate: Annotated[
        str, typer.Option(metavar="MODEL:COUNT,...", help="Cards to emulate.")
    ] = "H100-80GB-SXM5:2,A100-80GB:1",
    state: State = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 is any free one.")] = 7070,
    runtime: Annotated[str, typer.Option(help="auto, podman, or process (no isolation).")] = "auto",
    image: Annotated[str, typer.Option(help="Image of jobs that name none; default: the node daemon's.")] = "",
    podman_user: Annotated[str, typer.Option(help="As root: user that owns the containers.")] = "",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Serve in the background.")] = False,
    json: Annotated[bool, json_flag] = False,
) -> None:
    """Start a centre on this machine, with emulated cards: a control plane and a node daemon.

    Nothing on this machine's own GPUs is touched. Ctrl-C, or `puhui down`, stops it.
    """
    if runtime not in _RUNTIMES:
        raise Mistake("USAGE", f"--runtime {runtime}: there are " + ", ".join(_RUNTIMES))
    folder = StateFolder((state or default_state()).absolute())
    folder.prepare()
    options = LocalOptions(emulate, port, runtime, image, podman_user, log_level)
    if detach:
        _start_in_background(folder, options)
    else:
        _serve(folder, options)


def _serve(folder: StateFolder, options: LocalOptions) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    with folder.locked():
        for name in folder.stop_leftovers():
            terminal().note(f"stopped a {name} whose `puhui up` had been killed")
        centre = LocalCentre(folder, options)
        try:
            centre.start()
            _announce(folder, centre.address, detached=False)
            notify_ready(centre.address)
            failure = centre.wait()
        except KeyboardInterrupt:
            notify_stopping()
            _note_running(centre.address)
            return
        except Refusal as refusal:
            failure = refusal
        finally:
            centre.stop()
            terminal().note("stopped")
    _fail(failure)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _fail(failure: Refusal) -> NoReturn:
    tail = failure.metadata.get("tail")
    if tail and not terminal().as_json:
        terminal().note(tail)
        failure.metadata.pop("tail")
    raise failure


def _start_in_background(folder: StateFolder, options: LocalOptions) -> None:
    record = folder.read()
    if record is not None and record.supervisor.runs():
        raise folder.running_already()
    log = folder.logs / "up.log"
    command = [sys.executable, "-m", "puhui.cli", "up", "--state", str(folder.path), *options.arguments()]
    with ReadySocket() as ready:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, "NOTIFY_SOCKET": ready.path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            address = ready.wait(process.pid, _DETACH_S)
        except (ChildProcessError, TimeoutError, KeyboardInterrupt) as error:
            process.terminate()
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise
            raise _failed_to_start(log) from error
    # It outlives this process, which must not complain about a child that it has not waited for.
    process.returncode = 0
    _announce(folder, address, detached=True)


def _failed_to_start(log: Path) -> Refusal:
    terminal().note(last_lines(log))
    return Refusal(
        grpc.StatusCode.UNAVAILABLE,
        "CENTRE_NOT_STARTED",
        f"the local centre did not start; the lines above say why, and {log.parent} has the daemons' logs",
        log=str(log),
    )


def _announce(folder: StateFolder, address: str, *, detached: bool) -> None:
    """Says where the centre serves, what is emulated, and what to do next."""
    node = _joined(address)
    screen = terminal()
    if screen.as_json:
        document = {
            "address": address,
            "state": str(folder.path),
            "logs": str(folder.logs),
            "emulated": True,
            "node": json_of(node) if node is not None else None,
        }
        screen.json(document)
        return
    cards = ", ".join(cards_of(node.inventory)) if node is not None else "none: the node daemon has not joined"
    runtime = runtime_of(node.inventory.runtime) if node is not None else "unknown"
    server = "" if address == DEFAULT_ADDRESS else f"export PUHUI_SERVER={address}\n            "
    for label, text in (
        ("puhui", f"{puhui.__version__}, a local centre. EMULATED CARDS: no GPU computes, code runs on the CPU."),
        ("serves at", address),
        ("cards", cards),
        ("containers", runtime),
        ("state", str(folder.path)),
        ("logs", str(folder.logs)),
        ("try", f"{server}puhui run train.py"),
        ("stop", "puhui down" if detached else "Ctrl-C"),
    ):
        screen.show(f"{label:<11} {text}")
    for notice in node.inventory.runtime.notices if node is not None else ():
        screen.note(notice, "note")


def _joined(address: str) -> fleet_service_pb2.Node | None:
    """Waits until the node has joined, and returns it; None when it takes too long."""
    deadline = time.monotonic() + _JOIN_S
    with Centre(address) as centre:
        while time.monotonic() < deadline:
            for node in centre.nodes():
                if node.state == fleet_service_pb2.NODE_STATE_READY and node.inventory.gpus:
                    return node
            time.sleep(0.05)
    return None


def _note_running(address: str) -> None:
    if not address:
        return
    active = JobFilter(states=[job_pb2.JOB_STATE_STARTING, job_pb2.JOB_STATE_RUNNING])
    try:
        with Centre(address) as centre:
            running = [job.id for job in centre.jobs(active)]
    except Refusal:
        return  # it is stopping for a reason of its own
    if running:
        terminal().note(f"{', '.join(running)} run on; the next `puhui up` on this state takes them back", "jobs")


def _down(
    state: State = None,
    json: Annotated[bool, json_flag] = False,
) -> None:
    """Stop the centre that `puhui up` started."""
    folder = StateFolder((state or default_state()).absolute())
    record = folder.stop()
    if terminal().as_json:
        terminal().json({"stopped": record is not None, "address": record.address if record else None})
    elif record is None:
        terminal().note(f"no local centre runs with its state in {folder.path}")
    else:
        terminal().note(f"the centre at {record.address} has stopped; its state stays in {folder.path}")
