"""The demonstration, as `scripts/demo` runs it: all acts on real rootless containers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nodedaemon.podman_account import PodmanAccount

CHAIN = Path(__file__).parents[2] / "examples" / "chain.py"


def containers() -> set[str]:
    """Returns every container that Podman has, whoever made it."""
    return set(PodmanAccount.find("puhui").run("podman", "ps", "--all", "--quiet", "--no-trunc").stdout.split())


@pytest.mark.podman
@pytest.mark.timeout(300)
def test_the_jobs_go_through_every_step_and_leave_nothing() -> None:
    done = subprocess.run(
        [sys.executable, str(CHAIN), "--json"], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    chain = json.loads(done.stdout)
    assert {name: step["ok"] for name, step in chain["steps"].items()} == dict.fromkeys(
        ["S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9", "S10", "S11"], True
    )
    # The second act: the same process, another card.
    given, back = chain["steps"]["S7"], chain["steps"]["S8"]
    assert len(set(given["host_pid"].values())) == len(set(back["pid_inside"].values())) == 1
    assert given["given_to"]["slice_uuid"] == given["slice_uuid"] == back["slice_uuid"]["before"]
    assert back["slice_uuid"]["after"] != back["slice_uuid"]["before"]
    assert back["gpu_index"]["after"] != back["gpu_index"]["before"]
    # The third act: a full centre, a promise that was kept, and the peer's own view of what it ran.
    full, sent, result = (chain["steps"][step] for step in ("S9", "S10", "S11"))
    assert full["free"]["local"] == 0
    assert full["free"]["local-2"] > 0
    assert full["held"] == {"local": 2, "local-2": 0}
    assert full["profile"] == sent["offer"]["profile"] == "1g.10gb"
    assert sent["offer"]["offer_id"]
    assert 0 <= sent["offer"]["promised_wait_s"] < 10
    assert (sent["peer"], sent["attempts"]) == ("local-2", 1)
    assert sent["job_id"] == sent["origin_job_id_at_peer"] != sent["peer_job_id"] != ""
    assert sent["bundle_bytes"] > 0
    times = sent["times_ms"]
    assert times["forwarding"] <= times["forwarded"] <= times["container_started"] <= times["succeeded"]
    assert (result["state"], result["exit_code"], result["emulated"]) == ("JOB_STATE_SUCCEEDED", 0, True)
    assert result["slice_uuid"].startswith("MIG-")
    assert result["node_id"] not in ("", *(one["node_id"] for one in chain["nodes"] if one["centre"] == "local"))
    log = result["log_bytes"]
    assert 0 < log["while_it_ran"] <= log["followed"] == log["here"] == log["at_peer"]
    digest = result["artifacts"]["digest"]
    assert digest["here"] == digest["at_peer"]
    assert digest["here"].startswith("sha256:")
    assert len(result["artifacts"]["files"]) == 2
    assert result["left_at_peer"] == {"slices": 0, "containers": 0}
    assert chain["leftover"] == {"slices": 0, "containers": 0}
    assert chain["emulated"] is True
    assert [job["exit_code"] for job in chain["jobs"]] == [0, 0, 0]
    profiles = [job["profile"] for job in chain["jobs"]]
    assert len(set(profiles)) == 3, f"the need of three different models was predicted alike: {profiles}"
    # Podman itself is asked as well, not only the daemon that made them.
    ours = {container["container_id"] for container in chain["steps"]["S4"]["containers"].values()}
    assert len(ours) == 3
    ours.add(result["container_id"])
    assert len(ours) == 4
    assert not ours & containers()
    assert "0 slices, 0 containers left" in done.stderr
    assert "\x1b[" not in done.stderr, "colour codes off a terminal"


@pytest.mark.podman
@pytest.mark.timeout(120)
def test_ctrl_c_leaves_nothing_behind() -> None:
    with subprocess.Popen(
        [sys.executable, str(CHAIN)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C on a terminal goes to the whole group
    ) as chain:
        assert chain.stdout is not None
        started, said = set[str](), ""
        for line in chain.stdout:
            said += line
            if found := re.search(r"podman container ([0-9a-f]{12}) runs", line):
                started.add(found[1])
            if len(started) == 3:
                os.killpg(chain.pid, signal.SIGINT)
                break
        said += chain.stdout.read()
    assert chain.returncode == 130, said
    assert "Traceback" not in said
    assert said.rstrip().endswith("nothing is left over")
    assert not {container[:12] for container in containers()} & started
