"""Teaches a small multilayer perceptron to read digits.

The digits are drawn here, as seven-segment figures that are shifted, thickened and covered with noise, so
that nothing has to be downloaded. On a CPU it reaches more than 95 % on digits it has not seen in seconds.

    puhui run examples/digits/train.py --epochs 6
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch import nn

SIDE = 28
# Which of the seven segments (top, upper left, upper right, middle, lower left, lower right, bottom) are lit.
SEGMENTS = [
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
]
STROKES = [
    (4, 8, 4, 19),
    (4, 8, 13, 9),
    (4, 19, 13, 20),
    (13, 8, 13, 19),
    (13, 8, 23, 9),
    (13, 19, 23, 20),
    (23, 8, 23, 19),
]


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `count` pictures of shape (count, 784) and their labels."""
    labels = torch.randint(0, 10, (count,), generator=generator)
    clean = torch.zeros(10, SIDE, SIDE)
    for digit, lit in enumerate(SEGMENTS):
        for on, (top, left, bottom, right) in zip(lit, STROKES, strict=True):
            if on == "1":
                clean[digit, top : bottom + 2, left : right + 2] = 1.0
    shifts = torch.randint(-3, 4, (count, 2), generator=generator)
    pictures = torch.stack(
        [torch.roll(clean[label], (int(dy), int(dx)), (0, 1)) for label, (dy, dx) in zip(labels, shifts, strict=True)]
    )
    pictures = pictures + 0.4 * torch.randn(pictures.shape, generator=generator)
    return pictures.reshape(count, SIDE * SIDE), labels


class Reader(nn.Module):
    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        blocks = [nn.Linear(SIDE * SIDE, hidden), nn.ReLU()]
        for _ in range(layers - 1):
            blocks += [nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.1)]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(7)
    train_x, train_y = draw(10000, generator)
    test_x, test_y = draw(1000, generator)
    model = Reader(args.hidden, args.layers).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    loss_of = nn.CrossEntropyLoss()
    history = []
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(train_x), generator=generator)
        total = 0.0
        for batch in order.split(args.batch_size):
            optimizer.zero_grad()
            loss = loss_of(model(train_x[batch].to(device)), train_y[batch].to(device))
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        model.eval()
        with torch.no_grad():
            right = (model(test_x.to(device)).argmax(1).cpu() == test_y).float().mean().item()
        history.append({"epoch": epoch + 1, "loss": total / len(train_x), "test_accuracy": right})
        print(f"epoch {epoch + 1}: loss {total / len(train_x):.4f}, {right:.1%} of unseen digits read", flush=True)

    outputs = Path(os.environ.get("PUHUI_OUTPUTS", "outputs"))
    outputs.mkdir(parents=True, exist_ok=True)
    (outputs / "metrics.json").write_text(json.dumps(history, indent=1))
    torch.save(model.state_dict(), outputs / "reader.pt")


if __name__ == "__main__":
    main()
