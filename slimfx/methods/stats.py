"""What the methods know of a layer's inputs: sums over calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stats:
    """Running sums over the tokens that reached one input of width K (float64, [K] each)."""

    tokens: int
    abs_sum: Tensor
    square_sum: Tensor
    peak: Tensor
    value_sum: Tensor
    product_sum: Tensor | None = None
    """X^T X, float32 [K, K], for the methods that need it."""

    @property
    def covariance(self) -> Tensor:
        """H = X^T X / tokens, float32 [K, K]."""
        if self.product_sum is None:
            raise AssertionError("these statistics were taken without the covariance")
        return self.product_sum / max(self.tokens, 1)

    @property
    def mean(self) -> Tensor:
        """Mean of x per channel, float32 [K]."""
        return (self.value_sum / max(self.tokens, 1)).float()

    @property
    def mean_abs(self) -> Tensor:
        """Mean of |x| per channel, float32 [K]."""
        return (self.abs_sum / max(self.tokens, 1)).float()

    @property
    def rms(self) -> Tensor:
        """Root of the mean of x^2 per channel, float32 [K]; Wanda's ||X_j||_2 up to a constant."""
        return (self.square_sum / max(self.tokens, 1)).sqrt().float()

    @property
    def dead(self) -> Tensor:
        """The channels that were zero in every token, bool [K]."""
        return self.peak == 0

    def centred(self) -> Stats:
        """The same with the covariance about the mean: what counts where a bias takes up the mean
        error.
        """
        if self.product_sum is None:
            return self
        about_zero = self.value_sum[:, None] * self.value_sum / max(self.tokens, 1)
        return replace(self, product_sum=self.product_sum - about_zero.float())

    def scaled(self, c: Tensor) -> Stats:
        """The statistics of x * c, for c [K]."""
        c = c.double()
        products = self.product_sum
        return Stats(
            tokens=self.tokens,
            abs_sum=self.abs_sum * c.abs(),
            square_sum=self.square_sum * c.square(),
            peak=self.peak * c.abs(),
            value_sum=self.value_sum * c,
            product_sum=None if products is None else products * (c[:, None] * c).float(),
        )


def empty_stats(
    width: int, device: torch.device | str = "cpu", *, covariance: bool = False
) -> Stats:
    """Statistics of no token at all."""
    zeros = torch.zeros(width, dtype=torch.float64, device=device)
    products = torch.zeros(width, width, device=device) if covariance else None
    return Stats(0, zeros, zeros, zeros, zeros, products)


def unreached_stats(stats: Stats) -> Stats:
    """Statistics, still of no token, in which every input matters alike and none goes with another:
    the rule for an expert that calibration never chose.
    """
    ones = torch.ones_like(stats.square_sum)
    products = stats.product_sum
    identity = None if products is None else torch.eye(len(ones), device=ones.device)
    return Stats(0, ones, ones, ones, torch.zeros_like(ones), identity)


def add_tokens(stats: Stats, x: Tensor) -> Stats:
    """Add the rows of `x` [tokens, K]; sums are taken in float32 within a call, float64 across."""
    x = x.detach().float()
    magnitude = x.abs()
    return Stats(
        tokens=stats.tokens + x.shape[0],
        abs_sum=stats.abs_sum + magnitude.sum(0).double(),
        square_sum=stats.square_sum + x.square().sum(0).double(),
        peak=torch.maximum(stats.peak, magnitude.amax(0).double()) if len(x) else stats.peak,
        value_sum=stats.value_sum + x.sum(0).double(),
        product_sum=None if stats.product_sum is None else stats.product_sum + x.T @ x,
    )


def merge(a: Stats, b: Stats) -> Stats:
    """Statistics of two inputs of the same weight taken together."""
    return Stats(
        tokens=a.tokens + b.tokens,
        abs_sum=a.abs_sum + b.abs_sum,
        square_sum=a.square_sum + b.square_sum,
        peak=torch.maximum(a.peak, b.peak),
        value_sum=a.value_sum + b.value_sum,
        product_sum=(
            None
            if a.product_sum is None or b.product_sum is None
            else a.product_sum + b.product_sum
        ),
    )
