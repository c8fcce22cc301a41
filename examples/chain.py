"""The whole chain, end to end: three pieces of model code, an idle share that goes back to work, a borrowed one.

Starts two centres of its own with emulated cards, peers of each other, submits the three examples beside this file to
the first one, and prints each step of the method as it happens: S1 the code is accepted, S2 its need is predicted, S3 a
virtual card is cut, S4 a container runs the code on it, S5 everything is given back. The second act (`second_act.py`)
is a session: S6 its idleness is noticed, S7 its share is taken and given to another job while it lives on, S8 a run
instruction gets it a share again. In the third (`third_act.py`) S9 the first centre is full, S10 its next job goes to
the second one, S11 which runs it on an idle share of its own and brings the result home. What it claims at the end it
has looked up on the nodes, not remembered.

    python examples/chain.py [--runtime podman] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from second_act import SecondAct
from third_act import Site, ThirdAct

from puhui.client import Centre, Refusal
from puhui.local import local_centres
from puhui.rpc.channel import open_blocking_channel
from puhui.v1.job_pb2 import JOB_STATE_SUCCEEDED, Job, JobEvent, JobSpec, PeerPolicy
from puhui.v1.node_pb2 import RUNTIME_KIND_PODMAN, RuntimeKind
from puhui.v1.node_service_pb2 import ListContainersRequest, ListSlicesRequest
from puhui.v1.node_service_pb2_grpc import NodeServiceStub
from puhui.v1.prediction_pb2 import SIZING_ORIGIN_PREDICTION, PredictionTier

HERE = Path(__file__).resolve().parent
CARDS = "H100-80GB-SXM5:1,A100-80GB:1"
PEER_CARDS = "A100-80GB:1"
EXAMPLES = {
    "digits": ["train.py", "--epochs", "4"],
    "chargpt": ["train.py", "--batch-size", "12", "--steps", "20"],
    "resnet": ["train.py", "--batch-size", "256", "--steps", "16"],
}
# Which event tells of which step. S5 ends with the slice: the container goes first.
STEPS = {
    "SUBMITTED": "S1",
    "PREDICTED": "S2",
    "SLICE_CREATED": "S3",
    "CONTAINER_STARTED": "S4",
    "COMMAND_ENDED": "S5",
    "CONTAINER_REMOVED": "S5",
    "SLICE_DESTROYED": "S5",
}


@dataclass
class Run:
    """One example on its way through the chain, with what was seen of it."""

    name: str
    job: Job
    events: dict[str, JobEvent] = field(default_factory=dict)
    slice_seen: bool = False
    container_seen: bool = False
    artifacts: list[str] = field(default_factory=list)
    problem: str = ""


class Screen:
    """Prints the steps of several jobs, one line at a time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def line(self, step: str, name: str, text: str, style: str = "") -> None:
        """Prints one line: seconds since the start, step, job, text."""
        at = time.monotonic() - self._started
        head = Text.assemble(f"{at:6.1f}s  ", (f"{step:<3}", "bold cyan"), (f" {name:<8} ", "bold"))
        with self._lock:  # the jobs have a thread each
            self._console.print(head.append(text, style=style))


class Follower(threading.Thread):
    """Follows one job to its end: events, output, and at last its artifacts."""

    def __init__(self, centre: Centre, node: NodeServiceStub, run: Run, screen: Screen, target: Path) -> None:
        super().__init__(daemon=True)
        self._centre, self._node, self._run, self._screen, self._target = centre, node, run, screen, target

    def run(self) -> None:
        """Runs in its own thread. What goes wrong ends up in `Run.problem`."""
        try:
            self._follow(self._run)
        except (Refusal, grpc.RpcError, ValueError) as error:  # gRPC's answer on a closed channel is a ValueError
            self._run.problem = str(error)

    def _follow(self, run: Run) -> None:
        logs = threading.Thread(target=copy_logs, args=(self._centre, run, self._screen), daemon=True)
        logs.start()
        for event in self._centre.watch(run.job.id):
            run.events[event.reason] = event
            step = STEPS.get(event.reason, "")
            if event.reason != "SUCCEEDED":  # it says what COMMAND_ENDED has said
                self._screen.line(step, run.name, event.message, style="" if step else "dim")
            # Asked of the node itself while the job runs: are the card and the container really there?
            if event.reason == "CONTAINER_STARTED":
                slices = self._node.ListSlices(ListSlicesRequest()).slices
                run.slice_seen = any(piece.owner.job_id == run.job.id for piece in slices)
                containers = self._node.ListContainers(ListContainersRequest()).containers
                run.container_seen = any(container.owner.job_id == run.job.id for container in containers)
        logs.join()
        run.job = self._centre.get(run.job.id)
        if run.job.artifacts.file_count:
            self._centre.pull(run.job.id, self._target / run.name)
            run.artifacts = sorted(path.name for path in (self._target / run.name).rglob("*") if path.is_file())


def copy_logs(centre: Centre, run: Run, screen: Screen) -> None:
    """Prints a job's output, line by line, as it is written."""
    rest = b""
    try:
        for chunk in centre.logs(run.job.id, follow=True):
            *lines, rest = (rest + chunk.data).split(b"\n")
            for line in lines:
                screen.line("", run.name, "│ " + line.decode(errors="replace"), style="green")
    except (Refusal, grpc.RpcError, ValueError) as error:
        run.problem = str(error)


def findings(runs: list[Run], runtime: RuntimeKind.ValueType, leftover: dict[str, int]) -> dict[str, Any]:
    """Returns, for each step, whether it happened for every job, and the evidence."""
    last = {run.name: run.job.attempts[-1] for run in runs if run.job.attempts}
    every = {run.name: run for run in runs}
    return {
        "S1": {
            "ok": all("SUBMITTED" in run.events and run.job.bundle_id for run in runs),
            "jobs": {name: {"job_id": run.job.id, "bundle_id": run.job.bundle_id} for name, run in every.items()},
        },
        "S2": {
            "ok": all(
                run.job.prediction.model_version and run.job.sizing.origin == SIZING_ORIGIN_PREDICTION for run in runs
            ),
            "predictions": {
                name: {
                    "tier": PredictionTier.Name(run.job.prediction.tier),
                    "p50_mib": round(run.job.prediction.memory.p50_mib),
                    "p90_mib": round(run.job.prediction.memory.p90_mib),
                    "required_mib": run.job.prediction.required_mib,
                    "profile": last[name].profile if name in last else "",
                    "model_version": run.job.prediction.model_version,
                }
                for name, run in every.items()
            },
        },
        "S3": {
            "ok": all(run.slice_seen and run.name in last for run in runs),
            "emulated": all(attempt.emulated for attempt in last.values()),
            "slices": {
                name: {
                    "slice_uuid": attempt.slice_uuid,
                    "gpu_model": attempt.gpu_model,
                    "gpu_index": attempt.gpu_index,
                    "profile": attempt.profile,
                    "placement": {"start": attempt.placement.start, "size": attempt.placement.size},
                }
                for name, attempt in last.items()
            },
        },
        "S4": {
            "ok": all(run.container_seen and run.job.exit_code == 0 and run.job.log_size_bytes > 0 for run in runs),
            "runtime": RuntimeKind.Name(runtime),
            "rootless": runtime == RUNTIME_KIND_PODMAN,
            "containers": {
                name: {"container_id": attempt.container_id, "exit_code": attempt.exit_code}
                for name, attempt in last.items()
            },
        },
        "S5": {
            "ok": leftover == {"slices": 0, "containers": 0}
            and all({"CONTAINER_REMOVED", "SLICE_DESTROYED"} <= run.events.keys() for run in runs),
            "leftover": leftover,
        },
    }


def table(runs: list[Run]) -> Table:
    """Returns what a person wants to see in the end."""
    columns = ("job", "predicted", "profile", "placement", "container", "exit code", "artifacts")
    result = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for run in runs:
        if not run.job.attempts:
            result.add_row(run.name, *["-"] * 4, "never started", "-")
            continue
        attempt = run.job.attempts[-1]
        placement = f"GPU {attempt.gpu_index}, {attempt.placement.start}:{attempt.placement.size}"
        result.add_row(
            run.name,
            f"{run.job.prediction.required_mib / 1024:.1f} GiB",
            attempt.profile,
            placement,
            attempt.container_id[:12],
            str(attempt.exit_code),
            f"{len(run.artifacts)} files",
        )
    return result


def spec(name: str, command: list[str]) -> JobSpec:
    """Returns what is asked for: a job that stays in its centre."""
    return JobSpec(name=name, command=command, peers=PeerPolicy(here_only=True))


def open_site(stack: contextlib.ExitStack, name: str, address: str) -> Site:
    """Opens connections to a centre and to its one node, which the stack closes."""
    centre = stack.enter_context(Centre(address))
    [node] = centre.nodes()
    channel = open_blocking_channel(node.address)
    stack.callback(channel.close)
    return Site(name, node.id, centre, NodeServiceStub(channel))


@dataclass
class Played:
    """What was seen of all acts."""

    runs: list[Run]
    steps: dict[str, Any]
    leftover: dict[str, int]
    nodes: list[dict[str, str]]
    notices: list[str]


def play(runtime: str, python: str, screen: Screen) -> Played:
    """Plays all acts on two centres that are there for that long."""
    with (
        tempfile.TemporaryDirectory(prefix="puhui-demo-") as pulled,
        local_centres([CARDS, PEER_CARDS], runtime) as addresses,
        contextlib.ExitStack() as stack,
    ):
        here, there = (open_site(stack, name, address) for name, address in addresses.items())
        centre, node = here.centre, here.node
        [registered] = centre.nodes()
        for site in (here, there):
            screen.line("", site.name, f"serves at {site.centre.address}")
        # Only the third act is to leave the centre.
        runs = [
            Run(name, centre.submit(spec(name, [python, *command]), HERE / name)) for name, command in EXAMPLES.items()
        ]
        followers = [Follower(centre, node, run, screen, Path(pulled)) for run in runs]
        for follower in followers:
            follower.start()
        for follower in followers:
            follower.join()
        screen.line("", "act 2", "a session that does not use its card", style="bold")
        act = SecondAct(centre, node, python, screen.line)
        act.play()
        act_steps = act.findings()
        screen.line("", "act 3", f"{here.name} is full, and {there.name} has an idle card", style="bold")
        borrowing = ThirdAct(here, there, python, Path(pulled), screen.line)
        borrowing.play()
        act_steps |= borrowing.findings()
        leftover = {
            "slices": len(here.slices()) + len(there.slices()),
            "containers": len(here.containers()) + len(there.containers()),
        }
    steps = findings(runs, registered.inventory.runtime.kind, leftover) | act_steps
    nodes = [{"centre": site.name, "node_id": site.node_id} for site in (here, there)]
    return Played(runs, steps, leftover, nodes, list(registered.inventory.runtime.notices))


def main() -> int:
    """Runs the chain. Returns 0 when every step happened and nothing is left over."""
    parser = argparse.ArgumentParser("demo", description="Runs the whole chain on emulated cards.")
    parser.add_argument("--runtime", choices=["podman", "process"], default="podman")
    parser.add_argument("--python", default="python3", help="interpreter, in the container or (process) on this host")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write what happened to a file; without one to standard output, and what is told meanwhile to the other",
    )
    options = parser.parse_args()
    alone = options.json == "-"
    if options.json and not alone and not os.access(Path(options.json).absolute().parent, os.W_OK):
        parser.error(f"{options.json} cannot be written")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(highlight=False, soft_wrap=True, stderr=alone)
    screen = Screen(console)
    console.print(f"Two centres with [bold]emulated[/] cards: {CARDS}, and {PEER_CARDS}. No GPU is used.")
    if options.runtime == "process":
        console.print("[bold red]process runtime: no containers, no isolation.[/] The lines above say what is missing.")

    try:
        played = play(options.runtime, options.python, screen)
    except (Refusal, RuntimeError, TimeoutError, grpc.RpcError) as error:
        sys.exit(f"the chain broke: {error}")
    except KeyboardInterrupt:
        console.print("stopped; the jobs were cancelled, and nothing is left over")
        return 130

    runs, steps, leftover = played.runs, played.steps, played.leftover
    console.print(table(runs))
    console.print(f"{leftover['slices']} slices, {leftover['containers']} containers left")
    for notice in played.notices:
        console.print(f"[dim]note: {notice}[/]")
    if options.json:
        jobs = [
            {
                "name": run.name,
                "job_id": run.job.id,
                "succeeded": run.job.state == JOB_STATE_SUCCEEDED,
                "exit_code": run.job.exit_code if run.job.HasField("exit_code") else None,
                "profile": run.job.attempts[-1].profile if run.job.attempts else "",
                "artifacts": run.artifacts,
            }
            for run in runs
        ]
        document = {"steps": steps, "jobs": jobs, "leftover": leftover, "nodes": played.nodes, "emulated": True}
        text = json.dumps(document, indent=2) + "\n"
        if alone:
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    for run in runs:
        if run.problem:
            console.print(f"[bold red]{run.name}: {run.problem}[/]")
    missed = [name for name, step in steps.items() if not step["ok"]]
    if missed:
        console.print(f"[bold red]not every step happened: {', '.join(missed)}[/]")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
