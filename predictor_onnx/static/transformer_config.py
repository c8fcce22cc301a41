"""Transformers built from a ``*Config(…)``: their weight and cost from the hyper-parameters."""

from __future__ import annotations

from typing import Any, Final

from predictor_onnx.static.values import UNKNOWN, Value

_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"),
    "kv": ("num_key_value_heads",),
    "inner": ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim"),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions", "n_ctx"),
}
#: hidden, layers, heads, vocabulary, positions; whether the feed-forward part is gated, whether positions
#: are learnt, whether input and output embeddings are one. Defaults of each config class.
_FAMILIES: Final[dict[str, tuple[int, int, int, int, int, bool, bool, bool]]] = {
    "GPT2": (768, 12, 12, 50257, 1024, False, True, True),
    "Bert": (768, 12, 12, 30522, 512, False, True, True),
    "Roberta": (768, 12, 12, 50265, 514, False, True, True),
    "DistilBert": (768, 6, 12, 30522, 512, False, True, True),
    "Llama": (4096, 32, 32, 32000, 2048, True, False, False),
    "Mistral": (4096, 32, 32, 32000, 4096, True, False, False),
    "Qwen2": (4096, 32, 32, 151936, 4096, True, False, False),
    "OPT": (768, 12, 12, 50272, 2048, False, True, True),
    "GPTNeoX": (6144, 44, 64, 50432, 2048, False, False, False),
}
_INNER: Final = {"Llama": 11008, "Mistral": 14336, "Qwen2": 22016}
_SEQUENCES: Final = (128, 512)


def _figures(values: dict[str, Value], family: str) -> dict[str, int]:
    hidden, layers, heads, vocabulary, positions, *_ = _FAMILIES[family]
    base = {"hidden": hidden, "layers": layers, "heads": heads, "vocabulary": vocabulary,
            "positions": positions}  # fmt: skip
    for meaning, names in _NAMES.items():
        for name in names:
            value = values.get(name, UNKNOWN)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24:
                base[meaning] = value
    base.setdefault("inner", _INNER.get(family, 4 * base["hidden"]))
    base.setdefault("kv", base["heads"])
    return base


def family_of(config_class: str) -> str | None:
    """``GPT2Config`` -> ``GPT2``; None for a family that is not described."""
    family = config_class.removesuffix("Config")
    return family if family in _FAMILIES else None


def parameter_count(values: dict[str, Value], family: str, *, head: bool) -> int:
    """Weights of the network; ``head`` is whether it ends in a language-model head."""
    f = _figures(values, family)
    gated, learnt, tied = _FAMILIES[family][5:]
    h, inner = f["hidden"], f["inner"]
    kv = h * f["kv"] // max(1, f["heads"])
    if gated:
        bias = 2 * kv + h if family == "Qwen2" else 0
        block = 2 * h * h + 2 * h * kv + bias + 3 * h * inner + 2 * h
        final = h
    else:
        block = 4 * h * h + 4 * h + 2 * h * inner + h + inner + 4 * h
        final = 2 * h
    total = f["vocabulary"] * h + f["layers"] * block + final
    if learnt:
        total += f["positions"] * h
    if family in {"Bert", "Roberta"}:
        total += 2 * h if family == "Bert" else h
        total += 0 if head else h * h + h  # the pooler
    tied = values.get("tie_word_embeddings", tied) is not False and (tied or values.get("tie_word_embeddings") is True)
    return total + (0 if tied or not head else f["vocabulary"] * h)


def entry(values: dict[str, Value], family: str, model_class: str) -> dict[str, Any]:
    """A catalog entry for a network described by its configuration.

    Per token and block a training step keeps the inputs of both norms, q, k, v, the attention's output and
    both residual sums (12 times the width), and four (gated: six) times the inner width; at the end the
    logits and their log-softmax.
    """
    head = "LM" in model_class
    f = _figures(values, family)
    gated = _FAMILIES[family][5]
    per_token = f["layers"] * (12 * f["hidden"] + (6 if gated else 4) * f["inner"])
    logits = f["vocabulary"] if head else f["hidden"]
    count = parameter_count(values, family, head=head)
    result: dict[str, Any] = {"params": count, "vocabulary": f["vocabulary"]}
    for length in _SEQUENCES:
        saved = length * (per_token + (logits if head else 0))
        result[f"at_{length}"] = {
            "saved": saved, "backward_peak": saved + 2 * length * logits,
            "inference_peak": length * max(2 * logits, 4 * f["inner"]),
            "largest": length * max(logits, f["inner"]), "largest_conv": 0, "allocated": 2 * saved,
            "macs": length * count, "ops": 30 * f["layers"],
            "kinds": [0, length * 2 * f["layers"] * f["hidden"],
                      length * 2 * f["layers"] * f["inner"],
                      length * 6 * f["layers"] * f["hidden"],
                      max(0, saved - length * f["layers"] * (8 * f["hidden"] + 2 * f["inner"]))],
        }  # fmt: skip
    return result
