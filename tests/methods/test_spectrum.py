"""What the leading ranks take up, beside a plain singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from models import normal

from slimfx.methods.spectrum import energy, spectrum


def test_energy_is_that_of_random_inputs_and_leaves_the_matrix() -> None:
    M, rms = normal(1, 30, 20).double(), normal(2, 20).abs().double()
    kept = M.clone()
    assert energy(M, rms) == pytest.approx(
        sum((M[:, k] * rms[k]).square().sum() for k in range(20))
    )
    assert torch.equal(M, kept)
    assert energy(torch.full((4, 4), 1e-30), torch.ones(4)) == pytest.approx(16e-60)  # no underflow


@pytest.mark.parametrize(("N", "K"), [(40, 24), (16, 48)])
def test_it_is_the_spectrum_of_the_product(N: int, K: int) -> None:
    error, L, R = normal(1, N, K).double(), normal(2, 16, K).double(), normal(3, N, 16).double()
    rms = normal(4, K).abs().double()
    energies = torch.linalg.svdvals((R @ L) * rms).square() / (error * rms).square().sum()
    expected = [energies[:k].sum().item() for k in (2, 4, 8, 16)]
    assert spectrum(energy(error, rms), L, R, rms) == pytest.approx(expected, rel=1e-9)


def test_the_best_adapter_takes_up_what_the_errors_own_spectrum_has() -> None:
    error, rms = normal(1, 30, 20).double(), torch.ones(20).double()
    U, s, Vh = torch.linalg.svd(error, full_matrices=False)
    found = spectrum(energy(error, rms), Vh[:8], U[:, :8] * s[:8], rms)
    shares = s.square().cumsum(0) / s.square().sum()
    assert found == pytest.approx([shares[k - 1].item() for k in (1, 2, 4, 8)])


def test_rank_one_and_nothing_to_take_up() -> None:
    one = spectrum(16.0, torch.ones(1, 4), torch.ones(4, 1), torch.ones(4))
    assert one == pytest.approx([1.0] * 4)
    zeros = torch.zeros(4, 4)
    assert spectrum(0.0, zeros[:1], zeros[:, :1], torch.ones(4)) == (0.0,) * 4
