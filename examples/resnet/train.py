"""Teaches a ResNet-50 to tell shapes apart: discs, squares, crosses and rings, drawn on noise.

On a GPU it trains on 224-pixel pictures in the batches that the arguments say. Without one it takes the
same network through small pictures, a few at a time, so that it learns something on a CPU within a minute.

    puhui run examples/resnet/train.py --batch-size 256
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch import nn

SHAPES = ["disc", "square", "cross", "ring"]


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        width_out = width * self.expansion
        self.conv1 = nn.Conv2d(width_in, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width_out, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, depths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        stages = []
        width_in = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            for block in range(depth):
                stages.append(Bottleneck(width_in, width, stride=2 if block == 0 and stage > 0 else 1))
                width_in = width * Bottleneck.expansion
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width_in, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stages(self.stem(x)))
        return self.head(torch.flatten(x, 1))


def draw(count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `count` pictures of shape (count, 3, side, side) and their labels."""
    labels = torch.randint(0, len(SHAPES), (count,))
    row = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(row, row, indexing="ij")
    pictures = 0.1 * torch.randn(count, 3, side, side)
    for index in range(count):
        dx, dy = ((torch.rand(2) - 0.5) * 0.6).tolist()
        u, v = x - dx, y - dy
        radius = (u**2 + v**2).sqrt()
        inside = [
            radius < 0.45,
            torch.maximum(u.abs(), v.abs()) < 0.4,
            (u.abs() < 0.12) & (v.abs() < 0.5) | (v.abs() < 0.12) & (u.abs() < 0.5),
            (radius < 0.5) & (radius > 0.3),
        ][labels[index]]
        pictures[index] += inside.float() * (0.5 + torch.rand(3, 1, 1))
    return pictures, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    torch.manual_seed(7)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = args.batch_size if device.type == "cuda" else 24
    side = args.image_size if device.type == "cuda" else 32

    model = ResNet((3, 4, 6, 3), classes=len(SHAPES)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loss_of = nn.CrossEntropyLoss()
    losses, rights = [], []
    for step in range(args.steps):
        pictures, labels = draw(batch_size, side)
        pictures, labels = pictures.to(device), labels.to(device)
        logits = model(pictures)
        loss = loss_of(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        rights.append((logits.argmax(1) == labels).float().mean().item())
        if step % 8 == 7:
            print(
                f"step {step + 1}: loss {sum(losses[-8:]) / 8:.3f}, {sum(rights[-8:]) / 8:.0%} of new shapes named",
                flush=True,
            )

    outputs = Path(os.environ.get("PUHUI_OUTPUTS", "outputs"))
    outputs.mkdir(parents=True, exist_ok=True)
    (outputs / "metrics.json").write_text(json.dumps({"loss": losses, "accuracy": rights}))
    torch.save(model.state_dict(), outputs / "resnet50.pt")


if __name__ == "__main__":
    main()
