"""`puhui up`, `puhui down` and `puhui centres`: whole centres on this machine, with emulated cards."""

from __future__ import annotations

import contextlib
import json as json_text
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import grpc
import typer

from puhui.cli.interrupts import Interrupts
from puhui.cli.job_options import json_flag
from puhui.cli.local_centre import MOST_CENTRES, LocalOptions
from puhui.cli.local_centres import LocalCentres
from puhui.cli.local_facts import announce
from puhui.cli.local_state import Record, StateFolder, default_state, local_command, own_state
from puhui.cli.terminal import Mistake, table, terminal
from puhui.cli.words import count
from puhui.client import Centre, Refusal
from puhui.rpc.notify import ReadySocket, notify_ready, notify_stopping
from puhui.v1 import job_pb2
from puhui.v1.job_service_pb2 import JobFilter

__all__ = ["add_commands"]

_DEFAULT_CARDS = "H100-80GB-SXM5:2,A100-80GB:1"
_RUNTIMES = ("auto", "podman", "process")
_LOG_LEVELS = ("debug", "info", "warning", "error")
_CARDS = re.compile(r"\s*[\w.-]+(\s*:\s*\d+)?(\s*,\s*[\w.-]+(\s*:\s*\d+)?)*\s*", re.ASCII)
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
    """Adds `up`, `down` and `centres`."""
    app.command("up")(_up)
    app.command("down")(_down)
    app.command("centres")(_centres)


def _up(
    emulate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL:COUNT,...",
            show_default=False,
            help=f"Cards to emulate in each centre, or repeated, once per centre; default: {_DEFAULT_CARDS}.",
        ),
    ] = None,
    centers: Annotated[
        int,
        typer.Option("--centers", "--centres", min=1, max=MOST_CENTRES, help="Number of centres, peers of each other."),
    ] = 1,
    state: State = None,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Port on 127.0.0.1, others take the next free ones; 0 is any free one for each."
        ),
    ] = 7070,
    runtime: Annotated[str, typer.Option(help="auto, podman, or process (no isolation).")] = "auto",
    image: Annotated[str, typer.Option(help="Image of jobs that name none; default: the node daemon's.")] = "",
    podman_user: Annotated[str, typer.Option(help="As root: user that owns the containers.")] = "",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Serve in the background.")] = False,
    json: Annotated[bool, json_flag] = False,
) -> None:
    """Start a centre on this machine, with emulated cards: a control plane and a node daemon. Or several of them.

    Nothing on this machine's own GPUs is touched. A daemon that dies is started again; jobs run on meanwhile.
    Ctrl-C, or `puhui down`, stops all of it.
    """
    if runtime not in _RUNTIMES:
        raise Mistake("USAGE", f"--runtime {runtime}: there are " + ", ".join(_RUNTIMES))
    if log_level not in _LOG_LEVELS:
        raise Mistake("USAGE", f"--log-level {log_level}: there are " + ", ".join(_LOG_LEVELS))
    options = LocalOptions(_cards(emulate, centers), port, runtime, image, podman_user, log_level)
    folder = StateFolder((state or default_state()).absolute())
    folder.prepare()
    if detach:
        _start_in_background(folder, options)
    else:
        _serve(folder, options)


def _cards(emulate: list[str] | None, centers: int) -> tuple[str, ...]:
    """Returns the cards of each centre."""
    given = emulate if emulate is not None else [_DEFAULT_CARDS]
    for cards in given:
        if not _CARDS.fullmatch(cards):
            raise Mistake("USAGE", f"--emulate {cards!r}: write MODEL:COUNT,..., such as {_DEFAULT_CARDS}")
    if len(given) not in (1, centers):
        raise Mistake(
            "USAGE",
            f"--emulate is given {count(len(given), 'time')} for {count(centers, 'centre')}: "
            "give it once for all of them, or once for each",
        )
    return tuple(given) * (centers // len(given))


def _serve(folder: StateFolder, options: LocalOptions) -> None:
    interrupts = Interrupts()
    interrupts.catch()
    with folder.locked():
        for name in folder.stop_leftovers():
            terminal().note(f"stopped a {name} whose `puhui up` had been killed")
        here = LocalCentres(folder, options, terminal().note, interrupts)
        for name in here.left_out():
            terminal().note(f"{name} has state here and is not started; `--centers` says how many are")
        try:
            here.start()
            for sentence in here.pair():
                terminal().note(sentence)
            announce(folder, here.record(), detached=False)
            notify_ready(here.address)
            here.watch()
        except KeyboardInterrupt:
            notify_stopping()
            _note_running(_running_jobs(here.record()), folder)
        finally:
            here.stop()
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
            ready.wait(process.pid, _DETACH_S)
        except (ChildProcessError, TimeoutError, KeyboardInterrupt) as error:
            process.terminate()
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise
            raise _failed_to_start(log, begin) from error
    # It outlives this process, which must not complain about a child that it has not waited for.
    process.returncode = 0
    record = folder.read()
    if record is None:  # it has been stopped already
        raise _failed_to_start(log, begin)
    announce(folder, record, detached=True)


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


# An idle job's container runs, too.
_LIVING = (
    job_pb2.JOB_STATE_STARTING,
    job_pb2.JOB_STATE_RUNNING,
    job_pb2.JOB_STATE_IDLE,
    job_pb2.JOB_STATE_RESUMING,
)


def _running_jobs(record: Record) -> list[str]:
    """Returns the ids of the jobs that run; of a centre that does not answer, none. One at another of them is one."""
    active = JobFilter(states=_LIVING)
    names = {here.name for here in record.centres}
    found = []
    for here in record.centres:
        with contextlib.suppress(Refusal):  # it is stopping for a reason of its own
            if here.address:
                with Centre(here.address) as centre:
                    found += [job.id for job in centre.jobs(active) if job.guest.peer not in names]
    return found


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
    """Stop what `puhui up` started."""
    folder = StateFolder((state or default_state()).absolute())
    if state is not None and not folder.path.is_dir():
        raise Refusal(
            grpc.StatusCode.NOT_FOUND,
            "STATE_NOT_FOUND",
            f"{folder.path}: there is no such folder; name the --state that `puhui up` had",
            state=str(folder.path),
        )
    before = folder.read()
    running = _running_jobs(before) if before is not None and before.runs() else []
    record = folder.stop()
    if terminal().as_json:
        stopped = {"stopped": record is not None, "address": record.address if record else None}
        terminal().json({**stopped, "running_jobs": running if record is not None else []})
    elif record is None:
        terminal().note(f"no local centre runs with its state in {folder.path}")
    else:
        one = f"the centre at {record.address} has stopped; its state stays"
        several = f"{len(record.centres)} centres have stopped; their state stays"
        terminal().note(f"{one if len(record.centres) == 1 else several} in {folder.path}")
        _note_running(running, folder)


def _centres(
    state: State = None,
    json: Annotated[bool, json_flag] = False,
) -> None:
    """List the centres that `puhui up` runs on this machine. `--server NAME` talks to one of them.

    Those that were started with --state are found by the same --state, or by PUHUI_LOCAL_STATE.
    """
    folder = StateFolder((state or default_state()).absolute())
    record = folder.read()
    running = record.centres if record is not None and record.runs() else ()
    if terminal().as_json:
        terminal().json({"centres": [{**asdict(centre), "emulated": True} for centre in running]})
        return
    if not running:
        terminal().note(
            f"no local centre runs with its state in {folder.path}; start one with `puhui up`, or name the --state "
            "that a running one has"
        )
        return
    listed = table("NAME", "SERVER", "CARDS (EMULATED)", "PEERS REACH IT AT")
    for centre in running:
        listed.add_row(centre.name, centre.address, centre.emulate, centre.federation_address)
    terminal().show(listed)
    if folder.path != own_state().absolute():
        terminal().note(f"with PUHUI_LOCAL_STATE={folder.path}, `--server NAME` talks to one of them")
