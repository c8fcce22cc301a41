"""`puhui up` and `puhui down`: a whole centre on this machine, with emulated cards."""

from __future__ import annotations

import json as json_text
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import grpc
import typer

import puhui
from puhui.cli.fleet import cards_of, runtime_of
from puhui.cli.interrupts import Interrupts
from puhui.cli.job_options import json_flag
from puhui.cli.local_centre import LocalOptions
from puhui.cli.local_centres import LocalCentres
from puhui.cli.local_state import StateFolder, default_state, local_command
from puhui.cli.message_json import json_of
from puhui.cli.terminal import Mistake, terminal
from puhui.cli.words import count
from puhui.client import DEFAULT_ADDRESS, Centre, Refusal
from puhui.rpc.notify import ReadySocket, notify_ready, notify_stopping
from puhui.v1 import fleet_service_pb2, job_pb2
from puhui.v1.job_service_pb2 import JobFilter

__all__ = ["add_commands"]

_RUNTIMES = ("auto", "podman", "process")
_LOG_LEVELS = ("debug", "info", "warning", "error")
_CARDS = re.compile(r"\s*[\w.-]+(\s*:\s*\d+)?(\s*,\s*[\w.-]+(\s*:\s*\d+)?)*\s*", re.ASCII)
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

    Nothing on this machine's own GPUs is touched. A daemon that dies is started again; jobs run on meanwhile.
    Ctrl-C, or `puhui down`, stops it.
    """
    if runtime not in _RUNTIMES:
        raise Mistake("USAGE", f"--runtime {runtime}: there are " + ", ".join(_RUNTIMES))
    if log_level not in _LOG_LEVELS:
        raise Mistake("USAGE", f"--log-level {log_level}: there are " + ", ".join(_LOG_LEVELS))
    if not _CARDS.fullmatch(emulate):
        raise Mistake("USAGE", f"--emulate {emulate!r}: write MODEL:COUNT,..., such as H100-80GB-SXM5:2,A100-80GB:1")
    folder = StateFolder((state or default_state()).absolute())
    folder.prepare()
    options = LocalOptions((emulate,), port, runtime, image, podman_user, log_level)
    if detach:
        _start_in_background(folder, options)
    else:
        _serve(folder, options)


def _serve(folder: StateFolder, options: LocalOptions) -> None:
    interrupts = Interrupts()
    with folder.locked():
        for name in folder.stop_leftovers():
            terminal().note(f"stopped a {name} whose `puhui up` had been killed")
        centre = LocalCentres(folder, options, terminal().note, interrupts.held)
        try:
            centre.start()
            _announce(folder, centre.address, detached=False)
            notify_ready(centre.address)
            centre.watch()
        except KeyboardInterrupt:
            notify_stopping()
            _note_running(_running_jobs(centre.address), folder)
        finally:
            centre.stop()
        terminal().note("stopped")


def _start_in_background(folder: StateFolder, options: LocalOptions) -> None:
    record = folder.read()
    if record is not None and record.supervisor.runs():
        raise folder.running_already()
    log = folder.logs / "up.log"
    # With --json it writes why it failed in a form that can be read back.
    command = [sys.executable, "-m", "puhui.cli", "up", "--json", "--state", str(folder.path), *options.arguments()]
    with ReadySocket() as ready:
        # Another `puhui up` may be starting now; what it writes must stay.
        with log.open("ab") as output:
            begin = output.tell()
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
            raise _failed_to_start(log, begin) from error
    # It outlives this process, which must not complain about a child that it has not waited for.
    process.returncode = 0
    _announce(folder, address, detached=True)


def _failed_to_start(log: Path, begin: int) -> Refusal:
    """Returns why the `puhui up` in the background failed, which it wrote into its log from byte `begin` on."""
    for line in reversed(log.read_bytes()[begin:].decode(errors="replace").splitlines()):
        if line.startswith('{"error": '):
            error = json_text.loads(line)["error"]
            code = grpc.StatusCode[error["code"]]
            return Refusal(code, error["reason"], error["message"], **error["metadata"])
    return Refusal(
        grpc.StatusCode.UNAVAILABLE,
        "CENTRE_NOT_STARTED",
        f"the local centre did not start within {_DETACH_S:g} s, or was killed; {log} and the logs beside it say more",
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
        ("stop", local_command("down", folder.path) if detached else "Ctrl-C"),
    ):
        screen.text(f"{label:<11} {text}\n")
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


# An idle job's container runs, too.
_LIVING = (
    job_pb2.JOB_STATE_STARTING,
    job_pb2.JOB_STATE_RUNNING,
    job_pb2.JOB_STATE_IDLE,
    job_pb2.JOB_STATE_RESUMING,
)


def _running_jobs(address: str) -> list[str]:
    """Returns the ids of the jobs that run; none when the centre does not answer."""
    if not address:
        return []
    active = JobFilter(states=_LIVING)
    try:
        with Centre(address) as centre:
            return [job.id for job in centre.jobs(active)]
    except Refusal:
        return []  # it is stopping for a reason of its own


def _note_running(running: list[str], folder: StateFolder) -> None:
    if not running:
        return
    verb = "runs" if len(running) == 1 else "run"
    again, them = local_command("up", folder.path), "it" if len(running) == 1 else "them"
    terminal().note(f"{count(len(running), 'job')} {verb} on: {', '.join(running)}; `{again}` takes {them} up again")


def _down(
    state: State = None,
    json: Annotated[bool, json_flag] = False,
) -> None:
    """Stop the centre that `puhui up` started."""
    folder = StateFolder((state or default_state()).absolute())
    if state is not None and not folder.path.is_dir():
        raise Refusal(
            grpc.StatusCode.NOT_FOUND,
            "STATE_NOT_FOUND",
            f"{folder.path}: there is no such folder; name the --state that `puhui up` had",
            state=str(folder.path),
        )
    before = folder.read()
    running = _running_jobs(before.address) if before is not None and before.supervisor.runs() else []
    record = folder.stop()
    if terminal().as_json:
        stopped = {"stopped": record is not None, "address": record.address if record else None}
        terminal().json({**stopped, "running_jobs": running if record is not None else []})
    elif record is None:
        terminal().note(f"no local centre runs with its state in {folder.path}")
    else:
        terminal().note(f"the centre at {record.address} has stopped; its state stays in {folder.path}")
        _note_running(running, folder)
