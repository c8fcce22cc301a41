"""Steps that are traced once, and for those who ask later also when nobody waits any more."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from predictor_onnx.configuration import Configuration
from predictor_onnx.traced_step import TracedStep
from predictor_onnx.traced_steps import TracedSteps
from predictor_onnx.tracer import CannotTraceError, TracerStartingError

STEP = TracedStep(
    10.0, 9.0, 9.5, 8.0, {"parameter": 1.0}, 2.0, 3.0, parameters=4, convolutions=5, pointwise=1,
    depthwise=0, kernels=9, flops=1e9, moved_bytes=1e8,
)  # fmt: skip
RESNET = Configuration("timm", "resnet50", 8, (3, 224, 224))


class ToldTracer:
    """Answers when it is told what."""

    def __init__(self) -> None:
        self.asked: list[Configuration] = []
        self.answers: queue.SimpleQueue[TracedStep | Exception] = queue.SimpleQueue()
        self.begun = threading.Event()

    def begin(self) -> None:
        self.begun.set()

    def trace(self, asked: list[Configuration], within_s: float) -> list[TracedStep]:
        self.asked += asked
        answer = self.answers.get(timeout=within_s)
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    def close(self) -> None:
        self.answers.put(CannotTraceError("closed"))


@pytest.fixture
def tracer() -> ToldTracer:
    return ToldTracer()


@pytest.fixture
def steps(tracer: ToldTracer) -> Iterator[TracedSteps]:
    made = TracedSteps(tracer)
    yield made
    made.close()


def test_each_step_is_traced_once(tracer: ToldTracer, steps: TracedSteps) -> None:
    tracer.answers.put(STEP)
    assert [steps.of(RESNET, 30) for _ in range(3)] == [STEP] * 3
    assert tracer.asked == [RESNET]


def test_who_cannot_wait_leaves_it_to_the_next(tracer: ToldTracer, steps: TracedSteps) -> None:
    assert steps.of(RESNET, 0) is None
    tracer.answers.put(STEP)
    assert steps.of(RESNET, 30) == STEP
    assert tracer.asked == [RESNET]


def test_what_cannot_be_traced_is_not_tried_again(tracer: ToldTracer, steps: TracedSteps) -> None:
    tracer.answers.put(CannotTraceError("it has a loop"))
    assert [steps.of(RESNET, 30), steps.of(RESNET, 30)] == [None, None]
    assert tracer.asked == [RESNET]


def test_a_tracer_that_was_still_starting_is_asked_again(tracer: ToldTracer, steps: TracedSteps) -> None:
    tracer.answers.put(TracerStartingError("soon"))
    assert steps.of(RESNET, 30) is None
    tracer.answers.put(STEP)
    assert steps.of(RESNET, 30) == STEP


def test_only_few_wait_for_their_turn(tracer: ToldTracer, steps: TracedSteps) -> None:
    for batch in range(1, 9):
        assert steps.of(replace(RESNET, batch=batch), 0) is None
    for _ in range(9):
        tracer.answers.put(STEP)
    assert steps.of(replace(RESNET, batch=4), 30) == STEP
    assert steps.of(replace(RESNET, batch=8), 30) == STEP
    assert [one.batch for one in tracer.asked] == [1, 2, 3, 4, 8]


def test_the_oldest_are_forgotten(tracer: ToldTracer, steps: TracedSteps) -> None:
    for batch in range(1, 302):
        tracer.answers.put(STEP)
        steps.of(replace(RESNET, batch=batch), 30)
    tracer.answers.put(STEP)
    assert steps.of(replace(RESNET, batch=301), 30) == STEP
    assert len(tracer.asked) == 301
    assert steps.of(replace(RESNET, batch=1), 30) == STEP
    assert len(tracer.asked) == 302


def test_it_gets_ready_in_the_background(tracer: ToldTracer, steps: TracedSteps) -> None:
    steps.begin()
    assert tracer.begun.wait(30)


def test_after_closing_nothing_is_traced(tracer: ToldTracer, steps: TracedSteps) -> None:
    assert steps.of(RESNET, 0) is None
    assert steps.of(replace(RESNET, batch=9), 0) is None
    steps.close()
    assert steps.of(RESNET, 30) is None
    assert steps.of(replace(RESNET, batch=9), 30) is None
    assert steps.of(replace(RESNET, batch=10), 30) is None
    assert RESNET in tracer.asked or not tracer.asked
