"""What a dry run needs around it: its archive, whom it runs, and the reading of a stranger's answer."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from predictor_onnx.dry_run.command import NotPythonError, Program, program_of
from predictor_onnx.dry_run.finding import MOST_BYTES, Ending, Finding, NotAFindingError
from predictor_onnx.dry_run.packing import modules, packed
from predictor_onnx.traced_step import TracedStep

LIVE = {"parameter": 1.0, "data": 0.0, "activation": 6.0, "gradient": 1.0, "optimizer": 0.0, "temporary": 0.0}
STEP = TracedStep(
    10.0, 9.0, 9.5, 8.0, LIVE, 2.0, 3.0, parameters=4, convolutions=5, pointwise=1, depthwise=0, kernels=9, flops=1e9,
    moved_bytes=1e8,
)  # fmt: skip
GOOD = Finding(Ending.STEPS_SEEN, "", 2, STEP)


def test_a_finding_is_read_as_it_was_written() -> None:
    assert Finding.from_json(GOOD.to_json()) == GOOD
    assert Finding.from_json(Finding(Ending.FAILED, "no").to_json().encode()) == Finding(Ending.FAILED, "no")


@pytest.mark.parametrize(
    "changed",
    [
        {"reserved_mib": float("inf")}, {"reserved_mib": float("nan")}, {"reserved_mib": -1}, {"reserved_mib": "10"},
        {"reserved_mib": True}, {"parameters": 1.5}, {"flops": 1e300}, {"live_mib": {"parameter": 1.0}},
        {"live_mib": LIVE | {"data": None}}, {"live_mib": 3}, {"pointwise": 6}, {"largest_mib": 100.0},
        {"allocated_mib": 100.0}, {"more": 1},
    ],
)  # fmt: skip
def test_a_lie_is_no_finding(changed: dict[str, Any]) -> None:
    line = json.dumps({"ending": "steps_seen", "reason": "", "steps": 2, "step": asdict(STEP) | changed})
    with pytest.raises(NotAFindingError):
        Finding.from_json(line)


@pytest.mark.parametrize(
    "line",
    ["", "[]", "null", "{}", "{", b"\xff", "[" * 30000, '{"ending": "won", "reason": "", "steps": 1, "step": null}',
     '{"ending": "failed", "reason": 1, "steps": 1, "step": null}', " " * (MOST_BYTES + 1),
     '{"ending": "failed", "reason": "", "steps": -1, "step": null}',
     '{"ending": "failed", "reason": "", "steps": 1, "step": 7}'],
)  # fmt: skip
def test_what_is_no_finding_is_refused(line: bytes | str) -> None:
    with pytest.raises(NotAFindingError):
        Finding.from_json(line)


def test_a_reason_has_an_end_and_no_control_characters() -> None:
    told = Finding.from_json(
        json.dumps({"ending": "failed", "reason": "\x1b[2J" + "x" * 999, "steps": 0, "step": None})
    )
    assert told.reason.startswith(" [2J")
    assert len(told.reason) == 300


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (["python3", "-u", "train.py", "--lr", "1"], Program("train.py", "", ("--lr", "1"))),
        (["/usr/bin/python3.11", "-X", "dev", "-m", "pkg.train", "-x"], Program("", "pkg.train", ("-x",))),
        (["./train.py"], Program("./train.py")),
        (["env", "A=1", "python", "a.py"], Program("a.py")),
        (["sh", "-c", "exec python3 a.py 'b c'"], Program("a.py", "", ("b c",))),
        (["torchrun", "--standalone", "--nproc_per_node", "2", "a.py", "--x"], Program("a.py", "", ("--x",))),
        (["python3", "-m", "torch.distributed.run", "--nproc_per_node=2", "a.py"], Program("a.py")),
        (["accelerate", "launch", "--mixed_precision", "fp16", "a.py"], Program("a.py")),
    ],
)
def test_the_program_is_found_in_the_command(command: list[str], program: Program) -> None:
    assert program_of(command) == program


@pytest.mark.parametrize(
    "command", [[], ["make"], ["python3"], ["python3", "-c", "1"], ["sh", "-c", "a && python3 b.py"], ["torchrun"]]
)
def test_what_runs_no_python_program_is_told(command: list[str]) -> None:
    with pytest.raises(NotPythonError):
        program_of(command)


def test_the_archive_has_all_that_it_imports_and_no_front_door() -> None:
    names = set(zipfile.ZipFile(io.BytesIO(packed())).namelist())
    assert "predictor_onnx/traced_step.py" in names
    assert "predictor_onnx/predictor.py" not in names
    assert len(names) == len(modules()) + 2
    assert packed() == packed.__wrapped__()


def test_an_image_without_torch_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "dry_run.zip").write_bytes(packed())
    done = subprocess.run(
        [sys.executable, "-I", "-S", "dry_run.zip", "--report", "found.json", "--", "python3", "train.py"],
        cwd=tmp_path, check=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0
    assert Finding.from_json((tmp_path / "found.json").read_bytes()).reason == "the image has no torch"
