"""From what the static analysis read to a step that can be traced, where the code runs one network that has a name."""

from __future__ import annotations

from typing import Final

from predictor_onnx import catalog
from predictor_onnx.configuration import Configuration, Precision
from predictor_onnx.features import Workload

_OPTIMIZERS: Final = frozenset(["adam", "adamw", "sgd", "rmsprop", "adagrad", "nadam", "radam"])
_AUTOCAST: Final = {"float16": Precision.AMP_FLOAT16, "bfloat16": Precision.AMP_BFLOAT16}
_WHOLE: Final = {"float32": Precision.FLOAT32, "float16": Precision.FLOAT16, "bfloat16": Precision.BFLOAT16}
#: Share of the weights that the program may have beside the network, or leave untrained.
_OTHER_WEIGHTS: Final = 0.05
_MOMENTUM: Final = 0.9
#: What an optimizer keeps more of than this, in sizes of the gradients, when it has momentum.
_WITHOUT_MOMENTUM: Final = {"sgd": 0.5, "rmsprop": 1.5}


def configuration(work: Workload) -> Configuration | None:
    """The step as it can be traced; None where the code does more, or other things, than run one known network."""
    if len(work.networks) != 1 or not work.known:
        return None
    ((name, shape, parameters),) = work.networks
    library, _, model = name.partition("/")
    entry = catalog.find(library, model)
    sized = [side for side in shape if side is not None]
    if entry is None or len(sized) != len(shape) or not _is_all(work, parameters):
        return None
    precisions = _AUTOCAST if work.cast_mib else _WHOLE
    optimizer = work.optimizer.lower() if work.training else ""
    if work.precision not in precisions or (optimizer and optimizer not in _OPTIMIZERS):
        return None
    most = _WITHOUT_MOMENTUM.get(optimizer)
    momentum = _MOMENTUM if most is not None and work.optimizer_mib > most * work.gradient_mib else 0.0
    return Configuration(
        source=library, model=model.partition(".")[0] if library == "timm" else model, batch=sized[0],
        shape=tuple(sized[1:]), precision=precisions[work.precision], optimizer=optimizer,
        momentum=momentum, training=work.training, checkpointing=work.checkpointing,
    )  # fmt: skip


def _is_all(work: Workload, parameters: int) -> bool:
    """Whether the program's weights are those of the network, and all of them are trained if any is."""
    if abs(work.parameters - parameters) > _OTHER_WEIGHTS * parameters:
        return False
    return not work.training or work.trained_parameters >= (1 - _OTHER_WEIGHTS) * work.parameters
