"""The covariance made safe to invert: its scale, its damping, and the factor of its inverse."""

import math

import pytest
import torch

from slimfx.methods.covariance import damped, inverse_factor


def covariance(K: int, tokens: int = 64) -> torch.Tensor:
    X = torch.randn(tokens, K)
    return X.T @ X


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    H = covariance(6)
    expected = H / H.diagonal().mean() + 0.25 * torch.eye(6)
    torch.testing.assert_close(damped(H, 0.25), expected)
    assert damped(H).diagonal().mean().item() == pytest.approx(1.01, abs=1e-5)


def test_the_scale_of_the_covariance_is_of_no_account() -> None:
    H = covariance(5)
    torch.testing.assert_close(damped(1e-20 * H), damped(H))
    assert not torch.equal(damped(1e-3 * torch.eye(3)), torch.eye(3))


def test_inputs_that_were_never_there_leave_the_identity() -> None:
    found = damped(torch.zeros(3, 3, dtype=torch.float64))
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.eye(3, dtype=torch.float64))


def test_the_factor_is_upper_and_its_square_the_inverse() -> None:
    H = damped(covariance(7))
    U = inverse_factor(H)
    assert U.dtype == torch.float32
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ H, torch.eye(7), atol=1e-4, rtol=0)


def test_what_float32_cannot_factor_float64_does() -> None:
    """Pascal's matrix: whole numbers, exact in float32, and an inverse of whole numbers too."""
    K = 12
    L = torch.tensor([[math.comb(i, j) for j in range(K)] for i in range(K)], dtype=torch.float64)
    signs = torch.tensor([(-1.0) ** i for i in range(K)], dtype=torch.float64)
    inverse = signs * L
    expected = torch.linalg.cholesky((signs[:, None] * inverse).T @ (signs[:, None] * inverse))
    U = inverse_factor((L @ L.T).float())
    assert U.dtype == torch.float32
    torch.testing.assert_close(U, expected.T.float(), rtol=1e-3, atol=0)


def test_an_indefinite_covariance_is_an_error() -> None:
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


def test_a_factor_that_float32_cannot_hold_is_found_in_float64() -> None:
    U = inverse_factor(torch.diag(torch.tensor([1.0, 1e-39])))  # 1e39 is infinite in float32
    torch.testing.assert_close(U, torch.diag(torch.tensor([1.0, 10**19.5])), rtol=1e-3, atol=0)
