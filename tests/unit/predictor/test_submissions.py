"""Programs as people submit them: each answer must be about the program, or say that it is not."""

import json

import pytest

from predictor_onnx import CodeBundle, Prediction, Predictor, Request, Tier

PREDICTOR = Predictor()


def ask(files: dict[str, str] | str, *argv: str) -> Prediction:
    files = {"train.py": files} if isinstance(files, str) else files
    return PREDICTOR.predict(CodeBundle(files), Request(argv or ("python3", "train.py")))


def test_a_hugging_face_trainer_is_sized_by_the_length_that_its_tokenizer_cuts_to() -> None:
    code = """
from transformers import AutoTokenizer, AutoModelForSequenceClassification, Trainer, TrainingArguments
tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")
def tokenize(example):
    return tokenizer(example["text"], truncation=True, max_length={length})
data = load().map(tokenize, batched=True)
model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
Trainer(model, TrainingArguments("out", per_device_train_batch_size=32, fp16=True), train_dataset=data).train()
"""
    short, long = ask(code.replace("{length}", "128")), ask(code.replace("{length}", "512"))
    assert (short.features["batch"], short.features["sequence"]) == (32, 128)
    assert short.features["precision"] == "float16"
    assert long.p50_mib > 1.5 * short.p50_mib


def test_a_lightning_module_gets_the_batch_of_its_data_module() -> None:
    code = """
import lightning as L, torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST
class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 10))
    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(MNIST(".", transform=transforms.ToTensor()), batch_size=256)
L.Trainer(precision="bf16-mixed").fit(Net(), datamodule=Data())
"""
    found = ask(code).features
    assert (found["batch"], found["precision"], found["guesses"]) == (256, "bfloat16", 0)


def test_a_model_that_the_catalog_lacks_is_named() -> None:
    code = """
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn
model = fasterrcnn_resnet50_fpn(weights="DEFAULT").cuda()
"""
    found = ask(code)
    assert found.tier is Tier.UNKNOWN
    assert "fasterrcnn_resnet50_fpn is not in the catalog" in found.reason


@pytest.mark.parametrize(
    ("code", "library"),
    [
        (
            "import tensorflow as tf\nmodel = tf.keras.Sequential([tf.keras.layers.Dense(9)])\nmodel.fit(1)",
            "tensorflow",
        ),
        ("import keras\nkeras.Sequential([keras.layers.Dense(128)]).fit(1, batch_size=128)", "keras"),
        ("import jax.numpy as jnp\nprint(jnp.ones((9, 9)) @ jnp.ones((9, 9)))", "jax"),
        ("import somebodys_own_library as s\ns.train()", "somebodys_own_library"),
        ("def late():\n    import cupy\nprint(1)", "cupy"),
    ],
)
def test_libraries_that_are_not_read_make_it_unknown(code: str, library: str) -> None:
    found = ask(code)
    assert found.tier is Tier.UNKNOWN
    assert library in found.reason


def test_an_import_deep_in_the_bundle_counts() -> None:
    files = {"train.py": "def main():\n    from lib import go\n", "lib.py": "def go():\n    import cupy\n"}
    assert ask(files).tier is Tier.UNKNOWN


def test_code_for_the_processor_needs_no_device() -> None:
    code = "import numpy as np, os, json, sklearn\nx = np.random.randn(10000, 784)\nprint(x.T @ x)\n"
    assert ask(code).tier is Tier.NO_ACCELERATOR_USE


TORCH = "import torch\nmodel = torch.nn.Linear(4096, 4096, bias=False).cuda()\nmodel(torch.randn(8, 4096).cuda())\n"


def test_a_started_program_is_read_in_its_turn() -> None:
    started = 'import subprocess, sys\nsubprocess.run(["python3", "real.py"], check=True)\n'
    assert ask({"train.py": started, "real.py": TORCH}).features["parameters"] == 4096 * 4096
    hidden = ask("import os\nos.system(input())\n")
    assert hidden.tier is Tier.UNKNOWN
    assert "another program" in hidden.reason
    assert ask('import subprocess\nsubprocess.run(["nvidia-smi"])\n').tier is Tier.NO_ACCELERATOR_USE


CONFIGURED = """
import json, argparse, torch, yaml
from pathlib import Path
from types import SimpleNamespace
parser = argparse.ArgumentParser()
parser.add_argument("--config", default="configs/small.json")
{read}
model = torch.nn.Linear(config.width, config.width, bias=False).cuda()
model(torch.randn(config.batch_size, config.width).cuda()).sum().backward()
"""


@pytest.mark.parametrize(
    "read",
    [
        "config = SimpleNamespace(**json.loads(Path(parser.parse_args().config).read_text()))",
        "with open(parser.parse_args().config) as file:\n    config = SimpleNamespace(**json.load(file))",
        "config = SimpleNamespace(**yaml.safe_load(open(parser.parse_args().config)))",
        "from omegaconf import OmegaConf\nconfig = OmegaConf.load(parser.parse_args().config)",
    ],
)
def test_sizes_come_from_a_configuration_in_the_bundle(read: str) -> None:
    files = {
        "train.py": CONFIGURED.replace("{read}", read),
        "configs/small.json": json.dumps({"width": 64, "batch_size": 4}),
        "configs/big.json": json.dumps({"width": 2048, "batch_size": 128}),
    }
    small, big = ask(files), ask(files, "python3", "train.py", "--config", "configs/big.json")
    assert (small.features["parameters"], small.features["batch"]) == (64**2, 4)
    assert (big.features["parameters"], big.features["batch"]) == (2048**2, 128)


def test_hydra_hands_its_configuration_to_the_function() -> None:
    code = """
import hydra, torch
@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg):
    model = torch.nn.Linear(cfg.model.width, cfg["model"]["width"], bias=False).cuda()
    model(torch.randn(cfg.batch_size, cfg.model.width).cuda()).sum().backward()
main()
"""
    found = ask({"train.py": code, "conf/config.yaml": "model:\n  width: 512\nbatch_size: 16\n"})
    assert (found.features["parameters"], found.features["batch"]) == (512**2, 16)


def test_a_network_without_sizes_is_not_dressed_up() -> None:
    code = """
import torch, somewhere
config = somewhere.load()
model = torch.nn.Sequential(*[torch.nn.Linear(config.width, config.width) for _ in range(config.depth)]).cuda()
model(torch.randn(config.batch, config.width).cuda()).sum().backward()
"""
    found = ask(code)
    assert found.tier is Tier.UNKNOWN
    assert "does not say" in found.reason


def test_a_package_run_as_a_module_resolves_its_relative_imports() -> None:
    files = {
        "pkg/__init__.py": "from .model import Net\n",
        "pkg/model.py": "import torch\nclass Net(torch.nn.Module):\n    def __init__(self, width):\n"
        "        super().__init__()\n        self.layer = torch.nn.Linear(784, width, bias=False)\n"
        "    def forward(self, x):\n        return self.layer(x)\n",
        "pkg/train.py": "import argparse, torch\nfrom . import Net\ndef main():\n    from .model import Net as Same\n"
        "    parser = argparse.ArgumentParser()\n    parser.add_argument('--width', type=int, default=64)\n"
        "    net = Same(parser.parse_args().width).cuda()\n    net(torch.randn(32, 784).cuda()).sum().backward()\n"
        "if __name__ == '__main__':\n    main()\n",
    }
    assert ask(files, "python3", "-m", "pkg.train", "--width", "256").features["parameters"] == 784 * 256


def test_a_pipeline_is_inference_with_the_checkpoint_it_names() -> None:
    code = """
from transformers import pipeline
pipe = pipeline("text-classification", model="distilbert-base-uncased-finetuned-sst-2-english", device=0)
print(pipe("fine"))
"""
    found = ask(code)
    assert found.tier is Tier.STATIC_NAMED
    assert not found.features["training"]
    assert 60e6 < float(found.features["parameters"]) < 70e6


def test_inference_grows_with_its_batch() -> None:
    code = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(1024, 8192), torch.nn.ReLU(), torch.nn.Linear(8192, 1024)).cuda()
with torch.no_grad():
    model(torch.randn({batch}, 1024, device="cuda"))
"""
    one, many = ask(code.replace("{batch}", "1")), ask(code.replace("{batch}", "131072"))
    assert many.p50_mib > one.p50_mib + 2 * 131072 * 8192 * 4 / 2**20 * 0.9


def test_two_networks_with_an_optimizer_each_are_one_workload() -> None:
    code = """
import torch
from torch import nn
one, two = nn.Linear(1024, 1024, bias=False).cuda(), nn.Linear(1024, 2048, bias=False).cuda()
first, second = torch.optim.Adam(one.parameters()), torch.optim.Adam(two.parameters())
x = torch.randn(8, 1024).cuda()
two(one(x).detach()).sum().backward(); second.step()
two(one(x)).sum().backward(); first.step()
"""
    assert ask(code).features["parameters"] == 3 * 1024 * 1024


def test_a_recurrent_batch_is_not_its_length() -> None:
    code = """
import torch
net = torch.nn.LSTM(256, 512, 2).cuda()
net(torch.randn(40, 128, 256).cuda())[0].sum().backward()
"""
    assert ask(code).features["batch"] == 128


def test_a_size_that_the_code_does_not_say_is_called_assumed() -> None:
    code = """
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
model = AutoModelForCausalLM.from_pretrained("gpt2", torch_dtype=torch.float16).to("cuda")
model.generate(**AutoTokenizer.from_pretrained("gpt2")("Hello", return_tensors="pt"))
"""
    assert "assumed batch of 32" in ask(code).reason
