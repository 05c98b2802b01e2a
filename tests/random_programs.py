"""Random small programs by seed: linears, convolutions, attention, control flow, shared modules,
buffers that are written to, several outputs, dynamic sizes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, scaled_dot_product_attention, silu

WIDTHS = (8, 16, 24)


@dataclass(frozen=True)
class Drawn:
    """A model, example inputs, and what to call it with otherwise."""

    model: nn.Module
    example: tuple[Tensor, ...]
    batches: list[tuple[Tensor, ...]]
    other: tuple[Tensor, ...]


class Residual(nn.Module):
    """x + second(f(first(x)))"""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        inner = draw.choice(WIDTHS)
        self.first = nn.Linear(width, inner, bias=draw.random() < 0.7)
        self.second = nn.Linear(inner, width, bias=draw.random() < 0.7)
        self.activation = draw.choice([relu, gelu, silu, torch.tanh])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.activation(self.first(x)))


class Attention(nn.Module):
    """Self-attention of two heads, q, k and v from one input."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.causal = draw.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.o(y.transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    """A convolution along the sequence."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        groups = draw.choice([1, 2])
        self.inner = nn.Conv1d(width, width, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x.transpose(1, 2)).transpose(1, 2)


class Branch(nn.Module):
    """One of two linears, by the sign of the sum."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.left.forward, self.right.forward, (x,))


class Counter(nn.Module):
    """A buffer that every call writes to."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.linear(x) + 0.01 * self.calls


class Products(nn.Module):
    """x @ w with the weight stored as [in, out], and addmm of rows."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.b = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.b, x.flatten(0, 1), self.w)
        return relu(rows.unflatten(0, x.shape[:2])) + x @ self.w


class Normed(nn.Module):
    """A norm, then a linear."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        kind = draw.choice([nn.LayerNorm, nn.RMSNorm])
        self.norm, self.linear = kind(width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class Mapped(nn.Module):
    """`map` over the rows of the batch."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        from functorch.experimental.control_flow import map as over

        return over(torch.tanh, x) + self.linear(x)


PARTS = (Residual, Residual, Attention, Convolution, Branch, Counter, Products, Normed, Mapped)


class Program(nn.Module):
    """Parts one after the other, one of them perhaps twice; one output or several."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        made = [draw.choice(PARTS)(draw, width) for _ in range(draw.randint(1, 2))]
        if draw.random() < 0.3:
            made.append(made[0])
        self.parts = nn.ModuleList(made)
        self.head = nn.Linear(width, draw.choice(WIDTHS))
        self.several = draw.random() < 0.3

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        for part in self.parts:
            x = part(x)
        return (self.head(x), x.mean(1)) if self.several else self.head(x)


def drawn(seed: int) -> Drawn:
    """The program of a seed, the first dimension of its input dynamic."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width = draw.choice(WIDTHS)
    model = Program(draw, width).eval()
    batches = [(torch.randn(4, 5, width),) for _ in range(2)]
    return Drawn(model, (torch.randn(3, 5, width),), batches, (torch.randn(2, 5, width),))
