"""What can go wrong while a prediction is made, as the caller should see it.

``PredictorError`` is the base. Every class carries the canonical gRPC code and the ErrorInfo reason
that the control plane puts on the wire.
"""

from __future__ import annotations


class PredictorError(Exception):
    """Base of all errors of this package."""

    #: Canonical gRPC status code name.
    code = "INTERNAL"
    #: ErrorInfo reason.
    reason = "PREDICTOR_FAILED"


class CodeDoesNotParseError(PredictorError):
    """The submitted code is not valid Python.

    Attributes:
        path: file inside the bundle.
        line: 1-based line of the first error; 0 when the parser gave none.
        problem: the parser's own words.
    """

    code = "INVALID_ARGUMENT"
    reason = "CODE_DOES_NOT_PARSE"

    def __init__(self, path: str, line: int, problem: str) -> None:
        super().__init__(
            f"{path}, line {line}: {problem}. Fix the file, check it with "
            f"'python -m py_compile {path}', and submit it again."
        )
        self.path = path
        self.line = line
        self.problem = problem


class ModelUnavailableError(PredictorError):
    """The ONNX model or the catalog is missing or cannot be loaded."""

    code = "FAILED_PRECONDITION"
    reason = "PREDICTOR_MODEL_UNAVAILABLE"
