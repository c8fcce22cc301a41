"""From a configuration to what its step needs and does, on tensors without data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from predictor_onnx.configuration import Configuration
from predictor_onnx.step import Step, build_network
from predictor_onnx.trace.building import building
from predictor_onnx.trace.events import Category, Phase
from predictor_onnx.trace.recorder import Recorder
from predictor_onnx.trace.summary import summarise
from predictor_onnx.trace.watch import watched
from predictor_onnx.traced_step import TracedStep

#: The optimizer's state is there from the second step on.
STEPS: Final = 2


def record(asked: Configuration) -> tuple[Recorder, int]:
    """The record of `STEPS` steps, and the number of the network's parameters.

    Raises:
        CannotBuildError: the network or the optimizer is unknown, or the library that has it is not installed.
    """
    with watched() as (recorder, fakes):

        def network(asked: Configuration) -> Any:
            with building(recorder, fakes) as made:
                made.append(build_network(asked))
            return made[0]

        step = Step(asked, network=network)
        for _ in range(STEPS):
            step.run(lambda: recorder.enter(Phase.FORWARD), lambda samples: recorder.mark(samples, Category.DATA))
    return recorder, step.parameters


def at_batch(asked: Configuration, batch: int) -> Configuration:
    """The same step with another batch."""
    return replace(asked, batch=batch)


def trace(asked: Configuration) -> TracedStep:
    """What one step needs and does.

    Raises:
        CannotBuildError: the network or the optimizer is unknown, or the library that has it is not installed.
    """
    recorder, parameters = record(asked)
    return summarise(recorder.events, recorder.work, parameters, STEPS)
