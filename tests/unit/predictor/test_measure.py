import contextlib
import json
import os
import select
import sys
from pathlib import Path

import pytest

from predictor_onnx.configuration import Configuration
from predictor_onnx.measure.__main__ import main, measure_all
from predictor_onnx.measure.plan import Planned
from predictor_onnx.measure.process import Machine, NothingToMeasureOnError, ProcessWorker
from predictor_onnx.measure.protocol import Settings
from predictor_onnx.measure.rows import Ending, MeasuredRow, Outcome, header_of, outcome_of, read
from tests.unit.predictor import measuring_process
from tests.unit.predictor.measuring_process import (
    BABBLES,
    DIES,
    FULL,
    GOOD,
    HANGS,
    HEADER,
    LIES,
    LOSES_CARD,
    OUTCOME,
    RAISES,
)

COMMAND = (sys.executable, measuring_process.__file__)
MACHINE = Machine(header_of(json.dumps(HEADER)), "MIG-1")
LONG_S = 60.0


def configuration(batch: int, model: str = "resnet50") -> Configuration:
    return Configuration("timm", model, batch, (3, 224, 224))


def measured(batch: int, within_s: float = LONG_S) -> Outcome:
    return ProcessWorker(Settings(), COMMAND).measure(configuration(batch), MACHINE, within_s)


def listed(path: Path, *batches: int) -> Path:
    path.write_text("".join(configuration(batch).to_json() + "\n" for batch in batches))
    return path


def test_a_good_answer_is_measured() -> None:
    found = measured(GOOD)

    assert found.ending is Ending.MEASURED
    assert found.reading == outcome_of(OUTCOME).reading


def test_a_full_card_is_a_lower_bound() -> None:
    found = measured(FULL)

    assert found.censored
    assert (found.allocated_at_least_mib, found.device_at_least_mib) == (9000.0, 9500.0)


def test_a_card_that_is_lost_is_no_row_of_the_configuration() -> None:
    with pytest.raises(NothingToMeasureOnError, match="GPU is lost"):
        measured(LOSES_CARD)


@pytest.mark.parametrize(
    ("batch", "ending", "words"),
    [
        (DIES, Ending.CRASHED, "SIGABRT"),
        (RAISES, Ending.CRASHED, "exit code 1: RuntimeError: CUDA error: an illegal memory access"),
        (BABBLES, Ending.GARBLED, ""),
        (LIES, Ending.GARBLED, "step_ms must be 0 or more"),
    ],
)
def test_every_other_ending_is_a_row_with_its_reason(batch: int, ending: Ending, words: str) -> None:
    found = measured(batch)

    assert found.ending is ending
    assert words in found.detail
    assert found.reading is None


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    found = ProcessWorker(Settings(), COMMAND).measure(configuration(HANGS, str(pids)), MACHINE, 3.0)

    assert found.ending is Ending.TIMED_OUT
    # The pipe that both held is at its end, so both are gone, or are about to be.
    for pid in pids.read_text().split():
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(int(pid))
            try:
                assert select.select([handle], [], [], 30)[0]
            finally:
                os.close(handle)


def test_settings_reach_the_process_and_the_header() -> None:
    settings = Settings(cudnn_benchmark=True, expandable_segments=True)

    header = ProcessWorker(settings, COMMAND).probe().header

    assert header.cudnn_benchmark
    assert header.expandable_segments
    assert settings.environment()["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import torch_of_nowhere", "No module named 'torch_of_nowhere'"),
        ('print(\'{"no_card": "torch 2.9 sees no NVIDIA GPU"}\')', "sees no NVIDIA GPU"),
        ("print('[]')", "ended with 0"),
    ],
)
def test_nothing_to_measure_on_says_what_is_missing(code: str, words: str) -> None:
    with pytest.raises(NothingToMeasureOnError, match=words):
        ProcessWorker(Settings(), (sys.executable, "-c", f"input(); {code}")).probe()


def test_no_gpu_is_one_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl"

    code = main(["--output", str(output)], (sys.executable, "-c", 'input(); print(\'{"no_card": "no GPU here"}\')'))

    assert code == 2
    said = capsys.readouterr().err
    assert said.startswith("nothing was measured: no GPU here. This needs an NVIDIA GPU")
    assert said.count("\n") == 1
    assert not output.exists()


def test_one_that_dies_loses_nothing_of_the_others(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    wanted = listed(tmp_path / "list", DIES, GOOD, FULL, BABBLES)

    assert main(["--output", str(output), "--list", str(wanted)], COMMAND) == 0

    found = read(output)
    assert [one.outcome.ending for one in found.rows] == [
        Ending.CRASHED, Ending.MEASURED, Ending.OUT_OF_MEMORY, Ending.GARBLED,
    ]  # fmt: skip
    assert found.header == MACHINE.header


def test_resuming_measures_only_what_has_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl"
    assert main(["--output", str(output), "--list", str(listed(tmp_path / "a", GOOD, FULL))], COMMAND) == 0
    both = listed(tmp_path / "b", FULL, RAISES, GOOD)

    assert main(["--output", str(output), "--list", str(both)], COMMAND) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["--output", str(output), "--list", str(both), "--resume"], COMMAND) == 0

    assert [one.configuration.batch for one in read(output).rows] == [GOOD, FULL, RAISES]


def test_a_list_that_cannot_be_read_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    output, wanted = tmp_path / "rows.jsonl", tmp_path / "list"
    wanted.write_text("{}\n")

    assert main(["--output", str(output), "--list", str(wanted)], COMMAND) == 1
    assert not output.exists()


def test_a_dry_run_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = (str(tmp_path / "no-such-program"),)

    assert main(["--dry-run", "--limit-minutes", "5"], nothing) == 0

    said = capsys.readouterr().out.splitlines()
    assert 5 < len(said) < 40
    assert "expected, not measured" in said[-1]


class SlowWorker:
    """Takes forty seconds of a made-up clock for each, and times out when it is given less."""

    def __init__(self) -> None:
        self.now = 0.0
        self.given: list[float] = []

    def probe(self) -> Machine:
        return MACHINE

    def measure(self, configuration: Configuration, machine: Machine, within_s: float) -> Outcome:
        self.given.append(within_s)
        self.now += min(40.0, within_s)
        return outcome_of(OUTCOME) if within_s >= 40.0 else Outcome(Ending.TIMED_OUT, within_s)


def run(until: float, most_s: float) -> tuple[SlowWorker, list[MeasuredRow]]:
    worker, rows = SlowWorker(), list[MeasuredRow]()
    planned = [Planned("resnet", configuration(batch), 12.0) for batch in (1, 2, 3, 4)]
    made = measure_all(planned, {configuration(1)}, worker, MACHINE, rows.append, until, most_s, lambda: worker.now)
    assert made == len(rows)
    return worker, rows


def test_what_the_end_of_all_time_cut_off_leaves_no_row() -> None:
    worker, rows = run(until=100.0, most_s=60.0)

    assert [one.configuration.batch for one in rows] == [2, 3]
    assert worker.given == [60.0, 60.0, 20.0]


def test_what_took_more_than_its_own_time_leaves_a_row() -> None:
    _, rows = run(until=1000.0, most_s=30.0)

    assert [one.outcome.ending for one in rows] == [Ending.TIMED_OUT] * 3


def test_nothing_is_begun_when_too_little_time_is_left() -> None:
    worker, rows = run(until=10.0, most_s=60.0)

    assert not rows
    assert not worker.given
