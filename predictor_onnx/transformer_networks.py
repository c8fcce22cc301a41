"""Networks of the transformers library with a loss of their own, built from their written-out shape without weights."""

from __future__ import annotations

from typing import Any, Final

from predictor_onnx.train.checkpoints import CHECKPOINTS

#: Of networks whose bare form has no loss: encoders are trained to fill in masked words.
_WITH_LOSS: Final = {
    f"{name}Model": f"{name}ForMaskedLM"
    for name in ("Albert", "Bert", "DistilBert", "Electra", "Roberta", "XLMRoberta")
}
#: Where a decoder begins when the class default of the configuration leaves it open (T5's published ``config.json``).
_DECODER_START: Final = 0
_ATTENTION: Final = {"": None, "fused": "sdpa", "eager": "eager"}


def architecture(name: str) -> str:
    """The class of transformers that trains a checkpoint of `CHECKPOINTS`.

    Raises:
        KeyError: the checkpoint is not known.
    """
    _, model_name, _, _ = CHECKPOINTS[name]
    return _WITH_LOSS.get(model_name, model_name)


def build(name: str, attention: str = "", classes: int = 1000) -> Any:
    """A network whose output has a ``loss`` when it is given ``labels``.

    Args:
        name: a checkpoint of `CHECKPOINTS`.
        attention: ``fused``, ``eager``, or empty for the library's choice.
        classes: how many classes a network for images tells apart.

    Raises:
        KeyError: the checkpoint or the kind of attention is not known.
        ImportError: transformers is not installed.
    """
    import transformers

    config_name, _, kind, changes = CHECKPOINTS[name]
    if kind == "image":
        changes = {**changes, "num_labels": classes}
    config = getattr(transformers, config_name)(**changes)
    wanted = _ATTENTION[attention]
    if wanted is not None:
        config._attn_implementation = wanted
    if kind == "text-to-text" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = _DECODER_START
    return getattr(transformers, architecture(name))(config)
