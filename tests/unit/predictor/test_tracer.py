"""The tracing process, with real processes in its place that behave in every way."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from predictor_onnx.configuration import Configuration
from predictor_onnx.traced_step import TracedStep
from predictor_onnx.tracer import CannotTraceError, Tracer, TracerStartingError

ASKED = Configuration("timm", "resnet50", 8, (3, 224, 224))
STEP = TracedStep(
    10.0, 9.0, 9.5, 8.0, {"parameter": 1.0, "activation": 7.0}, 2.0, 3.0, parameters=4, convolutions=5, pointwise=1,
    depthwise=0, kernels=9, flops=1e9, moved_bytes=1e8,
)  # fmt: skip
GOOD = f"print('''{json.dumps([asdict(STEP)])}''', flush=True)"


@pytest.fixture
def speaking(tmp_path: Path) -> Iterator[Callable[..., Tracer]]:
    """Returns a tracer whose process does this with each line that it is asked."""
    made: list[Tracer] = []

    def make(each: str, first: str = "print('ready', flush=True)") -> Tracer:
        body = "\n    ".join(each.splitlines())
        begin = f"import os, sys, time\nopen({str(tmp_path / 'begun')!r}, 'a').write('x')"
        program = f"{begin}\n{first}\nfor line in sys.stdin:\n    {body}\n"
        (tmp_path / "worker.py").write_text(program)
        made.append(Tracer((sys.executable, str(tmp_path / "worker.py"))))
        return made[-1]

    yield make
    for tracer in made:
        tracer.close()


def begun(folder: Path) -> int:
    return len((folder / "begun").read_text())


def test_one_process_answers_again_and_again(speaking: Callable[..., Tracer], tmp_path: Path) -> None:
    tracer = speaking(GOOD)
    assert [tracer.trace([ASKED], 20) for _ in range(3)] == [[STEP]] * 3
    assert begun(tmp_path) == 1


def test_a_process_that_dies_of_a_network_is_begun_anew(speaking: Callable[..., Tracer], tmp_path: Path) -> None:
    tracer = speaking(f"if 'vgg' in line: os.abort()\n{GOOD}")
    with pytest.raises(CannotTraceError, match="died"):
        tracer.trace([Configuration("timm", "vgg16", 8, (3, 224, 224))], 20)
    assert tracer.trace([ASKED], 20) == [STEP]
    assert begun(tmp_path) == 2


def test_what_failed_does_not_answer_again(speaking: Callable[..., Tracer], tmp_path: Path) -> None:
    tracer = speaking('print(\'{"error": "it has no such thing"}\', flush=True)')
    for _ in range(2):
        with pytest.raises(CannotTraceError, match="no such thing"):
            tracer.trace([ASKED], 20)
    assert begun(tmp_path) == 2


def test_one_that_takes_too_long_is_ended(speaking: Callable[..., Tracer]) -> None:
    tracer = speaking(f"if '\\\\\"batch\\\\\": 9' in line: time.sleep(600)\n{GOOD}")
    assert tracer.trace([ASKED], 20) == [STEP]
    began = time.monotonic()
    with pytest.raises(CannotTraceError, match="too long"):
        tracer.trace([Configuration("timm", "resnet50", 9, (3, 224, 224))], 0.5)
    assert time.monotonic() - began < 60
    assert tracer.trace([ASKED], 20) == [STEP]


@pytest.mark.parametrize("said", ["nonsense", "", "x" * (1 << 21)], ids=["nonsense", "nothing", "endless"])
def test_an_answer_that_is_none_is_not_taken(speaking: Callable[..., Tracer], said: str) -> None:
    tracer = speaking(f"sys.stdout.write({said!r} + ('' if len({said!r}) > 99 else chr(10))); sys.stdout.flush()")
    with pytest.raises(CannotTraceError, match="died"):
        tracer.trace([ASKED], 20)


def test_a_process_that_is_still_starting_is_left_alone(speaking: Callable[..., Tracer], tmp_path: Path) -> None:
    go = tmp_path / "go"
    tracer = speaking(GOOD, f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\nprint('ready', flush=True)")
    with pytest.raises(TracerStartingError):
        tracer.trace([ASKED], 0.3)
    go.touch()
    assert tracer.trace([ASKED], 20) == [STEP]
    assert begun(tmp_path) == 1


def test_a_process_that_says_something_else_first_is_none(speaking: Callable[..., Tracer]) -> None:
    with pytest.raises(CannotTraceError, match="died"):
        speaking(GOOD, "print('hello', flush=True)").trace([ASKED], 20)


def test_closing_ends_a_process_that_is_at_something(speaking: Callable[..., Tracer], tmp_path: Path) -> None:
    at_it = tmp_path / "at_it"
    tracer = speaking(f"open({str(at_it)!r}, 'w').close()\ntime.sleep(600)")
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(tracer.trace, [ASKED], 600)
        while not at_it.exists():
            assert not asked.done()
        tracer.close()
        with pytest.raises(CannotTraceError):
            asked.result(60)
    with pytest.raises(CannotTraceError, match="closed"):
        tracer.trace([ASKED], 20)
    assert begun(tmp_path) == 1


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CannotTraceError):
        Tracer((str(tmp_path / "missing"),)).trace([ASKED], 5)


def test_a_configuration_is_written_and_read() -> None:
    assert Configuration.from_json(ASKED.to_json()) == ASKED
    with pytest.raises(ValueError, match="no configuration"):
        Configuration.from_json("[]")
