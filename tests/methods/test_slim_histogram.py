"""The paper's histogram search against a search over every bin, written out."""

import numpy as np
import pytest
import torch
from torch import Tensor

from slimfx.methods.absmax import absmax
from slimfx.methods.quantized import quantize
from slimfx.methods.slim_histogram import _coarse, slim_histogram
from slimfx.methods.slim_quant import slim_quant


def fit(W: Tensor, method=slim_histogram, bits: int = 4) -> Tensor:  # type: ignore[no-untyped-def]
    """The scale of a whole tensor."""
    return method(W, bits=bits, granularity="tensor", group=128)


def squared_error(W: Tensor, scale: Tensor, bits: int = 4) -> float:
    """What the scale really costs."""
    return (quantize(W, scale, group=128, bits=bits).dense().double() - W).square().sum().item()


def estimates(W: Tensor, bits: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Every alpha (512 bin centres) and E(alpha) of eq. 4-6, each bin cut into 32 points."""
    w, top = W.double().abs().flatten().numpy(), 2 ** (bits - 1) - 1
    density, edges = np.histogram(w, bins=512, range=(0, w.max()))
    alphas = (edges[:-1] + edges[1:]) / 2
    x = (np.arange(512 * 32) + 0.5) * edges[1] / 32
    errors = []
    for alpha in alphas:
        code = np.minimum(np.round(x / (alpha / top)), top)
        error = (x - code * alpha / top) ** 2
        errors.append((density * error.reshape(512, 32).mean(1)).sum())
    return alphas, np.array(errors)


def gaussian() -> Tensor:
    return torch.randn(64, 100)


def laplace() -> Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample((64, 100))


def heavy_tailed() -> Tensor:
    return torch.distributions.StudentT(3.0).sample((64, 100))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("make", [gaussian, laplace, heavy_tailed])
def test_finds_the_best_bin_of_all(make, bits: int) -> None:  # type: ignore[no-untyped-def]
    W = make()
    alphas, errors = estimates(W, bits)
    found = np.abs(alphas - fit(W, bits=bits).item() * (2 ** (bits - 1) - 1)).argmin()
    # bfloat16 moves alpha by up to two bins
    assert errors[max(found - 2, 0) : found + 3].min() <= errors.min() * (1 + 1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_tail_that_reaches_far_is_cut_where_the_coarse_grid_has_no_tenth(bits: int) -> None:
    torch.manual_seed(0)
    W = torch.distributions.StudentT(3.0).sample((512, 512))
    exact = squared_error(W, fit(W, slim_quant, bits), bits)
    # within 1.01 here; with tenths alone 1.5 to 2.2 times at 2 and 3 bits
    assert squared_error(W, fit(W, bits=bits), bits) < 1.02 * exact


@pytest.mark.parametrize("make", [gaussian, laplace, heavy_tailed])
def test_at_8_bits_it_is_close_to_the_exact_scale(make) -> None:  # type: ignore[no-untyped-def]
    W = make()
    exact = squared_error(W, fit(W, slim_quant, 8), 8)
    # 1.004 at worst; 1.06 for the gaussian where bins are represented by their centres
    assert exact <= squared_error(W, fit(W, bits=8), 8) < 1.01 * exact


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_scale_is_finite_and_positive_at_any_bits_and_range(bits: int) -> None:
    for value in (1e-36, 1e-3, 1e30):
        scale = fit(torch.tensor([[value, -value / 3, 0.0]]), bits=bits)
        assert scale.isfinite().all()
        assert scale.item() > 0


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


def test_the_first_stage_is_octaves_and_tenths() -> None:
    tenths = [50, 101, 152, 203, 254, 305, 356, 407, 458, 509]
    assert _coarse(512) == [0, 2, 5, 11, 24, *tenths, 511]


def test_the_best_bin_may_be_the_last_of_all() -> None:
    assert fit(torch.ones(8, 8), bits=2).item() == 1.0  # 511.5 / 512 in bfloat16


def test_the_best_bin_may_be_the_second_of_all() -> None:
    W = torch.ones(1000, 1000)
    W[0, 0] = 600.0  # in a thousand bins the others lie between 0.6 and 1.2
    assert fit(W, bits=2).item() == pytest.approx(0.9, rel=2**-8)
