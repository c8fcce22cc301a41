"""The eight workloads of MISO as PyTorch programs, so that the static analysis can read them like a job.

MISO ran them in TensorFlow 2 in float32 (its repository, ``mps/models/*_train.py``, read on 2026-11-23). The layers,
widths and input sizes below are those of its scripts and of the Keras models that they load. Assumed where a script
leaves it to the data:

- deepspeech2: 1,000 spectrogram frames. LJSpeech's clips last 6.6 s on average and at most 10.1 s, a frame is 160 of
  22,050 samples a second, and a batch is padded to its longest clip.
- gnn: 24 atoms and 76 directed bonds with self-loops per molecule of BBBP, padded to 60 atoms.
- bert: bert-base-cased at 512 tokens, as its tokenizer pads. embedding: 20 classes, 200 words.
- cyclegan: 3 passes of each generator and 2 of each discriminator, one backward pass for all four.
"""

from __future__ import annotations

from typing import Final

_IMPORTS: Final = """\
import torch
import torch.nn.functional as F
from torch import nn


"""
_TRAIN: Final = """

model = Model().cuda()
optimizer = torch.optim.Adam(model.parameters())
{inputs}
labels = torch.zeros({batch}, dtype=torch.long, device="cuda")
for step in range(10):
    optimizer.zero_grad()
    loss = F.cross_entropy(model({arguments}), labels)
    loss.backward()
    optimizer.step()
"""
_CONV: Final = """\
def conv(inner, outer, kernel=1, stride=1, groups=1, bias=True):
    return nn.Conv2d(inner, outer, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias)


"""
_BERT: Final = """\
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained("bert-base-cased", num_labels=2).cuda()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-5)
tokens = torch.zeros({batch}, 512, dtype=torch.long, device="cuda")
mask = torch.ones({batch}, 512, dtype=torch.long, device="cuda")
labels = torch.zeros({batch}, dtype=torch.long, device="cuda")
for step in range(10):
    optimizer.zero_grad()
    loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
    loss.backward()
    optimizer.step()
"""
_CYCLEGAN: Final = """\
class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm1 = nn.InstanceNorm2d(width, affine=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm2 = nn.InstanceNorm2d(width, affine=True)

    def forward(self, x):
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


def generator():
    layers = [nn.Conv2d(3, 64, 7, padding=3, padding_mode="reflect", bias=False),
              nn.InstanceNorm2d(64, affine=True), nn.ReLU()]
    for width in (64, 128):
        layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
                   nn.InstanceNorm2d(2 * width, affine=True), nn.ReLU()]
    layers += [Residual(256) for _ in range(9)]
    for width in (256, 128):
        layers += [nn.ConvTranspose2d(width, width // 2, 3, stride=2, padding=1, output_padding=1, bias=False),
                   nn.InstanceNorm2d(width // 2, affine=True), nn.ReLU()]
    layers += [nn.Conv2d(64, 3, 7, padding=3, padding_mode="reflect"), nn.Tanh()]
    return nn.Sequential(*layers)


def discriminator():
    layers = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for width, stride in ((64, 2), (128, 2), (256, 1)):
        layers += [nn.Conv2d(width, 2 * width, 4, stride=stride, padding=1, bias=False),
                   nn.InstanceNorm2d(2 * width, affine=True), nn.LeakyReLU(0.2)]
    layers += [nn.Conv2d(512, 1, 4, padding=1)]
    return nn.Sequential(*layers)


gen_g = generator().cuda()
gen_f = generator().cuda()
disc_x = discriminator().cuda()
disc_y = discriminator().cuda()
optimizer = torch.optim.Adam(list(gen_g.parameters()) + list(gen_f.parameters())
                             + list(disc_x.parameters()) + list(disc_y.parameters()), lr=2e-4)
real_x = torch.randn({batch}, 3, 256, 256, device="cuda")
real_y = torch.randn({batch}, 3, 256, 256, device="cuda")
for step in range(10):
    optimizer.zero_grad()
    fake_y = gen_g(real_x)
    fake_x = gen_f(real_y)
    cycled_x = gen_f(fake_y)
    cycled_y = gen_g(fake_x)
    same_x = gen_f(real_x)
    same_y = gen_g(real_y)
    real_x_score = disc_x(real_x)
    fake_x_score = disc_x(fake_x)
    real_y_score = disc_y(real_y)
    fake_y_score = disc_y(fake_y)
    loss = (fake_x_score.mean() + fake_y_score.mean() + real_x_score.mean() + real_y_score.mean()
            + F.l1_loss(cycled_x, real_x) + F.l1_loss(cycled_y, real_y)
            + F.l1_loss(same_x, real_x) + F.l1_loss(same_y, real_y))
    loss.backward()
    optimizer.step()
"""
_DEEPSPEECH2: Final = """\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, (11, 41), stride=(2, 2), padding=(5, 20), bias=False)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, (11, 21), stride=(1, 2), padding=(5, 10), bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.grus = nn.ModuleList([nn.GRU(1568 if i == 0 else 1024, 512, batch_first=True, bidirectional=True)
                                   for i in range(5)])
        self.drop = nn.Dropout(0.5)
        self.dense = nn.Linear(1024, 1024)
        self.head = nn.Linear(1024, 32)

    def forward(self, sound):
        x = F.relu(self.norm1(self.conv1(sound)))
        x = F.relu(self.norm2(self.conv2(x)))
        batch, width, length, bins = x.shape
        x = x.permute(0, 2, 1, 3).reshape(batch, length, width * bins)
        for gru in self.grus:
            x, _ = gru(x)
            x = self.drop(x)
        x = self.drop(F.relu(self.dense(x)))
        return torch.log_softmax(self.head(x), dim=-1)
"""
_EMBEDDING: Final = """\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20002, 100)
        self.words.weight.requires_grad = False
        self.conv1 = nn.Conv1d(100, 128, 5)
        self.conv2 = nn.Conv1d(128, 128, 5)
        self.conv3 = nn.Conv1d(128, 128, 5)
        self.pool = nn.MaxPool1d(5)
        self.dense = nn.Linear(128, 128)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(128, 20)

    def forward(self, tokens):
        x = self.words(tokens).transpose(1, 2)
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.conv3(x)).amax(2)
        return self.head(self.drop(F.relu(self.dense(x))))
"""
_GNN: Final = """\
class EdgeNetwork(nn.Module):
    def __init__(self, width, bonds):
        super().__init__()
        self.width = width
        self.kernel = nn.Linear(bonds, width * width)

    def forward(self, atoms, bonds, source, target):
        matrices = self.kernel(bonds).view(-1, self.width, self.width)
        messages = torch.matmul(matrices, atoms[source].unsqueeze(-1)).squeeze(-1)
        return torch.zeros_like(atoms).index_add(0, target, messages)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.edge = EdgeNetwork(64, 7)
        self.gates_in = nn.Linear(64, 192)
        self.gates_kept = nn.Linear(64, 192)
        self.query = nn.Linear(64, 512)
        self.key = nn.Linear(64, 512)
        self.value = nn.Linear(64, 512)
        self.out = nn.Linear(512, 64)
        self.ff1 = nn.Linear(64, 512)
        self.ff2 = nn.Linear(512, 64)
        self.norm1 = nn.LayerNorm(64)
        self.norm2 = nn.LayerNorm(64)
        self.dense = nn.Linear(64, 512)
        self.head = nn.Linear(512, 1)

    def cell(self, messages, x):
        new_r, new_z, new_n = self.gates_in(messages).chunk(3, 1)
        old_r, old_z, old_n = self.gates_kept(x).chunk(3, 1)
        z = torch.sigmoid(new_z + old_z)
        n = torch.tanh(new_n + torch.sigmoid(new_r + old_r) * old_n)
        return (1 - z) * n + z * x

    def forward(self, atoms, bonds, source, target):
        x = atoms
        for _ in range(4):
            x = self.cell(self.edge(x, bonds, source, target), x)
        x = torch.stack([F.pad(x[24 * i : 24 * i + 24], (0, 0, 0, 60 - 24)) for i in range({batch})])
        batch, length, width = x.shape
        q = self.query(x).view(batch, length, 8, 64).transpose(1, 2)
        k = self.key(x).view(batch, length, 8, 64).transpose(1, 2)
        v = self.value(x).view(batch, length, 8, 64).transpose(1, 2)
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)), dim=-1)
        y = self.out(torch.matmul(weights, v).transpose(1, 2).reshape(batch, length, 512))
        x = self.norm1(x + y)
        x = self.norm2(x + self.ff2(F.relu(self.ff1(x))))
        return torch.sigmoid(self.head(F.relu(self.dense(x.mean(1)))))
"""
_MOBILENET: Final = """\
class Inverted(nn.Module):
    def __init__(self, inner, outer, stride, expansion):
        super().__init__()
        wide = inner * expansion
        layers = []
        if expansion != 1:
            layers += [conv(inner, wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [conv(wide, wide, 3, stride, wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
                   conv(wide, outer, bias=False), nn.BatchNorm2d(outer)]
        self.layers = nn.Sequential(*layers)
        self.keeps = stride == 1 and inner == outer

    def forward(self, x):
        return x + self.layers(x) if self.keeps else self.layers(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layers, inner = [conv(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU6()], 32
        for expansion, outer, count, first in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
                                               (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)):
            for i in range(count):
                layers.append(Inverted(inner, outer, first if i == 0 else 1, expansion))
                inner = outer
        layers += [conv(320, 1280, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(1280, 10)

    def forward(self, x):
        return self.head(torch.flatten(self.layers(x), 1))
"""
_RESNET: Final = """\
class Bottleneck(nn.Module):
    def __init__(self, inner, width, stride):
        super().__init__()
        self.conv1, self.norm1 = conv(inner, width, 1, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = conv(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.shortcut = None
        if stride != 1 or inner != 4 * width:
            self.shortcut = nn.Sequential(conv(inner, 4 * width, 1, stride), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return F.relu(x + y)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        blocks, inner = [], 64
        for width, count, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(count):
                blocks.append(Bottleneck(inner, width, first if i == 0 else 1))
                inner = 4 * width
        self.conv, self.norm, self.pool = conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(2048, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.conv(x))))
        return self.head(torch.flatten(self.blocks(x), 1))
"""
_TRANSFORMER: Final = """\
class Encoder(nn.Module):
    def __init__(self, width, head_size, heads, ff):
        super().__init__()
        self.heads, self.head_size = heads, head_size
        inner = heads * head_size
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)
        self.norm1 = nn.LayerNorm(width)
        self.conv1 = nn.Conv1d(width, ff, 1)
        self.conv2 = nn.Conv1d(ff, width, 1)
        self.norm2 = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.25)

    def split(self, x, batch, length):
        return x.view(batch, length, self.heads, self.head_size).transpose(1, 2)

    def forward(self, x):
        batch, length, width = x.shape
        q = self.split(self.query(x), batch, length)
        k = self.split(self.key(x), batch, length)
        v = self.split(self.value(x), batch, length)
        scores = torch.matmul(q * self.head_size ** -0.5, k.transpose(-2, -1))
        weights = self.drop(torch.softmax(scores, dim=-1))
        y = torch.matmul(weights, v).transpose(1, 2).reshape(batch, length, self.heads * self.head_size)
        res = self.norm1(self.drop(self.out(y))) + x
        y = self.drop(F.relu(self.conv1(res.transpose(1, 2))))
        return self.norm2(self.conv2(y).transpose(1, 2)) + res


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Encoder(1, 256, 4, 4) for _ in range(4)])
        self.dense = nn.Linear(500, 128)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(128, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = x.mean(2)
        return self.head(self.drop(F.relu(self.dense(x))))
"""
_IMAGES: Final = 'images = torch.randn({batch}, 3, 32, 32, device="cuda")'
_GRAPH: Final = """\
atoms = torch.randn({atoms}, 64, device="cuda")
bonds = torch.randn({bonds}, 7, device="cuda")
source = torch.zeros({bonds}, dtype=torch.long, device="cuda")
target = torch.zeros({bonds}, dtype=torch.long, device="cuda")
"""
_ATOMS: Final = 24
_BONDS: Final = 76


def _trained(layers: str, arguments: str, inputs: str) -> str:
    return _IMPORTS + layers + _TRAIN.replace("{arguments}", arguments).replace("{inputs}", inputs)


_PROGRAMS: Final = {
    "bert": _BERT,
    "cyclegan": _IMPORTS + _CYCLEGAN,
    "deepspeech2": _trained(_DEEPSPEECH2, "sound", 'sound = torch.randn({batch}, 1, 1000, 193, device="cuda")'),
    "embedding": _trained(_EMBEDDING, "tokens", 'tokens = torch.zeros({batch}, 200, dtype=torch.long, device="cuda")'),
    "gnn": _trained(_GNN, "atoms, bonds, source, target", _GRAPH),
    "mobilenet": _trained(_CONV + _MOBILENET, "images", _IMAGES),
    "resnet": _trained(_CONV + _RESNET, "images", _IMAGES),
    "transformer": _trained(_TRANSFORMER, "series", 'series = torch.randn({batch}, 500, 1, device="cuda")'),
}


def program(workload: str, batch: int) -> str:
    """Source of a workload at a batch size.

    Raises:
        KeyError: MISO has no such workload.
    """
    sizes = {"batch": batch, "atoms": _ATOMS * batch, "bonds": _BONDS * batch}
    text = _PROGRAMS[workload]
    for name, size in sizes.items():
        text = text.replace(f"{{{name}}}", str(size))
    return text
