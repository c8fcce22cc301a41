"""Weights and activations of layers, against numbers that torch or the literature gives."""

import pytest

from predictor_onnx.features import MIB, Workload
from predictor_onnx.source import CodeBundle
from predictor_onnx.static.analysis import analyse


def run(code: str, *arguments: str) -> Workload:
    return analyse(CodeBundle({"train.py": code}), ["python3", "train.py", *arguments])


def parameters(expression: str) -> int:
    code = f"import torch\nfrom torch import nn\nmodel = nn.Sequential({expression}).cuda()\n"
    return run(code).parameters


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("nn.Linear(784, 512)", 784 * 512 + 512),
        ("nn.Linear(784, 512, bias=False)", 784 * 512),
        ("nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)", 9408),
        ("nn.Conv2d(64, 64, (3, 3), groups=64)", 64 * 9 + 64),
        ("nn.ConvTranspose2d(16, 8, 2, stride=2)", 16 * 8 * 4 + 8),
        ("nn.Conv1d(8, 16, 5)", 8 * 16 * 5 + 16),
        ("nn.BatchNorm2d(64)", 128),
        ("nn.LayerNorm(768)", 1536),
        ("nn.GroupNorm(8, 32)", 64),
        ("nn.Embedding(50257, 768)", 38_597_376),
        ("nn.LSTM(10, 20, num_layers=2)", 5_920),
        ("nn.LSTM(10, 20, bidirectional=True)", 2 * 4 * (20 * 10 + 20 * 20 + 40)),
        ("nn.GRU(10, 20)", 3 * (20 * 10 + 20 * 20 + 40)),
        ("nn.MultiheadAttention(512, 8)", 4 * 512 * 512 + 4 * 512),
        ("nn.TransformerEncoderLayer(512, 8)", 3_152_384),
        ("nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8), 6)", 6 * 3_152_384),
        ("nn.PReLU()", 1),
        ("nn.ReLU(), nn.Dropout(0.1), nn.Flatten()", 0),
    ],
)
def test_weights_of_a_layer(layer: str, expected: int) -> None:
    assert parameters(layer) == expected


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ('timm.create_model("resnet50")', 25_557_032),
        ('timm.create_model("vit_base_patch16_224")', 86_567_656),
        ('timm.create_model("resnet50.a1_in1k", num_classes=10)', 23_528_522),
        ("torchvision.models.resnet50(weights=None)", 25_557_032),
        ("torchvision.models.vgg16()", 138_357_544),
        ('AutoModelForCausalLM.from_pretrained("gpt2")', 124_439_808),
        ('AutoModel.from_pretrained("bert-base-uncased")', 109_482_240),
        ("GPT2LMHeadModel(GPT2Config())", 124_439_808),
        ("BertModel(BertConfig())", 109_482_240),
        ("LlamaForCausalLM(LlamaConfig())", 6_738_415_616),
    ],
)
def test_weights_of_a_named_model(call: str, expected: int) -> None:
    code = (
        "import timm, torch, torchvision\nfrom transformers import *\n"
        "from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel\n"
        "from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM\n"
        f"model = {call}\n"
    )
    assert run(code).parameters == expected


STEP = """
import torch
from torch import nn
model = nn.Sequential({layers}).cuda()
optimizer = torch.optim.{optimizer}
x = torch.randn({shape}).cuda()
{step}
"""


def step(layers: str, shape: str, optimizer: str = "SGD(model.parameters(), lr=1)",
         body: str = "loss = model(x).sum(); loss.backward(); optimizer.step()") -> Workload:  # fmt: skip
    return run(STEP.format(layers=layers, shape=shape, optimizer=optimizer, step=body))


def test_autograd_keeps_a_storage_once() -> None:
    # The ReLU's output is the second Linear's input: 64 x 100 floats; and x itself: 64 x 50.
    work = step("nn.Linear(50, 100), nn.ReLU(), nn.Linear(100, 10)", "64, 50")
    assert work.activation_mib * MIB == 4 * 64 * (50 + 100)


def test_an_inplace_relu_allocates_nothing() -> None:
    plain = step("nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)", "4, 3, 32, 32")
    reused = step(
        "nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3)",
        "4, 3, 32, 32",
    )
    assert reused.activation_mib == plain.activation_mib  # the norm keeps its input, relu its output
    assert reused.ops == plain.ops


def test_a_convolution_keeps_its_input_and_max_pooling_its_indices() -> None:
    work = step("nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2)", "2, 3, 16, 16")
    kept = 4 * 2 * 3 * 256 + 4 * 2 * 8 * 256 + 8 * 2 * 8 * 64
    assert work.activation_mib * MIB == kept


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        ("SGD(model.parameters(), lr=0.1)", 0),
        ("SGD(model.parameters(), lr=0.1, momentum=0.9)", 1),
        ("Adam(model.parameters())", 2),
        ("AdamW(model.parameters(), amsgrad=True)", 3),
        ("RMSprop(model.parameters())", 1),
    ],
)
def test_optimizer_state(optimizer: str, states: int) -> None:
    work = step("nn.Linear(1024, 1024, bias=False)", "8, 1024", optimizer)
    assert work.parameter_mib == work.gradient_mib == 4.0
    assert work.optimizer_mib == 4.0 * states


def test_frozen_weights_have_no_gradient() -> None:
    body = (
        "for p in model[0].parameters():\n    p.requires_grad = False\n"
        "loss = model(x).sum(); loss.backward(); optimizer.step()"
    )
    work = step("nn.Linear(100, 100), nn.Linear(100, 10)", "8, 100", body=body)
    assert work.trained_parameters == 1010
    assert work.parameters == 10_100 + 1010


def test_inference_keeps_nothing() -> None:
    work = step("nn.Linear(100, 100), nn.ReLU()", "8, 100", body="with torch.no_grad():\n    model(x)")
    assert not work.training
    assert work.activation_mib == 0
    assert work.gradient_mib == 0


def test_autocast_halves_what_matrix_products_keep() -> None:
    body = (
        'with torch.autocast("cuda", dtype=torch.bfloat16):\n    loss = model(x).sum()\n'
        "loss.backward(); optimizer.step()"
    )
    layers = ", ".join(["nn.Linear(512, 512), nn.ReLU()"] * 8)
    full, half = step(layers, "4096, 512"), step(layers, "4096, 512", body=body)
    assert half.precision == "bfloat16"
    assert half.activation_mib == pytest.approx(full.activation_mib / 2)
    assert half.cast_mib == pytest.approx(full.parameter_mib / 2)


def test_checkpointing_keeps_only_block_inputs() -> None:
    code = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
                                     for _ in range(8)])
    def forward(self, x):
        for block in self.blocks:
            x = CALL
        return x
model = Net().cuda()
x = torch.randn(128, 256).cuda()
model(x).sum().backward()
"""
    full = run(code.replace("CALL", "block(x)"))
    saved = run(code.replace("CALL", "checkpoint(block, x, use_reentrant=False)"))
    assert saved.checkpointing
    assert saved.activation_mib * MIB == 4 * 128 * 256 * 8
    assert saved.activation_mib < full.activation_mib / 5
