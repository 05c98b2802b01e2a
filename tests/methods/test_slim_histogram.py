"""The paper's histogram search against a search over every bin, written out."""

import numpy as np
import pytest
import torch
from torch import Tensor

from slimfx.methods.absmax import absmax
from slimfx.methods.quantized import quantize
from slimfx.methods.slim_histogram import slim_histogram


def fit(W: Tensor, method=slim_histogram) -> Tensor:  # type: ignore[no-untyped-def]
    """The scale of a whole tensor."""
    return method(W, bits=4, granularity="tensor", group=128)


def squared_error(W: Tensor, scale: Tensor) -> float:
    """What the scale really costs."""
    return (quantize(W, scale, group=128, bits=4).dense().double() - W).square().sum().item()


def estimates(W: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Every alpha (512 bin centres) and E(alpha) of eq. 4-6 as two sums over the histogram."""
    w = W.double().abs().flatten().numpy()
    density, edges = np.histogram(w, bins=512, range=(0, w.max()))
    x = (edges[:-1] + edges[1:]) / 2
    errors = []
    for alpha in x:
        step, inside = alpha / 7, x <= alpha
        quantized = density * (x - np.round(x / step) * step) ** 2
        errors.append(quantized[inside].sum() + (density * (x - alpha) ** 2)[~inside].sum())
    return x, np.array(errors)


def gaussian() -> Tensor:
    return torch.randn(64, 100)


def laplace() -> Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample((64, 100))


def heavy_tailed() -> Tensor:
    return torch.distributions.StudentT(3.0).sample((64, 100))


@pytest.mark.parametrize("make", [gaussian, laplace, heavy_tailed])
def test_finds_the_best_bin_of_all(make) -> None:  # type: ignore[no-untyped-def]
    W = make()
    alphas, errors = estimates(W)
    found = np.abs(alphas - fit(W).item() * 7).argmin()
    # bfloat16 moves alpha by up to a bin
    assert errors[max(found - 1, 0) : found + 2].min() <= errors.min() * (1 + 1e-6)


@pytest.mark.parametrize("make", [gaussian, laplace, heavy_tailed])
def test_clips_with_less_error_than_absmax(make) -> None:  # type: ignore[no-untyped-def]
    W = make()
    # 0.50, 0.46 and 0.33 of it
    assert squared_error(W, fit(W)) < 0.6 * squared_error(W, fit(W, absmax))


def test_the_estimate_is_close_to_the_real_error() -> None:
    W = gaussian()
    # 1.0006 times the estimate
    assert squared_error(W, fit(W)) == pytest.approx(estimates(W)[1].min(), rel=0.005)


def test_an_all_zero_weight_has_scale_zero() -> None:
    scale = fit(torch.zeros(4, 8))
    assert scale.dtype == torch.bfloat16
    assert scale.tolist() == [[0.0]]


def test_a_constant_weight_is_kept_to_a_percent() -> None:
    W = torch.full((4, 8), -0.37)
    assert squared_error(W, fit(W)) <= 0.01**2 * W.square().sum().item()


@pytest.mark.parametrize("value", [1e-36, 1.0, 1e30])
def test_the_scale_follows_the_magnitude_of_the_weight(value: float) -> None:
    W = torch.randn(16, 16)
    assert fit(W * value).item() == pytest.approx(fit(W).item() * value, rel=2**-7)


def test_leaves_the_weight_as_it_was() -> None:
    W = gaussian()
    before = W.clone()
    fit(W)
    assert torch.equal(W, before)
