"""Steps on tensors without data: what they need and do is what can be reckoned by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from predictor_onnx.configuration import Configuration, Precision
from predictor_onnx.step import build_network
from predictor_onnx.trace.affine import AffineRecord
from predictor_onnx.trace.events import Category
from predictor_onnx.trace.replay import replay
from predictor_onnx.trace.summary import summarise
from predictor_onnx.trace.tracing import STEPS, record, trace
from predictor_onnx.trace.watch import watched
from predictor_onnx.traced_step import TRACED_FEATURES

MIB = 1 << 20
KIB = 1024 / MIB


def layers(*entries: list[Any], batch: int = 256, width: int = 1024, **more: Any) -> Configuration:
    return Configuration("layers", json.dumps(entries), batch, (width,), classes=1024, **more)


#: Two layers of 1024 x 1024 numbers: 4 MiB of weights each, and 4 KiB of biases.
TWO = (["Linear", 1024, 1024], ["ReLU"], ["Linear", 1024, 1024])
WEIGHTS_MIB = 2 * (4 + 4 * KIB)


def test_a_network_of_two_layers_needs_what_can_be_reckoned() -> None:
    step = trace(layers(*TWO))
    assert step.parameters == 2 * (1024 * 1024 + 1024)
    assert step.live_mib["parameter"] == pytest.approx(WEIGHTS_MIB, abs=2 * KIB)
    assert step.live_mib["optimizer"] == pytest.approx(2 * WEIGHTS_MIB, abs=4 * KIB)
    # Two products forward; three backward, because nobody asks for the gradient of the samples.
    assert step.flops == 5 * 2 * 256 * 1024 * 1024
    assert (step.convolutions, step.depthwise, step.pointwise) == (0, 0, 0)
    assert step.largest_mib == 4


def test_an_optimizer_without_state_keeps_none() -> None:
    assert trace(layers(*TWO, optimizer="sgd")).live_mib["optimizer"] == 0
    one = trace(layers(*TWO, optimizer="sgd", momentum=0.9)).live_mib["optimizer"]
    assert one == pytest.approx(WEIGHTS_MIB, abs=2 * KIB)


def test_gradients_are_there_at_the_update() -> None:
    step = trace(layers(*TWO, batch=1))
    # Weights, two moments, gradients, and one scratch of Adam's fused loops.
    assert step.update_mib == pytest.approx(5 * WEIGHTS_MIB, rel=0.01)


def test_inference_keeps_nothing_for_a_backward_pass() -> None:
    deep = [entry for _ in range(8) for entry in (["Linear", 1024, 1024], ["ReLU"])]
    training, inference = trace(layers(*deep, batch=8192)), trace(layers(*deep, batch=8192, training=False))
    assert inference.live_mib["gradient"] == inference.live_mib["optimizer"] == 0
    assert inference.live_mib["activation"] <= 3 * 32  # of a layer what comes in and out, and the loss
    assert training.live_mib["activation"] >= 8 * 32  # each layer's


def test_dropout_keeps_a_byte_for_each_number() -> None:
    plain = trace(layers(["Linear", 1024, 1024], ["Linear", 1024, 1024], batch=16384))
    dropped = trace(layers(["Linear", 1024, 1024], ["Dropout", 0.5], ["Linear", 1024, 1024], batch=16384))
    grown = dropped.live_mib["activation"] - plain.live_mib["activation"]
    assert grown == pytest.approx(16, abs=0.1)  # its output takes the place of its input, which nobody needs


def test_accumulation_adds_no_more_than_the_gradients() -> None:
    once, often = trace(layers(*TWO)), trace(layers(*TWO, accumulation=4))
    assert often.allocated_mib <= once.allocated_mib + WEIGHTS_MIB + 1
    assert often.flops == 4 * once.flops


def test_half_precision_halves_the_activations() -> None:
    deep = [entry for _ in range(8) for entry in (["Linear", 1024, 1024], ["GELU"])]
    full = trace(layers(*deep, batch=4096)).live_mib["activation"]
    half = trace(layers(*deep, batch=4096, precision=Precision.AMP_BFLOAT16)).live_mib["activation"]
    weights_again = 8 * 2  # autocast keeps a copy of the weights
    assert half == pytest.approx(full / 2 + weights_again, rel=0.2)


def test_autocast_normalizes_in_float32_as_on_cuda() -> None:
    norm = [entry for _ in range(4) for entry in (["Linear", 1024, 1024], ["LayerNorm", 1024])]
    step = trace(layers(*norm, batch=4096, precision=Precision.AMP_BFLOAT16))
    # Of each pair: the product in bfloat16 (8 MiB), widened for the norm (16), and what the norm gives (16),
    # which the next product takes in bfloat16 (8).
    assert step.live_mib["activation"] >= 3 * (16 + 8)


def test_two_records_tell_the_step_at_any_batch() -> None:
    asked = layers(*TWO, ["BatchNorm1d", 1024], batch=8)
    (low, parameters), (high, _) = record(asked), record(replace(asked, batch=16))
    every = AffineRecord((low.events, low.work), (high.events, high.work), (8, 16))
    for batch in (4, 64, 1000):
        told = summarise(*every.at(batch), parameters, STEPS).vector()
        assert told == pytest.approx(trace(replace(asked, batch=batch)).vector(), rel=1e-6), batch


def test_every_storage_ends_and_is_of_one_kind() -> None:
    recorder, _ = record(layers(*TWO))
    use = replay(recorder.events)
    assert sum(use.live) <= use.allocated <= use.reserved
    assert len(use.live) == len(Category)
    assert len(trace(layers(*TWO)).vector()) == len(TRACED_FEATURES)


def test_attention_is_fused_and_grows_with_the_rows_only() -> None:
    def activation(rows: int) -> float:
        asked = Configuration("timm", "vit_tiny_patch16_224", 8, (3, 224, 224))
        return trace(replace(asked, batch=rows)).live_mib["activation"]

    # 197 rows, 3 heads, 12 layers: a matrix of scores would add 42 MiB to each eight images.
    assert activation(16) - activation(8) < 2 * 8 * 197 * 192 * 4 * 12 * 14 / MIB


def attention(*shape: int, mask: tuple[int, ...] | None = None, width: int = 64, learnt: bool = False) -> float:
    """Most MiB that attention of such a query keeps and needs, forward and backward, besides its inputs."""
    with watched() as (recorder, _):
        query, key, value = (torch.randn(*shape, width, requires_grad=True) for _ in range(3))
        bias = torch.randn(mask, requires_grad=learnt) if mask is not None else None
        inputs = sum(one.nbytes for one in (query, key, value, bias) if one is not None)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out.backward(torch.ones_like(out))
    return float(replay(recorder.events).allocated - inputs) / MIB


def test_attention_without_a_fused_kernel_keeps_all_scores() -> None:
    scores = 4 * 8 * 256 * 256 * 4 / MIB
    fused = attention(4, 8, 256)
    assert attention(4, 2, 4, 256) > fused + scores  # five sides, as windows in blocks have
    assert attention(4, 8, 256, width=62) > fused + scores  # heads that no kernel is aligned to


def test_a_mask_is_copied_where_it_is_not_aligned_and_learnt_for_every_row() -> None:
    aligned, odd = (4, 8, 256, 256), (4, 8, 255, 255)
    mask = 4 * 8 * 256 * 256 * 4 / MIB
    plain = attention(4, 8, 256)
    assert attention(4, 8, 256, mask=aligned) == pytest.approx(plain, rel=0.1)
    assert attention(4, 8, 255, mask=odd) == pytest.approx(plain + mask, rel=0.1)
    # Of a mask that all images share, the gradient is as large as if they did not.
    assert attention(4, 8, 256, mask=(1, 1, 256, 256), learnt=True) == pytest.approx(plain + mask, rel=0.1)


def test_constructors_compute_with_real_numbers() -> None:
    """Nest takes its numbers of blocks, and RegNet its widths, out of small tensors."""
    assert trace(Configuration("timm", "nest_tiny", 2, (3, 224, 224))).parameters == 17_057_608
    assert trace(Configuration("timm", "regnetx_002", 2, (3, 224, 224))).parameters == 2_684_792


def test_recomputing_activations_needs_less() -> None:
    plain = Configuration("timm", "vit_small_patch16_224", 16, (3, 224, 224))
    kept, anew = trace(plain), trace(replace(plain, checkpointing=True))
    assert anew.live_mib["activation"] < 0.4 * kept.live_mib["activation"]
    # A third of the work more, but for the last product of each block, which nothing in the backward pass asks for.
    assert 1.2 * kept.flops < anew.flops < 1.34 * kept.flops


def test_a_card_that_is_full_is_not_a_network_that_cannot_be_built() -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    torch.nn.Full = full
    try:
        with pytest.raises(torch.OutOfMemoryError):
            build_network(layers(["Full"]))
    finally:
        del torch.nn.Full
