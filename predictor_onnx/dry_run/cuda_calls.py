"""``torch.cuda`` of a process that has a card: every question has an answer, and no call needs a driver."""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from typing import Any, Final, Self

import torch

from predictor_onnx.dry_run.card import CARD, CardRecorder
from predictor_onnx.trace.replay import replay

#: The card that is played: large enough that no program thinks better of it. Emulated; nothing is measured on it.
NAME: Final = "Emulated accelerator"
_MEMORY: Final = 80 << 30
_CAPABILITY: Final = (9, 0)


class _Inert:
    """A stream, an event or a graph: nothing runs beside anything else."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = CARD
        self._at = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record(self, *_: Any) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, other: _Inert) -> float:
        return max(1.0, (other._at - self._at) * 1e3)

    def query(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _properties(*_: Any) -> Any:
    return types.SimpleNamespace(
        name=NAME, major=_CAPABILITY[0], minor=_CAPABILITY[1], total_memory=_MEMORY, multi_processor_count=132,
        is_integrated=0, is_multi_gpu_board=0, max_threads_per_multi_processor=2048, warp_size=32,
        L2_cache_size=50 << 20, gcnArchName="", regs_per_multiprocessor=65536, shared_memory_per_block_optin=232448,
    )  # fmt: skip


def _state(*_: Any) -> torch.Tensor:
    return torch.zeros(16, dtype=torch.uint8)


def calls(recorder: CardRecorder) -> dict[str, Any]:
    """What stands under which name of ``torch.cuda``."""

    def peak(*_: Any, **__: Any) -> int:
        return replay(recorder.events).allocated

    def live(*_: Any, **__: Any) -> int:
        return recorder.live

    def reserved(*_: Any, **__: Any) -> int:
        return replay(recorder.events).reserved

    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    answers: dict[str, Any] = {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: _CAPABILITY,
        "get_device_properties": _properties, "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (max(0, _MEMORY - recorder.live), _MEMORY),
        "memory_allocated": live, "max_memory_allocated": peak, "memory_reserved": reserved, "memory_cached": reserved,
        "max_memory_reserved": reserved, "max_memory_cached": reserved, "memory_stats": lambda *_: {},
        "memory_summary": lambda *_, **__: "", "memory_snapshot": lambda *_: [], "utilization": lambda *_: 0,
        "Stream": _Inert, "ExternalStream": _Inert, "Event": _Inert, "CUDAGraph": _Inert, "device": _Inert,
        "device_of": _Inert, "stream": _Inert, "graph": _Inert,
        "current_stream": _Inert, "default_stream": _Inert,
        "get_rng_state": _state, "get_rng_state_all": lambda: [_state()], "initial_seed": lambda: 0,
        "get_arch_list": lambda: ["sm_90"], "can_device_access_peer": lambda *_: False,
    }  # fmt: skip
    for name in (
        "_lazy_init", "init", "synchronize", "set_device", "set_stream", "empty_cache", "ipc_collect", "manual_seed",
        "manual_seed_all", "seed", "seed_all", "set_rng_state", "set_rng_state_all", "reset_peak_memory_stats",
        "reset_max_memory_allocated", "reset_max_memory_cached", "reset_accumulated_memory_stats",
        "set_per_process_memory_fraction", "_sleep",
    ):  # fmt: skip
        answers[name] = nothing
    for name, kind in (("FloatTensor", torch.float32), ("HalfTensor", torch.float16), ("DoubleTensor", torch.float64),
                       ("LongTensor", torch.int64), ("IntTensor", torch.int32), ("ByteTensor", torch.uint8),
                       ("BoolTensor", torch.bool), ("BFloat16Tensor", torch.bfloat16)):  # fmt: skip
        answers[name] = _maker(kind)
    return answers


def _maker(kind: torch.dtype) -> Callable[..., torch.Tensor]:
    def made(*what: Any) -> torch.Tensor:
        if what and all(isinstance(one, int) for one in what):
            return torch.empty(what, dtype=kind, device=CARD)
        return torch.tensor(what[0] if what else [], dtype=kind, device=CARD)

    return made


def install(recorder: CardRecorder) -> None:
    """Answer so for the rest of this process."""
    for name, answer in calls(recorder).items():
        setattr(torch.cuda, name, answer)
    torch.backends.cuda.is_built = lambda: True
    torch.backends.cudnn.is_available = lambda: True
    torch.backends.cudnn.version = lambda: 90100
    _autocast()
    generator = torch.Generator

    class Generator(generator):  # type: ignore[misc,valid-type]
        """A generator of the card is one of the host."""

        def __new__(cls, device: Any = None) -> Any:
            return generator()

    torch.Generator = Generator


def _autocast() -> None:
    """Autocast of the card is autocast of the host, with the card's own choice of precision."""
    autocast = torch.amp.autocast_mode.autocast
    enter = autocast.__init__

    def init(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        if str(device_type).partition(":")[0] == "cuda":
            enter(self, "cpu", torch.float16 if dtype is None else dtype, enabled, cache_enabled)
        else:
            enter(self, device_type, dtype, enabled, cache_enabled)

    autocast.__init__ = init
    enabled, kind = torch.is_autocast_enabled, torch.get_autocast_dtype
    torch.is_autocast_enabled = lambda device_type="cuda": enabled("cpu" if device_type == "cuda" else device_type)
    torch.get_autocast_dtype = lambda device_type: kind("cpu" if device_type == "cuda" else device_type)
    torch.get_autocast_gpu_dtype = lambda: kind("cpu")
