"""``DataLoader``: what a batch looks like, and how many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from predictor_onnx.static.operands import argument
from predictor_onnx.static.values import UNKNOWN, Loader, Record, Tensor, Value

if TYPE_CHECKING:
    from predictor_onnx.static.evaluator import Evaluator

Kwargs = dict[str, Value]

#: With these a loader chooses samples by other rules than its dataset's length.
_OWN_RULES: Final = ((3, "sampler"), (4, "batch_sampler"))


def loader(ev: Evaluator, args: list[Value], kwargs: Kwargs) -> Loader:
    """A loader over a dataset, by one sample of it."""
    data = argument(args, kwargs, 0, "dataset", UNKNOWN)
    size = argument(args, kwargs, 1, "batch_size", 1)
    length = _length(data, size, args, kwargs)
    if size is UNKNOWN:
        size = ev.hints.batch
    elif isinstance(size, int):
        ev.hints.note("batch_size", size)
    collated = "collate_fn" in kwargs and kwargs["collate_fn"] is not None
    return Loader(UNKNOWN if collated else data, size if isinstance(size, int) else None, length=length)


def _length(data: Value, size: Value, args: list[Value], kwargs: Kwargs) -> int | None:
    """Batches in all; None where the dataset's length or the batch is not known."""
    samples = _samples(data)
    if samples is None or not isinstance(size, int) or size < 1:
        return None
    if any(argument(args, kwargs, place, name, None) is not None for place, name in _OWN_RULES):
        return None
    drop_last = argument(args, kwargs, 8, "drop_last", False)
    if not isinstance(drop_last, bool):
        return None
    return samples // size if drop_last else -(-samples // size)


def _samples(data: Value) -> int | None:
    if isinstance(data, Record) and data.kind == "TensorDataset":
        data = next((one for one in data.attrs.get("tensors", ()) if isinstance(one, Tensor)), UNKNOWN)
    if isinstance(data, Tensor):
        return data.shape[0] if data.shape else None
    length = data.attrs.get("length") if isinstance(data, Record) else None
    return length if isinstance(length, int) else None
