"""A small GPT in plain PyTorch: trained, smoothed by hand, smoothed by quantkit, quantized. See nanogpt.md.

python docs/tutorials/nanogpt.py [--steps 400]
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantkit

LENGTH, WIDTH, HEADS, LAYERS, BATCH = 128, 128, 4, 4, 16


# ---- the model: nothing in it knows of quantkit


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part.view(b, t, HEADS, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(WIDTH, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def draw(data: Tensor, random: torch.Generator, count: int = BATCH) -> Tensor:
    """``[count, LENGTH + 1]`` tokens from random places."""
    starts = torch.randint(0, len(data) - LENGTH - 1, (count,), generator=random)
    return torch.stack([data[s : s + LENGTH + 1] for s in starts])


def train(model: nn.Module, data: Tensor, steps: int, random: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(1, steps + 1):
        loss = loss_of(model, draw(data, random))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


# ---- SmoothQuant by hand


@torch.no_grad()
def smooth_by_hand(model: GPT, batches: list[Tensor], alpha: float = 0.5) -> GPT:
    """A copy in which every LayerNorm gives x / s and the linear behind it holds W s: the same function, easier to round."""
    model = copy.deepcopy(model)
    pairs = [pair for b in model.blocks for pair in ((b.norm1, b.qkv), (b.norm2, b.up))]
    act_max = {linear: torch.zeros(WIDTH) for _, linear in pairs}

    def look(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        act_max[linear] = torch.maximum(act_max[linear], inputs[0].abs().flatten(0, 1).amax(0))

    hooks = [linear.register_forward_pre_hook(look) for linear in act_max]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()

    for norm, linear in pairs:
        weight_max = linear.weight.abs().amax(0)
        s = act_max[linear] ** alpha / weight_max ** (1 - alpha)
        norm.weight /= s
        norm.bias /= s
        linear.weight *= s
    return model


def main(steps: int = 400) -> dict[str, float]:
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    letters = sorted(set(text))
    number = {letter: i for i, letter in enumerate(letters)}
    data = torch.tensor([number[letter] for letter in text])
    split = len(data) * 9 // 10
    model = GPT(len(letters))
    train(model, data[:split], steps, random)
    model.eval()

    calibration = [draw(data[:split], random, 4)[:, :-1] for _ in range(8)]
    ours = smooth_by_hand(model, calibration)
    theirs = quantkit.quantize(
        copy.deepcopy(model), quantkit.SmoothQuant(alpha=0.5), scheme=None, targets=["qkv", "up"], calibration=calibration
    )
    found = theirs.state_dict()
    off = max(float(((a - found[name]).abs() / a.abs().amax()).max()) for name, a in ours.state_dict().items())
    print(f"by hand and by quantkit: every tensor equal to {off:.1e} of its largest element")

    held_out = draw(data[split:], random, 64)
    results = {"by hand against quantkit": off}
    with torch.no_grad():
        results["fp32"] = float(loss_of(model, held_out))
        for method in ("rtn", "smoothquant", "llm_int8", ["smoothquant", "llm_int8"]):
            quantized = quantkit.quantize(copy.deepcopy(model), method, calibration=calibration)
            results[method if isinstance(method, str) else " + ".join(method)] = float(loss_of(quantized, held_out))
    for name, value in list(results.items())[1:]:
        print(f"{name:24} held-out loss {value:.5f} nats a letter")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training; 400 take about a minute on two cores")
    main(parser.parse_args().steps)
