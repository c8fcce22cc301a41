"""Programs as people write them, run by the packed dry run and nothing else: what it finds is what the tracer says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from predictor_onnx.configuration import Configuration, Precision
from predictor_onnx.dry_run.finding import Ending, Finding
from predictor_onnx.dry_run.packing import packed
from predictor_onnx.trace.tracing import trace
from predictor_onnx.traced_step import TracedStep
from tests.unit.predictor import dry_run_programs as programs

LAYERS = (["Linear", 1024, 1024], ["ReLU"], ["Linear", 1024, 1024])


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Finding]:
    """Runs a program's text with the archive, which finds nothing but torch's own packages."""

    def running(text: str, *arguments: str, within: int = 100) -> Finding:
        archive = tmp_path / "dry_run.zip"
        archive.write_bytes(packed())
        (tmp_path / "train.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "-I", archive, "--within", str(within), "--", "python3", "train.py", *arguments],
            cwd=tmp_path, capture_output=True, timeout=110, check=True,
        )  # fmt: skip
        return Finding.from_json(done.stdout)

    return running


def step_of(found: Finding, ending: Ending = Ending.STEPS_SEEN) -> TracedStep:
    assert (found.ending, found.reason) == (ending, "")
    assert found.step is not None
    return found.step


def agrees(found: TracedStep, told: TracedStep, within: float = 0.01) -> None:
    assert found.parameters == told.parameters
    assert found.flops == pytest.approx(told.flops, rel=within)
    assert found.allocated_mib == pytest.approx(told.allocated_mib, rel=within)
    assert found.reserved_mib == pytest.approx(told.reserved_mib, rel=0.03, abs=2)
    assert (found.convolutions, found.pointwise, found.depthwise) == (
        told.convolutions, told.pointwise, told.depthwise,
    )  # fmt: skip
    for category in ("parameter", "data", "gradient", "optimizer"):
        assert found.live_mib[category] == pytest.approx(told.live_mib[category], rel=within, abs=0.1), category


def test_a_plain_loop_is_what_the_tracer_says(run: Callable[..., Finding]) -> None:
    found = run(programs.PLAIN)
    assert found.steps == 2
    agrees(step_of(found), trace(Configuration("layers", json.dumps(LAYERS), 256, (1024,), classes=1024)))


def test_mixed_precision_on_a_data_set_that_is_not_there(run: Callable[..., Finding]) -> None:
    told = trace(Configuration("torchvision", "resnet18", 64, (3, 32, 32), precision=Precision.AMP_FLOAT16,
                               optimizer="sgd", momentum=0.9))  # fmt: skip
    agrees(step_of(run(programs.VISION, "--batch-size", "64")), told, 0.02)


def test_options_reach_the_program(run: Callable[..., Finding]) -> None:
    small, large = (step_of(run(programs.VISION, "--batch-size", size, "--clip")) for size in ("8", "32"))
    assert large.flops == pytest.approx(4 * small.flops)


def test_a_transformer_accumulates_and_recomputes(run: Callable[..., Finding]) -> None:
    kept = step_of(run(programs.TRANSFORMER.replace("CHECKPOINTING", "")))
    anew = step_of(run(programs.TRANSFORMER.replace("CHECKPOINTING", "model.gradient_checkpointing_enable()")))
    assert anew.parameters == kept.parameters
    assert anew.allocated_mib < kept.allocated_mib
    assert 1.2 * kept.flops < anew.flops < 1.34 * kept.flops


def test_validation_early_stopping_and_what_is_missing(run: Callable[..., Finding]) -> None:
    found = run(programs.ODDITIES)
    assert found.steps == 2
    assert step_of(found).convolutions >= 1


def test_a_group_of_processes_holds_its_buckets(run: Callable[..., Finding]) -> None:
    step = step_of(run(programs.DISTRIBUTED))
    weights = step.live_mib["parameter"]
    assert step.parameters == 4 * (512 * 2048 * 2 + 2048 + 512)
    assert weights == pytest.approx(step.parameters * 4 / 2**20, rel=0.01)
    assert step.live_mib["gradient"] == pytest.approx(2 * weights, rel=0.02)
    assert step.live_mib["optimizer"] == pytest.approx(2 * weights, rel=0.02)


def test_places_that_the_host_draws_are_real(run: Callable[..., Finding]) -> None:
    step = step_of(run(programs.PIECES))
    assert step.parameters == 65536 * 64  # the table and the head share them
    assert step.flops == 3 * 2 * (8 * 128) * 64 * 65536


def test_inference_ends_by_itself(run: Callable[..., Finding]) -> None:
    found = run(programs.INFERENCE)
    told = trace(Configuration("torchvision", "resnet50", 32, (3, 224, 224), training=False))
    agrees(step_of(found, Ending.INFERENCE_ONLY), told, 0.05)


def test_a_program_that_ends_after_one_step(run: Callable[..., Finding]) -> None:
    found = run(programs.ONE_STEP)
    assert found.steps == 1
    assert step_of(found, Ending.PROGRAM_ENDED).live_mib["parameter"] == pytest.approx(4, abs=0.01)


def test_the_host_is_not_counted(run: Callable[..., Finding]) -> None:
    assert run(programs.HOST_ONLY) == Finding(Ending.NO_CARD_USED)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (programs.BROKEN, "train.py, line 4: RuntimeError: "),
        (programs.DOWNLOAD, "a dry run has no network"),
        ("import torch, no_such_module", "train.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("import sys\nsys.exit(3)", "the program ended with 3"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_program_that_fails_says_where(run: Callable[..., Finding], text: str, why: str) -> None:
    found = run(text)
    assert found.ending is Ending.FAILED
    assert why in found.reason
    assert found.step is None


def test_a_program_that_never_ends_is_given_up(run: Callable[..., Finding]) -> None:
    assert run(programs.ENDLESS, within=6) == Finding(Ending.FAILED, "it took too long")


def test_a_program_that_goes_on_is_ended(run: Callable[..., Finding]) -> None:
    assert step_of(run(programs.STUBBORN)).parameters == 64 * 65


def test_a_torch_that_cannot_be_watched_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '1.13'\n")
    (tmp_path / "dry_run.zip").write_bytes(packed())
    (tmp_path / "train.py").write_text("import torch\n")
    done = subprocess.run(
        [sys.executable, tmp_path / "dry_run.zip", "--", "python3", "train.py"],
        cwd=tmp_path, capture_output=True, timeout=110, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    found = Finding.from_json(done.stdout)
    assert found.ending is Ending.FAILED
    assert found.reason.startswith("the image's torch cannot be watched; a dry run needs 2.13")
