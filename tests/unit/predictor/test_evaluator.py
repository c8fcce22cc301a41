"""How sizes reach the layers: constants, arguments, configurations, loops, files."""

import pytest

from predictor_onnx import CodeBundle, CodeDoesNotParseError
from predictor_onnx.features import Workload
from predictor_onnx.source import find_entrypoint
from predictor_onnx.static.analysis import analyse

HEAD = "import argparse, torch\nfrom dataclasses import dataclass, field\nfrom torch import nn\n"


def run(code: str, *arguments: str) -> Workload:
    return analyse(CodeBundle({"train.py": HEAD + code}), ["python3", "train.py", *arguments])


@pytest.mark.parametrize(
    ("code", "width"),
    [
        ("W = 64\nmodel = nn.Linear(1, W, bias=False)", 64),
        ("W = 2 ** 5 * 3 // 2 - 1\nmodel = nn.Linear(1, W, bias=False)", 47),
        ("def make(w=48):\n    return nn.Linear(1, w, bias=False)\nmodel = make()", 48),
        ("cfg = dict(w=40)\nmodel = nn.Linear(1, cfg['w'], bias=False)", 40),
        ("class C:\n    w = 24\nmodel = nn.Linear(1, C.w, bias=False)", 24),
        ("@dataclass\nclass C:\n    w: int = 20\nmodel = nn.Linear(1, C().w, bias=False)", 20),
        ("@dataclass\nclass C:\n    w: int = 20\nmodel = nn.Linear(1, C(w=21).w, bias=False)", 21),
        (
            "@dataclass\nclass C:\n    w: list = field(default_factory=lambda: [30])\n"
            "model = nn.Linear(1, C().w[0], bias=False)",
            30,
        ),
        ("model = nn.Sequential(*[nn.Linear(1, 8, bias=False) for _ in range(6)])", 48),
        ("l = []\nfor i in range(3):\n    l += [nn.Linear(1, i + 1, bias=False)]\n"
         "model = nn.Sequential(*l)", 6),
        ('w = 7 if torch.cuda.is_available() else 3\nmodel = nn.Linear(1, w, bias=False)', 7),
        ('device = torch.device("cuda" if torch.cuda.is_available() else "cpu")\n'
         'w = 9 if device.type == "cuda" else 2\nmodel = nn.Linear(1, w, bias=False)', 9),
        ("sizes = {'s': 5, 'm': 6}\nmodel = nn.Linear(1, sizes['m'], bias=False)", 6),
        ("try:\n    import apex\nexcept ImportError:\n    apex = None\n"
         "model = nn.Linear(1, 4, bias=False)", 4),
    ],
)  # fmt: skip
def test_a_size_is_resolved(code: str, width: int) -> None:
    assert run(code).parameters == width


ARGPARSE = """
p = argparse.ArgumentParser()
p.add_argument("--width", "-w", type=int, default=16)
p.add_argument("--deep", action="store_true")
args = p.parse_args()
model = nn.Sequential(*[nn.Linear(1, args.width, bias=False) for _ in range(3 if args.deep else 1)])
"""


@pytest.mark.parametrize(
    ("arguments", "count"),
    [((), 16), (("--width", "32"), 32), (("--width=64",), 64), (("-w", "8"), 8),
     (("--deep", "-w", "8"), 24), (("--wid", "5"), 5)],
)  # fmt: skip
def test_argparse_sees_the_command_line(arguments: tuple[str, ...], count: int) -> None:
    assert run(ARGPARSE, *arguments).parameters == count


TYPER = """
import typer
app = typer.Typer()
@app.command()
def main(width: int = typer.Option(16, "--width", "-w"), depth: int = 1, wide: bool = False):
    model = nn.Sequential(*[nn.Linear(1, width * (2 if wide else 1), bias=False) for _ in range(depth)])
if __name__ == "__main__":
    app()
"""
CLICK = """
import click
@click.command()
@click.option("--width", "-w", default=16)
@click.option("--depth", default=1, type=int)
@click.option("--wide", is_flag=True)
def main(width, depth, wide):
    model = nn.Sequential(*[nn.Linear(1, width * (2 if wide else 1), bias=False) for _ in range(depth)])
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("code", [TYPER, CLICK], ids=["typer", "click"])
@pytest.mark.parametrize(
    ("arguments", "count"),
    [((), 16), (("--width", "4"), 4), (("-w", "4", "--depth", "3"), 12), (("--wide",), 32)],
)
def test_typer_and_click_see_the_command_line(code: str, arguments: tuple[str, ...], count: int) -> None:
    assert run(code, *arguments).parameters == count


NETWORK = """
class Block(nn.Module):
    def __init__(self, width, factor=4):
        super().__init__()
        self.up = nn.Linear(width, factor * width)
        self.down = nn.Linear(factor * width, width)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))
class Net(nn.Module):
    def __init__(self, width=32, depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 10)
        self.tied = nn.Linear(width, 10)
        self.tied.weight = self.head.weight
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale)
"""


def test_a_network_of_networks_is_counted_and_run() -> None:
    code = NETWORK + (
        "model = Net(depth=6).cuda()\nopt = torch.optim.Adam(model.parameters())\n"
        "for epoch in range(100):\n    for _ in range(1000):\n"
        "        x = torch.randn(16, 32, device='cuda')\n        loss = model(x).sum()\n"
        "        opt.zero_grad()\n        loss.backward()\n        opt.step()\n"
    )
    work = run(code)
    block = 2 * 32 * 128 + 128 + 32
    assert work.parameters == 6 * block + 32 + (320 + 10) + 10
    assert work.training
    assert (work.batch, work.optimizer) == (16, "Adam")


def test_modules_of_the_bundle_are_followed() -> None:
    files = {
        "train.py": "from nets.core import Net\nimport settings\nmodel = Net(settings.WIDTH).cuda()\n",
        "nets/__init__.py": "",
        "nets/core.py": "import torch\nfrom .parts import layer\nclass Net(torch.nn.Module):\n"
        "    def __init__(self, w):\n        super().__init__()\n        self.a = layer(w)\n",
        "nets/parts.py": "from torch import nn\ndef layer(w):\n    return nn.Linear(w, w, bias=False)\n",
        "settings.py": "WIDTH = 12\n",
    }
    assert analyse(CodeBundle(files), ["python3", "train.py"]).parameters == 144


def test_a_loader_gives_its_batch() -> None:
    code = """
class Data(torch.utils.data.Dataset):
    def __len__(self): return 100
    def __getitem__(self, i): return torch.randn(3, 8, 8), i % 10
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10)).cuda()
for x, y in torch.utils.data.DataLoader(Data(), batch_size=48):
    loss = nn.functional.cross_entropy(model(x.cuda()), y.cuda())
    loss.backward()
"""
    work = run(code)
    assert (work.batch, work.guesses) == (48, 0)
    assert work.data_mib * 2**20 == 48 * (3 * 64 * 4 + 8)


@pytest.mark.parametrize(
    ("argv", "path"),
    [
        (["python3", "train.py"], "train.py"),
        (["python3", "-u", "./train.py", "--x"], "train.py"),
        (["torchrun", "--nproc_per_node=1", "train.py"], "train.py"),
        (["python3", "-m", "package.run"], "package/run.py"),
        (["sh", "-c", "cd . && python3 train.py --lr 1"], "train.py"),
        (["bash", "go.sh"], "train.py"),
        (["/workspace/code/train.py"], "train.py"),
    ],
)
def test_the_entrypoint_is_found(argv: list[str], path: str) -> None:
    files = {"train.py": "", "package/run.py": "", "go.sh": "set -e\npython3 train.py \\\n --lr 1\n"}
    found = find_entrypoint(argv, CodeBundle(files))
    assert found is not None
    assert found.path == path


def test_code_that_does_not_parse_names_file_and_line() -> None:
    with pytest.raises(CodeDoesNotParseError) as caught:
        run("x = 1\ndef broken(:\n    pass\n")
    assert (caught.value.path, caught.value.line) == ("train.py", 5)
    assert caught.value.reason == "CODE_DOES_NOT_PARSE"
    assert "py_compile train.py" in str(caught.value)


HOSTILE = {
    "power": "x = 10 ** 10 ** 10\ny = 2 ** (2 ** 40)\nz = 1 << (1 << 40)",
    "repeat": "x = 'a' * 10 ** 9\ny = [0] * 10 ** 9\nz = (x + 'b') * 10 ** 6",
    "doubling": "x = [1]\nfor i in range(1000):\n    x = x + x\ns = 'a'\nfor i in range(1000):\n    s += s",
    "endless": "while True:\n    pass",
    "nested loops": "for a in range(10**9):\n  for b in range(10**9):\n    for c in range(10**9):\n      x = a",
    "recursion": "def f(n):\n    return f(n + 1) + f(n + 2)\nf(0)",
    "layers": "model = nn.Sequential(*[nn.Linear(10**9, 10**9) for _ in range(10**9)])",
    "huge layer": "model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 1), 10**12)",
    "format": "x = f'{1:999999999}' + '%999999999d' % 1 + format(1, '999999999')",
    "deep": "x = " + "-" * 5000 + "1",
    "brackets": "x = " + "+".join(["1"] * 20000),
    "import self": "import train\nfrom train import *",
    "generator": "def g():\n    while True:\n        yield 1\nx = list(g())",
    "class": "class A(A):\n    pass",
    "system": "import os\nos.system('exit 1')\n__import__('os').abort()",
    "getattr": "x = getattr(1, 'a' * 100000)\ny = object.__subclasses__()",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(20)
def test_hostile_code_is_bounded(name: str) -> None:
    work = run(HOSTILE[name])
    assert work.notes or work.imports >= {"torch"}


def test_deep_nesting_and_huge_files_end_in_a_note() -> None:
    deep = analyse(CodeBundle({"a.py": "(" * 150 + ")" * 150}), ["python3", "a.py"])
    huge = analyse(CodeBundle({"a.py": "x = 1\n" * 9_000_000}), ["python3", "a.py"])
    assert huge.notes
    assert "too large" in huge.notes[0]
    assert deep.parameters == 0


def test_preparing_data_on_the_host_costs_no_device_memory() -> None:
    code = """
model = nn.Linear(8, 8).cuda()
x = torch.randn(10_000, 1_000) * 2 + 1
y = x.reshape(-1, 8).exp()
loss = model(torch.randn(4, 8).cuda()).sum()
loss.backward()
"""
    work = run(code)
    assert work.largest_mib < 0.01
    assert work.data_mib * 2**20 == 4 * 8 * 4


def test_tensors_on_the_device_count_without_any_network() -> None:
    work = run("a = torch.randn(4096, 4096, device='cuda')\nb = (a @ a).relu()\n")
    assert work.known
    assert work.data_mib == 64
    assert work.transient_mib == 128


def test_the_batch_is_the_training_batch() -> None:
    code = """
model = nn.Linear(8, 8).cuda()
model(torch.randn(32, 8).cuda()).sum().backward()
with torch.no_grad():
    model(torch.randn(1000, 8).cuda())
"""
    assert run(code).batch == 32
