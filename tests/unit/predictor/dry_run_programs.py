"""Training programs as people write them; not one knows of a dry run."""

from __future__ import annotations

from typing import Final

PLAIN: Final = """
import torch
from torch import nn
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
net = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).to(device)
assert next(net.parameters()).is_cuda and str(next(net.parameters()).device) == "cuda:0"
optimizer = torch.optim.Adam(net.parameters())
data = torch.utils.data.TensorDataset(torch.randn(60000, 1024), torch.randint(0, 1024, (60000,)))
loader = torch.utils.data.DataLoader(data, batch_size=256, shuffle=True, num_workers=8, pin_memory=True)
for epoch in range(100):
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device)
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"{loss.item():.3f} {loss:.3f}", loss.device, torch.cuda.memory_allocated())
"""

#: Mixed precision, a data set that would be downloaded, a tracker, a compiler, clipping, a scheduler and options.
VISION: Final = """
import argparse, torch, torchvision, wandb
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, models, transforms
parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--clip", action="store_true")
asked = parser.parse_args()
torch.manual_seed(0); torch.cuda.manual_seed_all(0); torch.backends.cudnn.benchmark = True
wandb.init(project="x"); writer = SummaryWriter("runs")
told = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
train = datasets.CIFAR10("./data", train=True, download=True, transform=told)
loader = torch.utils.data.DataLoader(train, batch_size=asked.batch_size, shuffle=True, num_workers=4,
                                     pin_memory=True, persistent_workers=True)
model = models.resnet18(weights="DEFAULT").cuda()
model = torch.compile(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
scaler = torch.amp.GradScaler("cuda"); criterion = nn.CrossEntropyLoss().cuda()
for epoch in range(200):
    model.train(); correct = total = 0
    for x, y in loader:
        x, y = x.cuda(non_blocking=True), y.cuda(non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast("cuda"):
            out = model(x); loss = criterion(out, y)
        if not torch.isfinite(loss) or torch.isnan(loss).any():
            raise SystemExit("the loss is no number")
        scaler.scale(loss).backward()
        if asked.clip:
            scaler.unscale_(optimizer); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer); scaler.update()
        total += y.size(0); correct += (out.argmax(1) == y).sum().item()
        writer.add_scalar("loss", loss.item(), epoch); wandb.log({"loss": float(loss), "right": correct / total})
    schedule.step(); torch.save(model.state_dict(), "x.pt")
"""

TRANSFORMER: Final = """
import torch
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup
device = "cuda" if torch.cuda.is_available() else "cpu"
model = BertForSequenceClassification(BertConfig(num_hidden_layers=2)).to(device)
CHECKPOINTING
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
schedule = get_linear_schedule_with_warmup(optimizer, 10, 100)
accumulation = 4; model.train()
for step in range(1000):
    batch = {"input_ids": torch.randint(0, 30000, (8, 256)), "attention_mask": torch.ones(8, 256, dtype=torch.long),
             "labels": torch.randint(0, 2, (8,))}
    batch = {name: value.to(device) for name, value in batch.items()}
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        loss = model(**batch).loss / accumulation
    loss.backward()
    if (step + 1) % accumulation == 0:
        optimizer.step(); schedule.step(); optimizer.zero_grad()
        print(step, loss.item())
"""

#: Attention, dropout, buffers, a checkpoint that is not there, another program, waiting, validation, early stopping.
ODDITIES: Final = """
import os, subprocess, time
import torch
from torch import nn
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
        assert rates[2] > 0.09
        self.c = nn.Conv2d(1, 32, 3, stride=4); self.a = nn.MultiheadAttention(32, 4, batch_first=True)
        self.f = nn.Linear(32, 10); self.d = nn.Dropout(rates[2]); self.register_buffer("position", torch.arange(49))
    def forward(self, x):
        h = self.c(x).flatten(2).transpose(1, 2)
        mask = torch.zeros(h.shape[1], h.shape[1], device=x.device)
        return self.f(self.d(self.a(h, h, h, attn_mask=mask, need_weights=False)[0].mean(1)))
net = Net(); optimizer = torch.optim.AdamW(net.parameters(), fused=True); net.to("cuda:0")
print(subprocess.check_output(["nvidia-smi"], text=True)); time.sleep(1000)
train = torch.utils.data.DataLoader(MNIST(".", train=True, download=True, transform=ToTensor()), batch_size=32)
check = torch.utils.data.DataLoader(MNIST(".", train=False, download=True, transform=ToTensor()), batch_size=64)
if os.path.exists("ck.pt"):
    net.load_state_dict(torch.load("ck.pt"))
saved = torch.load("missing.pt", map_location="cuda"); net.load_state_dict(saved["model"]); first = saved["epoch"]
best, bad = 1e9, 0
for epoch in range(first, 50):
    try:
        for x, y in train:
            x, y = x.to("cuda"), y.to("cuda")
            loss = nn.functional.cross_entropy(net(x), y)
            optimizer.zero_grad(set_to_none=True); loss.backward(); optimizer.step()
            break
    except Exception as error:
        print("taken for a failure", error)
    net.eval(); right = total = 0
    with torch.no_grad():
        for x, y in check:
            x, y = x.cuda(), y.cuda(); out = net(x); total += y.numel()
            right += out.argmax(-1).eq(y).sum().item(); loss = nn.functional.cross_entropy(out, y).item()
            some = out[y > 3]; out.softmax(1).cpu().numpy(); y.tolist()
            break
    net.train(); bad = 0 if loss < best else bad + 1; best = min(best, loss)
    if bad > 3:
        break
"""

#: A group of processes, checkpoints within the program's own layers, and a default device.
DISTRIBUTED: Final = """
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
class Block(nn.Module):
    def __init__(self):
        super().__init__(); self.one = nn.Linear(512, 2048); self.two = nn.Linear(2048, 512)
    def forward(self, x):
        return x + self.two(torch.nn.functional.gelu(self.one(x)))
class Net(nn.Module):
    def __init__(self):
        super().__init__(); self.blocks = nn.ModuleList(Block() for _ in range(4))
    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x
def worker(rank, world):
    dist.init_process_group("nccl", rank=rank, world_size=world); torch.cuda.set_device(rank)
    net = DDP(Net().to(rank), device_ids=[rank])
    optimizer = torch.optim.AdamW(net.parameters())
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    while True:
        start.record()
        x = torch.randn(1024, 512, device=rank)
        with torch.cuda.stream(torch.cuda.Stream()):
            loss = net(x).pow(2).mean()
        loss.backward(); dist.all_reduce(loss)
        optimizer.step(); optimizer.zero_grad(); end.record(); torch.cuda.synchronize()
        print(start.elapsed_time(end), torch.cuda.mem_get_info(), torch.cuda.max_memory_allocated())
if __name__ == "__main__":
    mp.spawn(worker, args=(torch.cuda.device_count(),), nprocs=torch.cuda.device_count())
"""

INFERENCE: Final = """
import torch, torchvision
model = torchvision.models.resnet50().eval().to("cuda")
with torch.inference_mode():
    while True:
        print(model(torch.randn(32, 3, 224, 224, device="cuda")).softmax(1).cpu().numpy().argmax(1)[:3])
"""

HOST_ONLY: Final = """
import torch
model = torch.nn.Linear(4, 4); optimizer = torch.optim.SGD(model.parameters(), 0.1)
for step in range(5):
    model(torch.randn(2, 4)).sum().backward(); optimizer.step()
"""

BROKEN: Final = """
import torch
model = torch.nn.Linear(4, 4).cuda()
model(torch.randn(2, 5).cuda())
"""

DOWNLOAD: Final = """
import urllib.request, torch
urllib.request.urlretrieve("https://example.org/data.tar", "data.tar")
"""

#: It takes the end of the dry run for a failure of its own, and goes on.
STUBBORN: Final = """
import torch
model = torch.nn.Linear(64, 64, device="cuda"); optimizer = torch.optim.SGD(model.parameters(), 0.1)
while True:
    try:
        model(torch.randn(8, 64).cuda()).sum().backward(); optimizer.step()
    except:
        pass
"""

ENDLESS: Final = """
import torch
while True:
    pass
"""

ONE_STEP: Final = """
import torch
torch.set_default_device("cuda")
model = torch.nn.Linear(1024, 1024); optimizer = torch.optim.SGD(model.parameters(), 0.1)
model(torch.ones(16, 1024)).sum().backward(); optimizer.step()
assert torch.tensor([1.0, 2.0]).is_cuda and (torch.arange(3) + 1).device.type == "cuda"
"""

#: Samples are cut out of one file at places that the host draws.
PIECES: Final = """
import numpy, torch
from torch import nn
numpy.arange(100000, dtype=numpy.uint16).tofile("train.bin")
table = nn.Embedding(65536, 64); head = nn.Linear(64, 65536, bias=False); table.weight = head.weight
net = nn.Sequential(table, head).to("cuda")
optimizer = torch.optim.AdamW(net.parameters(), fused=True)
while True:
    data = numpy.memmap("train.bin", dtype=numpy.uint16, mode="r")
    places = torch.randint(len(data) - 128, (8,))
    x = torch.stack([torch.from_numpy(data[at:at + 128].astype(numpy.int64)) for at in places])
    x = x.pin_memory().to("cuda", non_blocking=True)
    loss = nn.functional.cross_entropy(net(x).view(-1, 65536), x.view(-1), ignore_index=-1)
    loss.backward(); optimizer.step(); optimizer.zero_grad(set_to_none=True)
"""
