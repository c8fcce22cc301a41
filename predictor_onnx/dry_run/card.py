"""A card that is not there: a recorder that counts what would be on it, and leaves the host's tensors alone.

Tensors of the card are tensors without data that say they are on ``cuda:0``, and CPU tensors to torch: the backward
pass of real CUDA ones needs a device. Which ones are on the card is told by their storage. Small ones of the host hold
real numbers, so that what the program computes of them (widths, indices, permutations) is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from predictor_onnx.trace.events import Category, Kind, Phase
from predictor_onnx.trace.recorder import Recorder

CARD: Final = torch.device("cuda", 0)
_HOST: Final = torch.device("cpu")
_ATEN: Final[Any] = torch.ops.aten
_READ_VALUE: Final = _ATEN._local_scalar_dense.default
_DEVICE_OF: Final[Any] = torch.ops.prim.device.default
#: Numbers in a tensor up to which it is real, when the host makes it from nothing.
_SMALL: Final = 1 << 14
#: The same for ranges and permutations: indices must be right.
_LONG: Final = 1 << 21
_RANGES: Final = frozenset({"arange", "range", "randperm", "linspace", "logspace"})
#: Sides of a square, such as ``eye``.
_SIDE: Final = 1 << 10


def is_card(device: Any) -> bool:
    """Whether a device argument names the card; a bare number does."""
    if isinstance(device, str):
        return device.partition(":")[0] == "cuda"
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class CardRecorder(Recorder):
    """Records what is on the card, and nothing else.

    Attributes:
        computing: how many ops are being computed; tensors tell torch their true device then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.computing = 0
        self._forced = False
        self._to_host = False
        #: Storages whose flags are all on: of comparisons that hold for every finite number.
        self._true: dict[int, Any] = {}

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor is on the card."""
        return isinstance(tensor, FakeTensor) and id(_storage(tensor)) in self._numbers

    @contextmanager
    def forcing(self, *, to_host: bool = False) -> Iterator[None]:
        """Whatever is made inside is on the card; or, ``to_host``, on the host."""
        before = self._forced, self._to_host
        self._forced, self._to_host = not to_host, to_host
        try:
            yield
        finally:
            self._forced, self._to_host = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF or func.namespace == "profiler":
            # The tracer counts these too, and the model has learnt from its counts.
            told = func(*args, **(kwargs or {}))
            if func is not _DEVICE_OF or self.holds(args[0]):
                self._done(func, args, kwargs, told, [])
            return told
        if torch.is_inference_mode_enabled() and (parts := self._in_parts(func, args, kwargs)) is not NotImplemented:
            return parts
        self.computing += 1
        try:
            return self._computed(func, args, dict(kwargs or {}))
        finally:
            self.computing -= 1

    def _in_parts(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An op as those that it is made of: without autograd torch shows the whole, which has no cost of its own."""
        with self:
            return func.decompose(*args, **(kwargs or {}))

    def _computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is _READ_VALUE and isinstance(args[0], FakeTensor):
            return self._value(args[0])
        if isinstance(kwargs.get("device"), torch.device) and kwargs["device"].type == "cuda":
            kwargs["device"] = _HOST
            on_card = True
        else:
            on_card = self._forced or (not self._to_host and any(self.holds(tensor) for tensor in given))
        no_fake = not any(isinstance(tensor, FakeTensor) for tensor in given)
        if not on_card and no_fake and (given or _asks_little(func, args)):
            with _disable_current_modes():
                return func(*args, **kwargs)
        known = {id(_storage(tensor)) for tensor in given}
        instead = _INSTEAD.get(func)
        result = instead(*args, **kwargs) if instead is not None else func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if on_card:
            self._done(func, args, kwargs, result, made)
            for tensor in made:
                if id(_storage(tensor)) not in known:
                    self._seen(tensor)
        if made and made[0].dtype == torch.bool:
            self._mark_truth(func, args, given, made[0])
        return result

    def _value(self, tensor: torch.Tensor) -> Any:
        """Nothing has a value: a number is one (a loss, a count), a flag is off but where it must be on."""
        if tensor.dtype == torch.bool:
            return id(_storage(tensor)) in self._true
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _mark_truth(self, func: Any, args: Any, given: list[torch.Tensor], flags: torch.Tensor) -> None:
        """Follows what ``isfinite`` is made of, so that no program gives up on a loss that is no number."""
        name = func._overloadpacket.__name__
        if name == "eq":
            holds = len(given) == 2 and given[0] is given[1]
        elif name == "ne":
            holds = len(given) == 1 and not isinstance(args[1], torch.Tensor) and math.isinf(args[1])
        elif name in ("bitwise_and", "logical_and", "mul", "all", "any", "_to_copy", "clone") or func.is_view:
            holds = bool(given) and all(id(_storage(tensor)) in self._true for tensor in given)
        else:
            holds = False
        storage = _storage(flags)
        if holds:
            self._true[id(storage)] = storage
        else:
            self._true.pop(id(storage), None)

    def arrived(self, tensor: torch.Tensor) -> None:
        """A tensor came from the host; outside of building that is a sample."""
        self.mark(tensor, Category.DATA)

    def weights(self, module: torch.nn.Module) -> None:
        """A module's own weights and buffers are where they will stay."""
        for weight in (*module._parameters.values(), *module._buffers.values()):
            if weight is not None:
                self.mark(weight, Category.PARAMETER)

    def began(self) -> None:
        """A forward pass begins, if the program was still building."""
        if self.phase is Phase.BUILD:
            self.enter(Phase.FORWARD)

    @property
    def live(self) -> int:
        """Bytes that are on the card now."""
        taken = {
            subject: size
            for kind, subject, size in zip(self.events.kinds, self.events.subjects, self.events.sizes, strict=True)
            if kind == Kind.TAKE
        }
        return sum(taken[number] for number in self._numbers.values())

    def numbers(self) -> Iterable[int]:
        """What tells the storages that are on the card now."""
        return self._numbers.values()

    def living(self, tensor: torch.Tensor) -> int | None:
        """What tells a tensor's storage from all others that are on the card; None off it."""
        return self._numbers.get(id(_storage(tensor))) if self.holds(tensor) else None


def _storage(tensor: torch.Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        try:
            return tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a sparse tensor has several, and tells none
            return tensor


def _asks_little(func: Any, args: Any) -> bool:
    """Whether what an op makes from nothing is small: by its size, else by the numbers that it is asked with."""
    for given, argument in zip(args, func._schema.arguments, strict=False):
        if argument.name == "size":
            return math.prod(int(side) for side in given) <= _SMALL
    name = func._overloadpacket.__name__
    most = math.inf if name == "scalar_tensor" else _LONG if name in _RANGES else _SIDE
    return all(abs(float(one)) <= most for one in args if isinstance(one, int | float))


def _all_of(tensor: torch.Tensor) -> torch.Tensor:
    """What ``nonzero`` gives at most; a program's true number is not known."""
    return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.long)


def _all_selected(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    return tensor.new_empty((math.prod(shape),))


def _all_unique(tensor: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    long = tensor.new_empty(tensor.shape, dtype=torch.long)
    return tensor.new_empty((tensor.numel(),)), long, tensor.new_empty((tensor.numel(),), dtype=torch.long)


def _with_places(tensor: torch.Tensor, indices: Any) -> list[Any]:
    """Masks among the indices, as the places that they name at most."""
    places: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
            places.extend(tensor.new_empty((index.numel(),), dtype=torch.long) for _ in range(index.dim()))
        else:
            places.append(index)
    return places


def _indexed(tensor: torch.Tensor, indices: Any) -> torch.Tensor:
    out: torch.Tensor = _ATEN.index.Tensor(tensor, _with_places(tensor, indices))
    return out


def _unscaled(*_: Any) -> None:
    """The gradient scaler divides gradients where they are; nothing is made."""


def _same_scale(scale: torch.Tensor, *_: Any) -> torch.Tensor:
    return scale


def _ops(named: dict[str, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """By the op; a name that this torch lacks is none."""
    found: dict[Any, Callable[..., Any]] = {}
    for name, instead in named.items():
        packet, _, overload = name.partition(".")
        if hasattr(_ATEN, packet) and hasattr(getattr(_ATEN, packet), overload):
            found[getattr(getattr(_ATEN, packet), overload)] = instead
    return found


_INSTEAD: Final = _ops({
    "nonzero.default": _all_of,
    "masked_select.default": _all_selected,
    "_unique2.default": _all_unique,
    "unique_dim.default": lambda tensor, *_, **__: _all_unique(tensor),
    "index.Tensor": _indexed,
    "_amp_foreach_non_finite_check_and_unscale_.default": _unscaled,
    "_amp_update_scale_.default": _same_scale,
})  # fmt: skip
