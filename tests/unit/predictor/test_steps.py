"""How many training steps a program takes: told where the code says so, and not where it does not."""

import pytest

from predictor_onnx.source import CodeBundle
from predictor_onnx.static.analysis import analyse

_HEAD = """\
import argparse
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

model = nn.Linear(10, 10).cuda()
optimizer = torch.optim.Adam(model.parameters())
data = TensorDataset(torch.randn(1000, 10), torch.randn(1000, 10))
loader = DataLoader(data, batch_size=32, shuffle=True)


def step(x, y):
    optimizer.zero_grad()
    loss = (model(x.cuda()) - y.cuda()).pow(2).mean()
    loss.backward()
    optimizer.step()


"""
_NETWORK = """\
network = torchvision.models.resnet18().cuda()
sgd = torch.optim.SGD(network.parameters(), lr=0.1)
for epoch in range(2):
    for images, labels in DataLoader_:
        sgd.zero_grad()
        nn.functional.cross_entropy(network(images.cuda()), labels.cuda()).backward()
        sgd.step()
"""


def steps_of(code: str, *arguments: str) -> int | None:
    return analyse(CodeBundle({"train.py": _HEAD + code}), ["python3", "train.py", *arguments]).steps


@pytest.mark.parametrize(
    ("code", "steps"),
    [
        ("for epoch in range(5):\n    for x, y in loader:\n        step(x, y)\n", 160),
        ("for epoch in tqdm(range(5)):\n    for i, (x, y) in enumerate(tqdm(loader)):\n        step(x, y)\n", 160),
        ("for epoch in range(10, 0, -2):\n    for x, y in loader:\n        step(x, y)\n", 160),
        (
            "for epoch in range(5):\n    for x, y in loader:\n        step(x, y)\n"
            "for epoch in range(2):\n    for x, y in loader:\n        step(x, y)\n",
            224,
        ),
        (
            "for epoch in range(5):\n    for x, y in loader:\n        step(x, y)\n"
            "    with torch.no_grad():\n        for x, y in loader:\n            model(x.cuda())\n",
            160,
        ),
    ],
)
def test_loops_over_known_lengths_are_counted(code: str, steps: int) -> None:
    assert steps_of(code) == steps


@pytest.mark.parametrize(
    "code",
    [
        "for epoch in range(5):\n    for x, y in loader:\n        step(x, y)\n        if odd():\n            break\n",
        "for epoch in range(5):\n    for x, y in loader:\n        if a():\n            continue\n        step(x, y)\n",
        "while True:\n    for x, y in loader:\n        step(x, y)\n",
        "for x, y in unknown():\n    step(x, y)\n",
        "step(torch.randn(3, 10), torch.randn(3, 10))\n",
        "batches = list(loader)\nfor x, y in batches:\n    step(x, y)\n",
        "own = DataLoader(data, batch_size=32, sampler=some())\nfor x, y in own:\n    step(x, y)\n",
        "own = DataLoader(data, batch_size=some())\nfor x, y in own:\n    step(x, y)\n",
        "for epoch in range(10**30):\n    for x, y in loader:\n        step(x, y)\n",
        "for epoch in range(0, 5, 0):\n    for x, y in loader:\n        step(x, y)\n",
    ],
)
def test_what_the_code_does_not_say_stays_unknown(code: str) -> None:
    assert steps_of(code) is None


def test_the_command_line_decides_the_epochs() -> None:
    code = """\
def train(epoch):
    for x, y in loader:
        step(x, y)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    for epoch in range(1, arguments.epochs + 1):
        train(epoch)


main()
"""
    assert steps_of(code) == 96
    assert steps_of(code, "--epochs", "7") == 224


@pytest.mark.parametrize(
    ("dataset", "loader", "steps"),
    [
        ('CIFAR10(".")', "DataLoader(images, 128)", 2 * 391),
        ('CIFAR10(".")', "DataLoader(images, 128, drop_last=True)", 2 * 390),
        ('CIFAR10(".", train=False)', "DataLoader(images, 100)", 2 * 100),
        ('SVHN(".", split="test")', "DataLoader(images, 32)", 2 * 814),
        ("FakeData(640)", "DataLoader(images, 64)", 2 * 10),
        ('ImageFolder(".")', "DataLoader(images, 64)", None),
        ('CIFAR10(".", train=[])', "DataLoader(images, 64)", None),
    ],
)
def test_known_datasets_have_a_length(dataset: str, loader: str, steps: int | None) -> None:
    code = f"images = torchvision.datasets.{dataset}\nbatches = {loader}\n" + _NETWORK.replace("DataLoader_", "batches")
    assert steps_of(code) == steps


def test_a_library_that_loops_itself_tells_no_number() -> None:
    code = """\
import transformers

network = transformers.AutoModelForSequenceClassification.from_pretrained("bert-base-cased")
settings = transformers.TrainingArguments("out", num_train_epochs=3)
for run in range(2):
    transformers.Trainer(model=network, args=settings).train()
"""
    assert steps_of(code) is None
