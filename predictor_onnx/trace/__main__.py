"""The tracing process: a JSON list of configurations a line in, a JSON list of traced steps a line out.

Before the first, it says that it is ready. The configurations of one line differ in their batch only. What cannot be
traced is answered with ``{"error": ...}``.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from dataclasses import asdict
from typing import Any

import torch

from predictor_onnx.configuration import Configuration
from predictor_onnx.step import CannotBuildError
from predictor_onnx.trace.affine import AffineRecord, NotAffineError
from predictor_onnx.trace.summary import summarise
from predictor_onnx.trace.tracing import STEPS, at_batch, record, trace
from predictor_onnx.traced_step import TracedStep
from predictor_onnx.tracer import READY

#: Two batches tell all others, where more than two are asked for.
_BATCHES = (8, 16)
#: Torch and its networks take half a GiB; what wants more is no network that a card could hold.
_MOST_MEMORY = 8 << 30
#: Whoever asks has more urgent things to do.
_NICENESS = 10


def traced(asked: list[Configuration]) -> list[TracedStep]:
    """One step each."""
    if len(asked) <= len(_BATCHES):
        return [trace(one) for one in asked]
    (low, parameters), (high, _) = (record(at_batch(asked[0], batch)) for batch in _BATCHES)
    try:
        every = AffineRecord((low.events, low.work), (high.events, high.work), _BATCHES)
    except NotAffineError:
        return [trace(one) for one in asked]
    return [summarise(*every.at(one.batch), parameters, STEPS) for one in asked]


def _answer(line: str) -> Any:
    try:
        return [asdict(step) for step in traced([Configuration.from_json(one) for one in json.loads(line)])]
    except CannotBuildError as error:
        return {"error": str(error)}
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        AssertionError,
        NotImplementedError,
        MemoryError,
    ) as error:
        # Other people's networks: whatever they do not bear without data ends here, as a sentence.
        return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"}


def main() -> None:
    """Answer until the input ends."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY, _MOST_MEMORY))
    # Libraries print; the answers must be all that is in their pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.write(f"{READY}\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(line)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
