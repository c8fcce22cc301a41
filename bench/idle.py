"""How quickly idle shares go back to work: threshold → share free, and run instruction → first byte of output.

A real centre, real rootless containers, emulated cards with zero latency. Sessions run a command, fall idle, lose their
share and are told to run again, each time beside a bare exec through the Podman API in a container of the same image:

- **cold**: the session's slice was destroyed when it was taken back, and is cut anew.
- **warm**: its slice was kept for its tenant, and is taken over.
- **evicted**: another tenant's warm slice fills the only card; it is destroyed first, then the session's is cut.
- **held**: the share has not been taken back yet. What a run costs without any scheduling.

The aim `run_added_p50_ms` is that of cold runs. A reclaim's time begins when the session's card has been unused for
exactly the threshold, which is before the sample that tells so is taken, and ends when the centre has told that the
share is free: of sessions whose slices are kept warm when it is kept, of the others when it is destroyed.

Then, as a simulation, GPU-hours that a day of sessions needs with and without reclaim (`bench.idle_replay`).

    python -m bench.idle [--json] [--rounds 40] [--data FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.daemons import daemon, open_folder
from bench.idle_exec import bare_exec
from bench.idle_replay import DATA, replay
from bench.idle_runs import IDLE_AFTER_S, Bench, Measured
from bench.idle_witness import Witness
from bench.report import Aim, Figure, Report, quantile
from nodedaemon.idle import sampling_interval_s
from puhui.rpc.channel import open_channel
from puhui.rpc.logs import configure_logs
from puhui.v1.fleet_service_pb2 import ListNodesRequest
from puhui.v1.fleet_service_pb2_grpc import FleetServiceStub
from puhui.v1.job_service_pb2_grpc import JobServiceStub
from puhui.v1.node_service_pb2_grpc import NodeServiceStub

if TYPE_CHECKING:
    from puhui.v1.fleet_service_pb2_grpc import FleetServiceAsyncStub

USER, IMAGE = "puhui", "localhost/puhui/base:latest"
CARDS, PROFILE = "H100-80GB-SXM5:1", "7g.80gb"
WARM_UP = 3
LONGEST_S = 420.0
"""No round begins later than this."""
TENANTS = """
[tenants.cold]
warm_for = "0s"
[tenants.warm]
warm_for = "30m"
[tenants.one]
warm_for = "30m"
[tenants.two]
warm_for = "30m"
"""


@dataclass(frozen=True)
class Servers:
    """Where a centre serves."""

    controlplane: str
    node: str


@contextlib.contextmanager
def centre() -> Iterator[Servers]:
    """Runs a control plane and a node daemon until the block ends."""
    with open_folder() as folder:
        token, tenants = folder / "join-token", folder / "tenants.toml"
        tenants.write_text(TENANTS)
        serve = ["--listen", "127.0.0.1:0", "--join-token-file", str(token), "--state"]
        own = [*serve, str(folder / "controlplane"), "--tenants", str(tenants)]
        with daemon("controlplane", own, folder / "controlplane.log") as address:
            joins = [*serve, str(folder / "node"), "--control-plane", address, "--name", "node-1"]
            emulated = [*joins, "--emulate", CARDS, "--runtime", "podman"]
            with daemon("nodedaemon", emulated, folder / "node.log") as node:
                yield Servers(address, node)


async def measure(servers: Servers, rounds: int) -> tuple[dict[str, Measured], Mapping[str, str]]:
    """Returns what was measured of each kind of run, and the versions of what it was measured on."""
    found = {name: Measured() for name in ("cold", "warm", "evicted", "held")}
    until = time.monotonic() + LONGEST_S
    async with (
        open_channel(servers.controlplane) as controlplane,
        open_channel(servers.node) as node,
        bare_exec(USER, IMAGE) as bare,
    ):
        versions = await _versions(FleetServiceStub(controlplane))
        jobs = JobServiceStub(controlplane)
        witness = Witness(jobs, NodeServiceStub(node), IDLE_AFTER_S)
        bench = Bench(jobs, witness, bare, PROFILE)
        async with witness.watching():
            async with bench.session("cold", warm=False) as session:
                async for into in _rounds(rounds, found["cold"], until - LONGEST_S * 2 / 3):
                    await bench.round(session, "cold", False, into, None)
            async with bench.session("warm", warm=True) as session:
                async for into in _rounds(rounds, found["warm"], until - LONGEST_S / 3):
                    again = found["held"] if into is not None else None
                    await bench.round(session, "warm", True, into, again)
            async with bench.session("one", warm=True) as one, bench.session("two", warm=True) as two:
                turns = [one, two]
                async for into in _rounds(rounds, found["evicted"], until):
                    await bench.round(turns[0], "cold", True, into, None)
                    turns.reverse()
    return found, versions


async def _rounds(rounds: int, into: Measured, until: float) -> AsyncIterator[Measured | None]:
    """Yields where to note each round, None for a warm-up, until there were enough or it is too late."""
    for number in range(WARM_UP + rounds):
        if number > WARM_UP and time.monotonic() > until:
            return
        yield into if number >= WARM_UP else None


async def _versions(fleet: FleetServiceAsyncStub) -> Mapping[str, str]:
    [node] = (await fleet.ListNodes(ListNodesRequest())).nodes
    runtime = node.inventory.runtime
    return {"podman": runtime.version, "oci_runtime": runtime.oci_runtime, "driver": "emulated"}


def figures(found: Mapping[str, Measured]) -> list[Figure]:
    """Returns the figures of what was measured."""
    told = []
    for name, measured in found.items():
        for what, values in (
            ("run_added", measured.added),
            ("run", measured.run),
            ("bare", measured.bare),
            ("reclaim", measured.reclaim),
            ("detach", measured.detach),
            ("told", measured.told),
        ):
            if values:
                told.append(Figure(f"{name}_{what}_p50_ms", statistics.median(values), "ms"))
                told.append(Figure(f"{name}_{what}_p99_ms", quantile(values, 0.99), "ms"))
        if measured.run:
            ratio = statistics.median(measured.run) / statistics.median(measured.bare)
            told.append(Figure(f"{name}_run_ratio", ratio, "ratio"))
            told.append(Figure(f"{name}_rounds", len(measured.run), "count"))
    told.append(Figure("reclaims", len(reclaims(found)), "count"))
    return told


def reclaims(found: Mapping[str, Measured]) -> list[float]:
    """Returns how long each reclaim took, in milliseconds, warm or not."""
    return [one for measured in found.values() for one in measured.reclaim]


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description="How quickly idle shares go back to work.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=40, help="measured rounds of each kind")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the traces of the replay")
    parser.add_argument("--seed", type=int, default=1, help="of what the replay draws")
    options = parser.parse_args()
    configure_logs("warning")
    with centre() as servers:
        found, versions = asyncio.run(measure(servers, options.rounds))
    replayed, notes = replay(options.data, options.seed)
    Report(
        bench="idle",
        figures=[*figures(found), *replayed],
        aims=[
            Aim("reclaim_p99_ms", quantile(reclaims(found), 0.99), 250, "lower"),
            Aim("run_added_p50_ms", statistics.median(found["cold"].added), 60, "lower"),
        ],
        versions=versions,
        notes=[
            f"Cards are emulated with zero driver latency. Sessions are idle after {IDLE_AFTER_S:g} s without use, and "
            f"sampled every {sampling_interval_s(IDLE_AFTER_S):g} s.",
            "run_added_p50_ms is of cold runs: the slice is cut anew. Each run is compared with the bare exec just "
            "before it. reclaim_p99_ms is of all reclaims. It begins at the node's own unused_since and the threshold, "
            "which is before the sample that crosses it, by up to the time between two samples. Before the node takes "
            "a share back it looks at the card again, which takes up to 105 ms: two samples of a card are to be 100 ms "
            "apart.",
            *notes,
        ],
    ).show(options.json)


if __name__ == "__main__":
    main()
