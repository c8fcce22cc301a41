"""Programs that are written to hurt: each reading ends soon, in little memory, with an answer or a clear error."""

import math
import time
import tracemalloc
from pathlib import Path

import pytest

from predictor_onnx import CodeBundle, CodeDoesNotParseError, Predictor, Request, Tier

PREDICTOR = Predictor()
HEAD = "import torch\nfrom torch import nn\n"

HOSTILE: dict[str, dict[str, str | bytes]] = {
    "50 MB": {"t.py": "x = 1\n" * 9_000_000},
    "one long list": {"t.py": "x = [" + "1," * 150_000 + "]"},
    "subscripts": {"t.py": "x" + "[0]" * 30_000},
    "attributes": {"t.py": "x" + ".a" * 100_000},
    "else if": {"t.py": "if a: pass\n" + "elif b: pass\n" * 20_000},
    "power": {"t.py": HEAD + "x = 10 ** 10 ** 10\nmodel = nn.Linear(x, x)"},
    "products": {"t.py": "x = 1\nfor i in range(1000):\n    x = x * 10 ** 70\nint('9' * 5000)\nround(1.5, 10 ** 9)"},
    "endless": {"t.py": "while True:\n    pass"},
    "recursion": {"t.py": "def f(n):\n    return f(n) + f(n)\nf(1)\ng = lambda h: h(h) + h(h)\ng(g)"},
    "text": {"t.py": "x = 'a' * 10 ** 12\ny = '%1000000000d' % 1\nz = f'{1:1000000000}'\n'a'.ljust(10 ** 10)"},
    "list": {"t.py": "x = [0] * 10 ** 12\ny = [[0] * 10000] * 10000\nz = [y] * 10000"},
    "doubling": {"t.py": "x = [1]\nfor i in range(10 ** 9):\n    x = x + x\n    x += x\n    x.extend(x)"},
    "comparing": {
        "t.py": "x = []\ny = []\nfor i in range(60):\n    x = [x, x]\n    y = [y, y]\nz = x == y\nw = x in [y]"
    },
    "holding itself": {
        "t.py": "x = []\nx.append(x)\nx == x\nimport torch\ntorch.tensor(x)\ntorch.stack(x)\n"
        "from torch.utils.data import DataLoader\nfor batch in DataLoader(x):\n    pass"
    },
    "ranges": {
        "t.py": "for i in range(10 ** 12):\n  for j in range(10 ** 12):\n    for k in range(10 ** 12):\n"
        "      x = [range(10 ** 12)] * 1000\nlist(range(10 ** 30))\nsum(range(10 ** 12))"
    },
    "comprehensions": {"t.py": "x = [[[a for a in range(1000)] for b in range(1000)] for c in range(1000)]"},
    "import cycle": {"t.py": "import a\nfrom b import *", "a.py": "import b\nfrom t import *", "b.py": "import a, t"},
    "diamond": {
        "t.py": "class A0: pass\nclass B0: pass\n"
        + "".join(f"class A{i}(A{i - 1}, B{i - 1}): pass\nclass B{i}(A{i - 1}, B{i - 1}): pass\n" for i in range(1, 60))
        + "A59().x"
    },
    "stacks": {
        "t.py": HEAD + "m = nn.Sequential(*[nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 1), 10 ** 12)"
        " for _ in range(10 ** 9)])\nm(torch.randn(1, 8, 8))"
    },
    "recurrent": {"t.py": HEAD + "ms = [nn.LSTM(8, 8, num_layers=10 ** 9, bidirectional=True) for _ in range(1000)]"},
    "module list": {
        "t.py": HEAD + "l = nn.ModuleList()\nwhile True:\n  for i in range(1000):\n    l.append(nn.Linear(9, 9))"
    },
    "many dimensions": {"t.py": HEAD + "x = torch.randn(*[2] * 10000)\nfor i in range(1000):\n  x = (x + x)[None]"},
    "dictionary": {"t.py": "d = {}\nfor i in range(1000):\n  for j in range(1000):\n    d[f'{i}-{j}'] = 'x' * 10000"},
    "splitting": {"t.py": "x = 'a ' * 8000\ny = [[x.split(' ') for a in range(1000)] for b in range(1000)]"},
    "options": {
        "t.py": "import argparse\np = argparse.ArgumentParser()\nfor i in range(1000):\n  for j in range(1000):\n"
        "    p.add_argument(f'--a{i}x{j}', type=int)\n    p.parse_args()"
    },
    "names": {
        "t.py": "import timm\nfrom transformers import AutoModel\nfor i in range(1000):\n  for j in range(1000):\n"
        "    timm.create_model('x' * 10000)\n    AutoModel.from_pretrained(f'{i}/{j}' + 'y' * 10000)"
    },
    "yaml aliases": {
        "t.py": "import yaml\nx = yaml.safe_load(open('c.yaml'))\ny = x == x",
        "c.yaml": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
    },
    "yaml merges": {
        "t.py": "import yaml\nx = yaml.safe_load(open('c.yaml'))",
        "c.yaml": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)),
    },
    "json nesting": {"t.py": "import json\nx = json.load(open('c.json'))", "c.json": "[" * 30_000},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_read_in_little_time(name: str) -> None:
    start = time.thread_time()
    found = PREDICTOR.predict(CodeBundle(HOSTILE[name]), Request(("python3", "t.py")))
    assert time.thread_time() - start < 2
    assert math.isfinite(found.p99_mib)


@pytest.mark.parametrize("name", ["list", "text", "doubling", "dictionary", "splitting", "stacks", "many dimensions"])
def test_a_hostile_program_is_read_in_little_memory(name: str) -> None:
    tracemalloc.start()
    try:
        PREDICTOR.predict(CodeBundle(HOSTILE[name]), Request(("python3", "t.py")))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 << 20


@pytest.mark.parametrize("code", [b"x = 1\0", b"\xff\xfe\x00", b"# coding: rot13\nx = 1", b"[" * 5000])
def test_what_is_no_python_is_an_error(code: bytes) -> None:
    with pytest.raises(CodeDoesNotParseError):
        PREDICTOR.predict(CodeBundle({"t.py": code}), Request(("python3", "t.py")))


@pytest.mark.parametrize("size", ["10 ** 30", "-5", "0", "float('nan')", "'a'"])
def test_absurd_sizes_give_no_absurd_answer(size: str) -> None:
    code = f"{HEAD}m = nn.Linear({size}, {size}).cuda()\nm(torch.randn({size}, {size}).cuda()).sum().backward()\n"
    found = PREDICTOR.predict(CodeBundle({"t.py": code}), Request(("python3", "t.py")))
    assert 0 < found.p50_mib < found.p90_mib < found.p99_mib < 1e6
    assert found.tier is Tier.UNKNOWN or "5" in size


@pytest.mark.parametrize(
    ("example", "option"), [("resnet", "--batch-size"), ("chargpt", "--n-embd"), ("digits", "--hidden")]
)
@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "1e30", "9" * 30, "x", ""])
def test_absurd_options_end_in_a_lower_tier(example: str, option: str, value: str) -> None:
    code = (Path(__file__).parents[3] / "examples" / example / "train.py").read_text()
    found = PREDICTOR.predict(CodeBundle({"train.py": code}), Request(("python3", "train.py", option, value)))
    for mib in (found.p50_mib, found.p90_mib, found.p99_mib):
        assert 0 < mib < math.inf
    if value == "-1":
        assert found.tier is Tier.UNKNOWN
        assert "negative" in found.reason
