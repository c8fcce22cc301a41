"""What Puhui adds to a container: submit → result of a no-op job against bare Podman.

The baseline is `podman create`, `start`, `wait` and `rm` of the same image, as the same user, on the same
store, taken in turn with the jobs. A job does more than that: it is accepted, predicted, stored, given a
(emulated) card, its log and artifacts are collected, and the card is given back.

    python -m bench.overhead [--json] [--rounds 40]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable

from bench.report import Aim, Figure, Report, quantile
from nodedaemon.podman_account import PodmanAccount
from puhui.client import Centre
from puhui.local import local_centre
from puhui.v1.job_pb2 import JOB_STATE_SUCCEEDED, JobSpec

IMAGE = "localhost/puhui/base:latest"
CARDS = "H100-80GB-SXM5:1"
WARM_UP = 3


def bare(account: PodmanAccount) -> Callable[[], None]:
    """Returns what runs one container with Podman alone, the four commands in one shell."""
    script = (
        f"id=$(podman create --init --network none {IMAGE} true)"
        " && podman start $id && podman wait $id && podman rm $id"
    )

    def run() -> None:
        done = account.run("sh", "-c", script)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, script, done.stdout, done.stderr)

    return run


def job(centre: Centre) -> Callable[[], None]:
    """Returns what runs one no-op job, from its submission to its result, everything released."""

    def run() -> None:
        submitted = centre.submit(JobSpec(name="noop", command=["true"]), {"noop.py": b"pass\n"})
        ended = centre.wait(submitted.id)
        if ended.state != JOB_STATE_SUCCEEDED:
            raise RuntimeError(f"the no-op job did not succeed: {ended.message}")

    return run


def timed(action: Callable[[], None]) -> float:
    """Returns how long an action took, in milliseconds."""
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1000


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description="What Puhui adds to a container.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=40, help="measured pairs")
    options = parser.parse_args()
    account = PodmanAccount.find("puhui")
    jobs: list[float] = []
    bares: list[float] = []
    with local_centre(CARDS, "podman") as address, Centre(address) as centre:
        [node] = centre.nodes()
        run_job, run_bare = job(centre), bare(account)
        for round_number in range(WARM_UP + options.rounds):
            # In turn, so that a machine that changes its speed changes it for both.
            job_ms, bare_ms = timed(run_job), timed(run_bare)
            if round_number >= WARM_UP:
                jobs.append(job_ms)
                bares.append(bare_ms)
        runtime = node.inventory.runtime
    median_ratio = statistics.median(jobs) / statistics.median(bares)
    Report(
        bench="overhead",
        figures=[
            Figure("job_median_ms", statistics.median(jobs), "ms"),
            Figure("job_p99_ms", quantile(jobs, 0.99), "ms"),
            Figure("bare_median_ms", statistics.median(bares), "ms"),
            Figure("bare_p99_ms", quantile(bares, 0.99), "ms"),
            Figure("overhead_p99_ratio", quantile(jobs, 0.99) / quantile(bares, 0.99), "ratio"),
            Figure("rounds", len(jobs), "count"),
        ],
        aims=[Aim("overhead_median_ratio", median_ratio, 1.2, "lower")],
        versions={"podman": runtime.version, "oci_runtime": runtime.oci_runtime, "driver": "emulated"},
        notes=[
            "Cards are emulated with zero driver latency.",
            "The baseline is the Podman command line, which starts a process for each of its four steps; the node "
            "daemon asks one Podman service instead. That is why a job can take less time than its baseline.",
        ],
    ).show(options.json)


if __name__ == "__main__":
    main()
