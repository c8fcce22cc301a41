"""How much accelerator memory a piece of model code needs.

``Predictor().predict(CodeBundle(...), Request(...))`` reads the source without running it, describes one
step of the program in physical terms, and asks a trained ONNX model for quantiles of peak memory.
"""

from predictor_onnx.dry_run.finding import Ending, Finding, NotAFindingError
from predictor_onnx.dry_run.packing import packed
from predictor_onnx.errors import CodeDoesNotParseError, ModelUnavailableError, PredictorError
from predictor_onnx.fingerprint import fingerprint
from predictor_onnx.history import Observation, blended
from predictor_onnx.prediction import COSTS, Costs, Prediction, Request, Tier, fits, required_mib
from predictor_onnx.predictor import Predictor
from predictor_onnx.source import CodeBundle
from predictor_onnx.speed import Duration, Slowdown, SpeedModel, StepTime, Utilization, duration
from predictor_onnx.traced_step import TracedStep
from predictor_onnx.traced_steps import TracedSteps
from predictor_onnx.tracer import Tracer, can_trace

__all__ = [
    "COSTS",
    "CodeBundle",
    "CodeDoesNotParseError",
    "Costs",
    "Duration",
    "Ending",
    "Finding",
    "ModelUnavailableError",
    "NotAFindingError",
    "Observation",
    "Prediction",
    "Predictor",
    "PredictorError",
    "Request",
    "Slowdown",
    "SpeedModel",
    "StepTime",
    "Tier",
    "TracedStep",
    "TracedSteps",
    "Tracer",
    "Utilization",
    "blended",
    "can_trace",
    "duration",
    "fingerprint",
    "fits",
    "packed",
    "required_mib",
]
