"""Which method loses less of a layer's output than which: what each one's mathematics promises."""

import pytest
import torch
from torch import Tensor

from slimfx.methods import COMPENSATORS, PRUNERS, QUANTIZERS
from slimfx.methods.absmax import absmax
from slimfx.methods.alternate import alternate
from slimfx.methods.awq import awq
from slimfx.methods.covariance import damped
from slimfx.methods.masks import NofM, keep
from slimfx.methods.quantized import quantize
from slimfx.methods.stats import Stats, add_tokens, empty_stats

BITS = [2, 3, 4, 8]


def layer(seed: int, N: int = 48, K: int = 64) -> tuple[Tensor, Stats]:
    """A heavy-tailed weight; 4000 correlated tokens whose channels differ in size."""
    torch.manual_seed(seed)
    x = torch.randn(4000, K) @ torch.randn(K, K) / K**0.5 + torch.randn(4000, K)
    x = x * torch.randn(K).mul(0.7).exp()
    W = torch.distributions.StudentT(5.0).sample((N, K)) * 0.05
    return W, add_tokens(empty_stats(K, covariance=True), x)


def output_error(E: Tensor, stats: Stats) -> float:
    """E||E x||^2 over the tokens."""
    H = stats.covariance.double()
    return ((E.double() @ H) * E.double()).sum().item()


def compressed(W: Tensor, stats: Stats, bits: int = 4) -> Tensor:
    """One exact scale and Wanda's 2:4."""
    scale = QUANTIZERS["slim-quant"](W, bits=bits, granularity="tensor", group=128)
    dense = quantize(W, scale, group=128, bits=bits).dense()
    return dense * keep(PRUNERS["wanda"](W, stats), NofM(2, 4))


def adapter_errors(seed: int, rank: int, shape: tuple[int, int]) -> dict[str, float]:
    W, stats = layer(seed, *shape)
    E = W - compressed(W, stats)
    errors = {}
    for name, method in COMPENSATORS.items():
        L, R = method(E, stats, rank=rank)
        errors[name] = output_error(E - R @ L, stats)
    return errors


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
@pytest.mark.parametrize("rank", [1, 6, 20])
def test_full_loses_least_then_the_diagonals_then_naive(rank: int, shape: tuple[int, int]) -> None:
    runs = [adapter_errors(seed, rank, shape) for seed in range(5)]
    for errors in runs:
        for diagonal in ("qera", "slim-lora", "l2qer"):
            assert errors["full"] <= errors[diagonal] * (1 + 1e-3)  # but for the damping
    mean = {name: sum(errors[name] for errors in runs) for name in COMPENSATORS}
    for diagonal in ("qera", "slim-lora", "l2qer"):
        assert mean[diagonal] < 0.99 * mean["naive"]


def test_of_uncorrelated_inputs_the_diagonal_of_qera_is_all_there_is() -> None:
    W, _ = layer(0)
    sizes = torch.randn(64).exp()
    x = torch.linalg.qr(torch.randn(4000, 64)).Q * 4000**0.5 * sizes  # X^T X is diagonal
    stats = add_tokens(empty_stats(64, covariance=True), x)
    E = W - compressed(W, stats)
    errors = {}
    for name in ("qera", "full", "slim-lora", "naive"):
        L, R = COMPENSATORS[name](E, stats, rank=6)
        errors[name] = output_error(E - R @ L, stats)
    assert errors["qera"] == pytest.approx(errors["full"], rel=5e-3)
    assert errors["qera"] <= errors["slim-lora"] * (1 + 1e-5)
    assert errors["slim-lora"] < errors["naive"]


def test_a_compensated_layer_never_loses_more_than_one_without_adapter() -> None:
    for seed in range(3):
        W, stats = layer(seed)
        E = W - compressed(W, stats)
        L, R = COMPENSATORS["full"](E, stats, rank=2)
        assert output_error(E - R @ L, stats) < output_error(E, stats)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(3))
def test_the_exact_scale_is_no_worse_than_the_histogram_and_that_than_absmax(
    bits: int, seed: int
) -> None:
    W = layer(seed)[0]
    errors = []
    for name in ("slim-quant", "slim-histogram", "absmax"):
        scale = QUANTIZERS[name](W, bits=bits, granularity="tensor", group=128)
        dense = quantize(W, scale, group=128, bits=bits).dense()
        errors.append((dense.double() - W.double()).square().sum().item())
    assert errors[0] <= errors[1] * (1 + 1e-9)
    assert errors[1] <= errors[2] * (1.05 if bits == 8 else 1)  # 8 bits: absmax clips nothing


def test_every_bit_more_loses_less() -> None:
    W, _ = layer(0)
    for name in QUANTIZERS:
        errors = []
        for bits in BITS:
            scale = QUANTIZERS[name](W, bits=bits, granularity="tensor", group=128)
            E = W - quantize(W, scale, group=128, bits=bits).dense()
            errors.append(E.square().sum().item())
        assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2] > 1.3**2 * 20 * errors[3]


def test_wanda_and_jsq_lose_less_than_magnitude() -> None:
    lost = dict.fromkeys(PRUNERS, 0.0)
    for seed in range(5):
        W, stats = layer(seed)
        for name, score in PRUNERS.items():
            lost[name] += output_error(W * ~keep(score(W, stats), NofM(2, 4)), stats)
    assert lost["wanda"] < 0.95 * lost["magnitude"]
    assert lost["jsq"] < 0.97 * lost["magnitude"]
    assert lost["jsq"] < 1.1 * lost["wanda"]


@pytest.mark.parametrize("bits", [3, 4])
def test_scaled_inputs_of_awq_lose_no_more_than_plain_ones(bits: int) -> None:
    def rounded(W: Tensor) -> Tensor:
        scale = absmax(W, bits=bits, granularity="channel", group=128)
        return quantize(W, scale, group=128, bits=bits).dense()

    for seed in range(3):
        W, stats = layer(seed)
        c = awq(W, stats, quantize=rounded)
        with_c = output_error(W - rounded(W / c) * c, stats)
        assert with_c <= output_error(W - rounded(W), stats) * (1 + 1e-5)


def test_alternating_loses_less_than_one_round() -> None:
    W, stats = layer(1)
    H = damped(stats.covariance)
    lost = []
    for rounds in (1, 8):
        parts = alternate(
            W,
            compress=lambda T: compressed(T, stats),
            compensate=lambda E: COMPENSATORS["full"](E, stats, rank=6),
            error=lambda E: ((E @ H) * E).sum().item(),
            rounds=rounds,
            low_rank_first=False,
        )
        lost.append(output_error(W - parts.dense(), stats))
    assert lost[1] < 0.98 * lost[0]
