"""Account of the memory that one step of the evaluated code needs.

The recorder sees every op in order: what it allocates, and what autograd keeps for the backward pass. A
storage is counted once, however many ops keep it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from predictor_onnx.features import KINDS
from predictor_onnx.static.budget import Budget
from predictor_onnx.static.values import DTYPE_BYTES, FLOAT_DTYPES, Tensor, tensor_of


@dataclass
class StepProfile:
    """Bytes of one pass over one batch."""

    saved: float = 0.0
    backward_peak: float = 0.0
    inference_peak: float = 0.0
    largest: float = 0.0
    largest_conv: float = 0.0
    allocated: float = 0.0
    macs: float = 0.0
    ops: int = 0
    recurrent_steps: int = 0
    kinds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def plus(self, other: StepProfile) -> StepProfile:
        """Both passes in one step: what is kept adds up, the largest of anything stays largest."""
        return StepProfile(
            saved=self.saved + other.saved,
            backward_peak=max(self.backward_peak, self.saved + other.backward_peak),
            inference_peak=max(self.inference_peak, other.inference_peak),
            largest=max(self.largest, other.largest),
            largest_conv=max(self.largest_conv, other.largest_conv),
            allocated=self.allocated + other.allocated,
            macs=self.macs + other.macs,
            ops=self.ops + other.ops,
            recurrent_steps=self.recurrent_steps + other.recurrent_steps,
            kinds={kind: self.kinds[kind] + other.kinds[kind] for kind in KINDS},
        )


@dataclass
class Recorder:
    """Collects the ops of the current step and keeps the largest finished step."""

    budget: Budget = field(default_factory=Budget)
    grad: bool = True
    autocast: str | None = None
    current: StepProfile = field(default_factory=StepProfile)
    trained: StepProfile | None = None
    inferred: StepProfile = field(default_factory=StepProfile)
    backward_passes: int = 0
    #: Backward passes that the program does, turns of loops counted; None once a number is not known.
    steps: int | None = 0
    #: Whether a loop with a known number of turns was among them.
    looped: bool = False
    optimizer_steps: int = 0
    forward_depth: int = 0
    forward_passes: int = 0
    #: Layers whose input had to be guessed from names such as ``batch_size``.
    guesses: int = 0
    #: Samples in the largest batch that a network was called with, with and without gradients.
    trained_batch: int | None = None
    inferred_batch: int | None = None
    #: Whether some tensor had a size that could not be determined.
    unknown_sizes: bool = False
    #: Ops, and those of them whose output had a size that could not be determined.
    all_ops: int = 0
    unsized_ops: int = 0
    autocast_used: str | None = None
    grad_scaler: bool = False
    checkpointing: bool = False
    #: Networks by name that were called, each with the shape of what went in and the numbers in its weights.
    networks: list[tuple[str, tuple[int | None, ...], int]] = field(default_factory=list)
    #: Bytes moved to the accelerator, per place in the code.
    moved: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def op(
        self, shape: tuple[int | None, ...], dtype: str, kind: str, inputs: Sequence[Tensor], *,
        saved: Sequence[Tensor] = (), save_output: bool = False, extra_bytes: float = 0.0,
        macs: float = 0.0, inplace: bool = False,
    ) -> Tensor:  # fmt: skip
        """Record one op and return its output.

        Args:
            shape: of the output.
            dtype: of the output.
            kind: one of ``KINDS``.
            inputs: tensors that the op reads, weights included.
            saved: inputs that autograd keeps.
            save_output: whether autograd keeps the output.
            extra_bytes: kept besides those (a dropout mask, pooling indices).
            macs: multiply-accumulate operations.
            inplace: whether the output overwrites the first input.
        """
        self.budget.spend(4 + (len(shape) + len(inputs)) // 16)
        grad = self.grad and any(tensor.grad for tensor in inputs)
        out = tensor_of(shape, dtype, kind=kind, grad=grad)
        if inplace and inputs:
            out.storage = inputs[0].storage
        out.on_gpu = any(tensor.on_gpu for tensor in inputs)
        if not (grad or out.on_gpu or self.forward_depth):
            return out  # data being prepared on the host
        step = self.current
        self.unknown_sizes = self.unknown_sizes or None in shape
        self.all_ops += 1
        self.unsized_ops += None in shape
        moving = sum(
            storage.nbytes
            for storage in {id(t.storage): t.storage for t in (out, *inputs)}.values()
            if not storage.parameter
        )
        if grad:
            for tensor in (*saved, *([out] if save_output else [])):
                self._save(tensor)
            step.saved += extra_bytes
            step.kinds[kind] += extra_bytes
        if not inplace:
            step.allocated += out.storage.nbytes
        step.ops += 1
        step.macs += macs
        step.largest = max(step.largest, out.storage.nbytes)
        step.inference_peak = max(step.inference_peak, moving)
        step.backward_peak = max(step.backward_peak, step.saved + (moving if grad else 0.0))
        if kind == "conv":
            step.largest_conv = max(step.largest_conv, moving)
        return out

    def _save(self, tensor: Tensor) -> None:
        storage = tensor.storage
        if storage.saved or storage.parameter:
            return
        storage.saved = True
        self.current.saved += storage.nbytes
        self.current.kinds[storage.kind] += storage.nbytes

    def compute_dtype(self, tensor: Tensor, *, half: bool) -> str:
        """Type that an op computes in: under autocast matrix products are half, norms are float32."""
        if self.autocast is None or tensor.dtype not in FLOAT_DTYPES:
            return tensor.dtype
        return self.autocast if half else "float32"

    def cast(self, tensor: Tensor, dtype: str) -> Tensor:
        """``tensor`` in ``dtype``: itself, or a copy that has to be stored."""
        if tensor.dtype == dtype or tensor.dtype not in FLOAT_DTYPES:
            return tensor
        return self.op(tensor.shape, dtype, tensor.storage.kind, [tensor])

    def note_batch(self, samples: int) -> None:
        """A network is called with this many samples."""
        if self.grad:
            self.trained_batch = max(self.trained_batch or 0, samples)
        else:
            self.inferred_batch = max(self.inferred_batch or 0, samples)

    def note_time_major(self, steps: int | None, samples: int) -> None:
        """A recurrent layer takes time first: the batch that was noted is the second size, not the first."""
        if self.trained_batch == steps:
            self.trained_batch = samples
        if self.inferred_batch == steps:
            self.inferred_batch = samples

    @property
    def batch(self) -> int | None:
        """Samples per step: of training where the code trains."""
        return self.trained_batch if self.trained_batch is not None else self.inferred_batch

    def finish_step(self) -> None:
        """A backward pass has run: keep the step if it is the largest, and start afresh."""
        self.backward_passes += 1
        if self.steps is not None:
            self.steps += 1
        if self.trained is None or self.current.backward_peak > self.trained.backward_peak:
            self.trained = self.current
        self.current = StepProfile()

    def repeat(self, before: int | None, turns: int | None) -> None:
        """What has been counted since ``before`` was one turn of a loop; None is an unknown number of turns."""
        if before is None or self.steps is None or turns is None:
            self.steps = None
            return
        self.steps = before + (self.steps - before) * turns
        self.looped = True

    def finish_inference(self) -> None:
        """What is left without a backward pass ran forward only."""
        if self.current.inference_peak > self.inferred.inference_peak:
            self.inferred = self.current
        self.current = StepProfile()

    @contextmanager
    def without_grad(self) -> Iterator[None]:
        """Inside ``torch.no_grad``: nothing is kept."""
        before, self.grad = self.grad, False
        outer, self.current = self.current, StepProfile()
        try:
            yield
        finally:
            if self.current.inference_peak > self.inferred.inference_peak:
                self.inferred = self.current
            self.current = outer
            self.grad = before

    @contextmanager
    def in_autocast(self, dtype: str | None) -> Iterator[None]:
        """Inside ``torch.autocast``; None is a disabled autocast."""
        before, self.autocast = self.autocast, dtype
        self.autocast_used = self.autocast_used or dtype
        try:
            yield
        finally:
            self.autocast = before

    @contextmanager
    def recomputed(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Inside a checkpointed block: only its inputs stay, the rest is made again later."""
        self.checkpointing = True
        step = self.current
        for tensor in inputs:
            if self.grad:
                self._save(tensor)
        saved, kinds = step.saved, dict(step.kinds)
        try:
            yield
        finally:
            self.current.saved, self.current.kinds = saved, kinds

    def move(self, where: tuple[str, int, int], tensor: Tensor) -> None:
        """``tensor`` is made on, or copied to, the accelerator at this place in the code."""
        if not tensor.storage.parameter:
            self.moved[where] = max(self.moved.get(where, 0.0), tensor.storage.nbytes)

    @property
    def moved_bytes(self) -> float:
        """Bytes of data held on the accelerator."""
        return sum(self.moved.values())


def nbytes(elements: float, dtype: str) -> float:
    """Bytes of ``elements`` values of type ``dtype``."""
    return elements * DTYPE_BYTES.get(dtype, 4)
