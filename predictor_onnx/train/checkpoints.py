"""Hyper-parameters of well-known transformers checkpoints, written out by hand.

Source: each checkpoint's published ``config.json`` or its paper. No hub is asked.
Entry: hub name -> (config class, model class, kind of input, what differs from the class default).
"""

from __future__ import annotations

from typing import Any

Checkpoint = tuple[str, str, str, dict[str, Any]]


def _gpt2(n_embd: int, n_layer: int, n_head: int) -> Checkpoint:
    return (
        "GPT2Config", "GPT2LMHeadModel", "text",
        {"n_embd": n_embd, "n_layer": n_layer, "n_head": n_head},
    )  # fmt: skip


def _bert(prefix: str, hidden: int, layers: int, heads: int, **extra: Any) -> Checkpoint:
    return (
        f"{prefix}Config", f"{prefix}Model", "text",
        {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
         "intermediate_size": 4 * hidden, **extra},
    )  # fmt: skip


def _roberta(hidden: int, layers: int, heads: int, vocab: int = 50265) -> Checkpoint:
    return _bert("Roberta" if vocab == 50265 else "XLMRoberta", hidden, layers, heads,
                 vocab_size=vocab, max_position_embeddings=514, type_vocab_size=1)  # fmt: skip


def _llama(
    hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int,
    prefix: str = "Llama", **extra: Any,
) -> Checkpoint:  # fmt: skip
    return (
        f"{prefix}Config", f"{prefix}ForCausalLM", "text",
        {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
         "num_key_value_heads": kv, "intermediate_size": inner, "vocab_size": vocab, **extra},
    )  # fmt: skip


def _opt(hidden: int, layers: int, heads: int, **extra: Any) -> Checkpoint:
    return (
        "OPTConfig", "OPTForCausalLM", "text",
        {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
         "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, **extra},
    )  # fmt: skip


def _t5(d_model: int, d_ff: int, layers: int, heads: int, **extra: Any) -> Checkpoint:
    return (
        "T5Config", "T5ForConditionalGeneration", "text-to-text",
        {"d_model": d_model, "d_ff": d_ff, "num_layers": layers, "num_heads": heads, **extra},
    )  # fmt: skip


def _vit(hidden: int, layers: int, heads: int, patch: int = 16, size: int = 224) -> Checkpoint:
    return (
        "ViTConfig", "ViTForImageClassification", "image",
        {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
         "intermediate_size": 4 * hidden, "patch_size": patch, "image_size": size,
         "num_labels": 1000},
    )  # fmt: skip


def _neox(hidden: int, layers: int, heads: int, vocab: int = 50304) -> Checkpoint:
    return (
        "GPTNeoXConfig", "GPTNeoXForCausalLM", "text",
        {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
         "intermediate_size": 4 * hidden, "vocab_size": vocab},
    )  # fmt: skip


CHECKPOINTS: dict[str, Checkpoint] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "distilgpt2": _gpt2(768, 6, 12),
    "bert-base-uncased": _bert("Bert", 768, 12, 12, vocab_size=30522),
    "bert-base-cased": _bert("Bert", 768, 12, 12, vocab_size=28996),
    "bert-base-chinese": _bert("Bert", 768, 12, 12, vocab_size=21128),
    "bert-base-multilingual-cased": _bert("Bert", 768, 12, 12, vocab_size=119547),
    "bert-large-uncased": _bert("Bert", 1024, 24, 16, vocab_size=30522),
    "bert-large-cased": _bert("Bert", 1024, 24, 16, vocab_size=28996),
    "roberta-base": _roberta(768, 12, 12),
    "roberta-large": _roberta(1024, 24, 16),
    "xlm-roberta-base": _roberta(768, 12, 12, vocab=250002),
    "xlm-roberta-large": _roberta(1024, 24, 16, vocab=250002),
    "distilbert-base-uncased": (
        "DistilBertConfig", "DistilBertModel", "text", {"vocab_size": 30522},
    ),
    "albert-base-v2": (
        "AlbertConfig", "AlbertModel", "text",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072},
    ),
    "google/electra-small-discriminator": (
        "ElectraConfig", "ElectraModel", "text",
        {"embedding_size": 128, "hidden_size": 256, "num_hidden_layers": 12,
         "num_attention_heads": 4, "intermediate_size": 1024},
    ),
    "google/electra-base-discriminator": (
        "ElectraConfig", "ElectraModel", "text",
        {"embedding_size": 768, "hidden_size": 768, "num_hidden_layers": 12,
         "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "sentence-transformers/all-MiniLM-L6-v2": _bert("Bert", 384, 6, 12, vocab_size=30522),
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "EleutherAI/pythia-70m": _neox(512, 6, 8),
    "EleutherAI/pythia-160m": _neox(768, 12, 12),
    "EleutherAI/pythia-410m": _neox(1024, 24, 16),
    "EleutherAI/pythia-1b": _neox(2048, 16, 8),
    "EleutherAI/pythia-1.4b": _neox(2048, 24, 16),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(2048, 22, 32, 4, 5632, 32000),
    "meta-llama/Llama-2-7b-hf": _llama(4096, 32, 32, 32, 11008, 32000),
    "meta-llama/Llama-2-7b-chat-hf": _llama(4096, 32, 32, 32, 11008, 32000),
    "meta-llama/Llama-2-13b-hf": _llama(5120, 40, 40, 40, 13824, 32000),
    "meta-llama/Meta-Llama-3-8B": _llama(4096, 32, 32, 8, 14336, 128256),
    "meta-llama/Llama-3.1-8B": _llama(4096, 32, 32, 8, 14336, 128256),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(4096, 32, 32, 8, 14336, 128256),
    "meta-llama/Llama-3.2-1B": _llama(
        2048, 16, 32, 8, 8192, 128256, head_dim=64, tie_word_embeddings=True
    ),
    "meta-llama/Llama-3.2-3B": _llama(
        3072, 28, 24, 8, 8192, 128256, head_dim=128, tie_word_embeddings=True
    ),
    "mistralai/Mistral-7B-v0.1": _llama(4096, 32, 32, 8, 14336, 32000, "Mistral"),
    "mistralai/Mistral-7B-Instruct-v0.2": _llama(4096, 32, 32, 8, 14336, 32000, "Mistral"),
    "Qwen/Qwen2-0.5B": _llama(
        896, 24, 14, 2, 4864, 151936, "Qwen2", tie_word_embeddings=True
    ),
    "Qwen/Qwen2.5-0.5B": _llama(896, 24, 14, 2, 4864, 151936, "Qwen2", tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B": _llama(1536, 28, 12, 2, 8960, 151936, "Qwen2", tie_word_embeddings=True),
    "Qwen/Qwen2.5-3B": _llama(2048, 36, 16, 2, 11008, 151936, "Qwen2", tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B": _llama(3584, 28, 28, 4, 18944, 152064, "Qwen2", tie_word_embeddings=False),
    "t5-small": _t5(512, 2048, 6, 8),
    "t5-base": _t5(768, 3072, 12, 12),
    "t5-large": _t5(1024, 4096, 24, 16),
    "facebook/bart-base": (
        "BartConfig", "BartForConditionalGeneration", "text-to-text",
        {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12,
         "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072},
    ),
    "facebook/bart-large": ("BartConfig", "BartForConditionalGeneration", "text-to-text", {}),
    "google/vit-base-patch16-224": _vit(768, 12, 12),
    "google/vit-base-patch16-224-in21k": _vit(768, 12, 12),
    "google/vit-large-patch16-224": _vit(1024, 24, 16),
    "facebook/deit-small-patch16-224": _vit(384, 12, 6),
    "microsoft/resnet-50": ("ResNetConfig", "ResNetForImageClassification", "image", {}),
}  # fmt: skip
