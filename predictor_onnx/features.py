"""What one step of a program does, in physical terms, and the features that the model predicts from."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Final

MIB: Final = float(1 << 20)
#: Which kind of op made a tensor that autograd keeps. The catalog uses the same order.
KINDS: Final = ("conv", "norm", "act", "matmul", "other")

#: Beyond this no prediction means anything (a thousand petabytes; float32 ends not far behind).
_ABSURD_MIB: Final = 1e12

#: What memory is physically made of; MiB but for ``convolutions``, which is 1 where cuDNN is loaded.
#: Each grows, or stays, with the batch.
PHYSICS: Final = (
    "convolutions", "resident_mib", "update_mib", "transient_mib", "largest_conv_mib",
    *(f"activation_{kind}_mib" for kind in KINDS),
)  # fmt: skip
#: What the architecture is like, whatever the batch; the boosted correction sees only these.
STRUCTURE: Final = (
    *(f"share_{kind}" for kind in KINDS),
    "log_ops", "log_parameters", "log_activation_per_macs", "log_activation_per_op",
    "transient_share", "largest_share", "conv_share", "state_per_activation_sample",
)  # fmt: skip
FEATURES: Final = PHYSICS + STRUCTURE

#: Libraries that never use an accelerator by themselves.
_PROCESSOR_ONLY: Final = frozenset([
    "numpy", "scipy", "pandas", "sklearn", "matplotlib", "seaborn", "plotly", "PIL", "imageio", "skimage", "yaml",
    "toml", "tqdm", "rich", "typer", "click", "fire", "absl", "hydra", "omegaconf", "pydantic", "attr", "attrs",
    "requests",
    "httpx", "aiohttp", "boto3", "fsspec", "pyarrow", "polars", "h5py", "joblib", "networkx", "sympy", "nltk",
    "statsmodels", "psutil", "dotenv", "docopt", "colorama", "tabulate", "loguru", "structlog", "packaging", "dateutil",
    "pytz", "bs4", "lxml", "openpyxl", "regex", "jinja2", "markdown", "setuptools", "pytest", "IPython", "wandb",
    "tensorboard", "mlflow", "grpc", "google", "sqlalchemy", "redis", "pymongo", "flask", "fastapi", "uvicorn",
    "starlette", "zmq", "msgpack", "orjson", "ujson", "xxhash", "zstandard", "lz4", "typing_extensions",
])  # fmt: skip
_NOT_READ: Final = frozenset([
    "tensorflow", "keras", "jax", "flax", "cupy", "pycuda", "numba", "mxnet", "paddle", "mindspore", "vllm", "xgboost",
    "cudf", "cuml", "triton", "ultralytics", "fastai", "onnxruntime", "tinygrad", "diffusers", "sentence_transformers",
])  # fmt: skip


_READ: Final = frozenset([
    "torch", "torchvision", "timm", "transformers", "accelerate", "lightning", "pytorch_lightning", "datasets",
    "evaluate", "tokenizers", "safetensors", "huggingface_hub", "peft", "torchaudio", "torchtext", "torchmetrics",
])  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What one step of the code does, in physical terms. Memory in MiB."""

    imports: frozenset[str] = frozenset()
    entrypoint: str = ""
    model_name: str = ""
    unknown_models: tuple[str, ...] = ()
    parameters: int = 0
    trained_parameters: int = 0
    parameter_mib: float = 0.0
    gradient_mib: float = 0.0
    optimizer_mib: float = 0.0
    cast_mib: float = 0.0
    data_mib: float = 0.0
    activation_mib: float = 0.0
    transient_mib: float = 0.0
    largest_mib: float = 0.0
    largest_conv_mib: float = 0.0
    activation_by_kind_mib: tuple[float, ...] = (0.0,) * len(KINDS)
    #: Alive at the peak of a pass without gradients, beyond what the training step and convolutions count.
    inference_mib: float = 0.0
    macs: float = 0.0
    ops: int = 0
    #: Time steps of recurrent layers, counted per layer and direction: each has to wait for the one before.
    recurrent_steps: int = 0
    #: What the ops of the forward pass write, whether or not it is kept.
    written_mib: float = 0.0
    #: Backward passes of the whole program, where the code says how many; None where it does not.
    steps: int | None = None
    batch: int | None = None
    sequence: int | None = None
    image: int | None = None
    precision: str = "float32"
    optimizer: str = ""
    training: bool = False
    checkpointing: bool = False
    guesses: int = 0
    #: Whether the code starts programs, or makes code, that could not be read.
    starts_unknown: bool = False
    #: Whether most sizes of the network, or of what flows through it, come from where the code does not say.
    unsized: bool = False
    stopped_early: bool = False
    #: Whether a whole pass through a network was walked.
    step_seen: bool = False
    #: Samples per step that stood in where the code does not say.
    assumed_batch: int = 0
    notes: tuple[str, ...] = field(default=())
    #: Networks by name that were called, as ``library/name``, each with the shape of what went in and the numbers in
    #: its weights.
    networks: tuple[tuple[str, tuple[int | None, ...], int], ...] = ()

    @property
    def uses_accelerator(self) -> bool:
        """Whether the code imports anything that could use a GPU: any library not known to leave it alone."""
        return bool(self.imports - _PROCESSOR_ONLY - sys.stdlib_module_names)

    @property
    def frameworks(self) -> tuple[str, ...]:
        """Imported libraries that may hold networks which the analysis does not read, the well-known first."""
        unread = self.imports - _PROCESSOR_ONLY - sys.stdlib_module_names - _READ
        return tuple(sorted(unread, key=lambda name: (name not in _NOT_READ, name)))

    @property
    def known(self) -> bool:
        """Whether a pass through a network, or work on tensors of the accelerator, was found."""
        if (
            self.unsized
            or self.negative
            or (self.stopped_early and not self.step_seen)
            or not all(value < _ABSURD_MIB for value in self.vector())
        ):
            return False
        return self.ops > 0 and (self.parameters > 0 or self.data_mib > 0)

    @property
    def negative(self) -> bool:
        """Whether something has fewer than no bytes or weights: an option of the program was given a negative size."""
        counted = (
            self.parameters, self.parameter_mib, self.gradient_mib, self.optimizer_mib, self.cast_mib, self.data_mib,
            self.activation_mib, self.transient_mib, self.inference_mib, self.macs, *self.activation_by_kind_mib,
        )  # fmt: skip
        return any(value < 0 for value in counted)

    @property
    def resident_mib(self) -> float:
        """What lives through the whole step: weights, optimizer state, casts, data."""
        return self.parameter_mib + self.optimizer_mib + self.cast_mib + self.data_mib

    @property
    def update_mib(self) -> float:
        """What lives during the optimizer's update besides: gradients, and its own scratch.

        Gradients are freed before the next forward pass (``zero_grad`` sets them to None), so they do
        not meet the activations. Adam's fused loops make one more copy of the gradients' size.
        """
        return self.gradient_mib * (2.0 if self.optimizer_mib >= 1.9 * self.gradient_mib else 1.0)

    def vector(self) -> list[float]:
        """Values of ``FEATURES``, in order."""
        activation = max(self.activation_mib, 1e-6)
        share = [mib / activation for mib in self.activation_by_kind_mib]
        moving = max(self.transient_mib, 1e-6)
        by_kind = list(self.activation_by_kind_mib)
        by_kind[KINDS.index("other")] += self.inference_mib
        physics = [float(self.largest_conv_mib > 0), self.resident_mib, self.update_mib,
                   self.transient_mib, self.largest_conv_mib,
                   *by_kind]  # fmt: skip
        structure = [
            *(share if self.activation_mib > 0 else [0.0] * len(KINDS)),
            math.log1p(self.ops), math.log1p(self.parameters),
            math.log((self.activation_mib + moving) * MIB / max(self.macs, 1.0)),
            math.log((self.activation_mib + moving) / max(self.ops, 1) / (self.batch or 1)),
            self.transient_mib / (self.activation_mib + moving),
            self.largest_mib / (self.activation_mib + moving),
            self.largest_conv_mib / (self.activation_mib + moving),
            math.log((self.parameter_mib + 1e-3) * (self.batch or 1)
                     / (self.activation_mib + moving)),
        ]  # fmt: skip
        return physics + structure
