"""Wanda against its equation, and against magnitude in the norm it is made for."""

import pytest
import torch
from torch import Tensor

from slimfx.methods.magnitude import magnitude
from slimfx.methods.masks import NofM, Unstructured, keep
from slimfx.methods.stats import Stats, add_tokens, empty_stats
from slimfx.methods.wanda import wanda


def stats_of(x: Tensor) -> Stats:
    """Statistics of the tokens x [tokens, K]."""
    return add_tokens(empty_stats(x.shape[1]), x)


def kept(W: Tensor, stats: Stats, n: int, m: int) -> Tensor:
    """The mask of what stays."""
    return keep(wanda(W, stats), NofM(n, m))


def reference(W: Tensor, x: Tensor, n: int, m: int) -> list[list[bool]]:
    """Keep the n largest |W_ij| * ||X_j||_2 of every m, in float64."""
    norms = [column.norm().item() for column in x.double().T]
    rows = []
    for row in W.double().tolist():
        score = [abs(w) * norm for w, norm in zip(row, norms)]
        starts = [j - j % m for j in range(len(row))]
        rows.append([sorted(score[s : s + m])[-n] <= score[j] for j, s in enumerate(starts)])
    return rows


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 5), (1, 2), (4, 8)])
def test_equals_the_equation_of_the_paper(n: int, m: int) -> None:
    K = 3 * m
    W, x = torch.randn(7, K), torch.randn(33, K) * torch.logspace(-2, 2, K)
    assert kept(W, stats_of(x), n, m).tolist() == reference(W, x, n, m)


@pytest.mark.parametrize("seed", range(5))
def test_loses_less_of_the_output_than_magnitude_for_uncorrelated_inputs(seed: int) -> None:
    torch.manual_seed(seed)
    W, x = torch.randn(17, 36), torch.randn(200, 36) * torch.rand(36).exp()
    stats = stats_of(x)

    def lost(mask: Tensor) -> float:
        return (W * ~mask * stats.rms).double().square().sum().item()

    # 0.78 to 0.85 of it
    by_magnitude = keep(magnitude(W, stats), NofM(2, 4))
    assert lost(kept(W, stats, 2, 4)) < 0.95 * lost(by_magnitude)


def test_equals_magnitude_when_all_inputs_are_alike() -> None:
    W = torch.randn(5, 24)
    alike = stats_of(torch.full((3, 24), 2.0))
    assert torch.equal(kept(W, alike, 2, 4), keep(magnitude(W, alike), NofM(2, 4)))


def test_a_dead_input_is_pruned_whatever_its_weights() -> None:
    W, x = torch.randn(6, 16), torch.randn(50, 16)
    W[:, 9], x[:, 9] = 1000.0, 0.0
    assert not kept(W, stats_of(x), 2, 4)[:, 9].any()
    assert not keep(wanda(W, stats_of(x)), Unstructured(0.1))[:, 9].any()


def test_inputs_that_are_all_dead_leave_the_first_n_of_every_m() -> None:
    mask = kept(torch.randn(2, 8), stats_of(torch.zeros(4, 8)), 2, 4)
    assert mask.int().tolist() == [[1, 1, 0, 0] * 2] * 2


def test_one_token_is_enough() -> None:
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    mask = kept(torch.tensor([[1.0, 1.0, 1.0, 1e-4]]), stats_of(x), 2, 4)
    assert mask.tolist() == [[False, True, True, False]]


def test_a_bfloat16_weight_is_scored_in_float32() -> None:
    W = torch.ones(1, 4, dtype=torch.bfloat16)
    x = torch.tensor([[1.0, 1.001, 1.002, 1.003]])  # one number in bfloat16
    assert kept(W, stats_of(x), 2, 4).tolist() == [[False, False, True, True]]
