"""Teaches a small GPT to write, character by character, from the text beside this file.

On a GPU it trains with the batch and context that the arguments say. Without one it takes the same model
through shorter windows, fewer at a time, so that it learns something on a CPU within a minute.

    puhui run examples/chargpt/train.py --block-size 1024 --batch-size 24
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - everybody calls it F


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 128
    n_layer: int = 8
    n_head: int = 8
    n_embd: int = 512
    dropout: float = 0.1


class SelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.project = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.register_buffer("mask", torch.tril(torch.ones(config.block_size, config.block_size)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        weights = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
        weights = weights.masked_fill(self.mask[:length, :length] == 0, float("-inf"))
        weights = self.dropout(F.softmax(weights, dim=-1))
        return self.project((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.attention = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(),
            nn.Linear(4 * config.n_embd, config.n_embd),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, index: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(index) + self.positions(torch.arange(index.size(1), device=index.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--n-layer", type=int, default=8)
    parser.add_argument("--n-embd", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    torch.manual_seed(7)
    text = Path(__file__).with_name("text.txt").read_text()
    characters = sorted(set(text))
    data = torch.tensor([characters.index(character) for character in text])

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = args.batch_size if device.type == "cuda" else 4
    window = args.block_size if device.type == "cuda" else 48

    config = GPTConfig(block_size=args.block_size, vocab_size=len(characters), n_layer=args.n_layer, n_embd=args.n_embd)
    model = GPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters on {device}", flush=True)

    losses = []
    started = time.time()
    for step in range(args.steps):
        starts = torch.randint(0, len(data) - window - 1, (batch_size,))
        x = torch.stack([data[s : s + window] for s in starts]).to(device)
        y = torch.stack([data[s + 1 : s + 1 + window] for s in starts]).to(device)
        loss = model(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            mean = sum(losses[-10:]) / 10
            print(f"step {step + 1}: loss {mean:.3f} ({time.time() - started:.0f} s)", flush=True)

    outputs = Path(os.environ.get("PUHUI_OUTPUTS", "outputs"))
    outputs.mkdir(parents=True, exist_ok=True)
    (outputs / "losses.json").write_text(json.dumps(losses))
    (outputs / "characters.json").write_text(json.dumps(characters))


if __name__ == "__main__":
    main()
