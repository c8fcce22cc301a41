"""The demonstration, as `scripts/demo` runs it: three jobs on real rootless containers."""

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
def test_three_jobs_go_through_every_step_and_leave_nothing(tmp_path: Path) -> None:
    report = tmp_path / "chain.json"
    done = subprocess.run(
        [sys.executable, str(CHAIN), "--json", str(report)], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    chain = json.loads(report.read_text())
    assert {name: step["ok"] for name, step in chain["steps"].items()} == dict.fromkeys(
        ["S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8"], True
    )
    # The second act: the same process, another card.
    given, back = chain["steps"]["S7"], chain["steps"]["S8"]
    assert len(set(given["host_pid"].values())) == len(set(back["pid_inside"].values())) == 1
    assert given["given_to"]["slice_uuid"] == given["slice_uuid"] == back["slice_uuid"]["before"]
    assert back["slice_uuid"]["after"] != back["slice_uuid"]["before"]
    assert back["gpu_index"]["after"] != back["gpu_index"]["before"]
    assert chain["leftover"] == {"slices": 0, "containers": 0}
    assert chain["emulated"] is True
    assert [job["exit_code"] for job in chain["jobs"]] == [0, 0, 0]
    profiles = [job["profile"] for job in chain["jobs"]]
    assert len(set(profiles)) == 3, f"the need of three different models was predicted alike: {profiles}"
    # Podman itself is asked as well, not only the daemon that made them.
    ours = {container["container_id"] for container in chain["steps"]["S4"]["containers"].values()}
    assert len(ours) == 3
    assert not ours & containers()
    assert "0 slices, 0 containers left" in done.stdout
    assert "\x1b[" not in done.stdout, "colour codes off a terminal"


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
