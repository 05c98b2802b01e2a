"""The solver's own benchmark: sane rows, and the error it is run on is the kind it claims."""

import torch

from slimfx.bench_solver import bench_solver, error_matrix


def test_the_rows_are_sane() -> None:
    told: list[tuple[float, str]] = []
    rows = bench_solver(size=256, progress=lambda share, what: told.append((share, what)))
    assert [row.name for row in rows] == ["torch.linalg.svd", "exact", "fast"]
    assert [what for _, what in told] == [row.name for row in rows]
    assert all(0 <= share < 1 for share, _ in told)
    assert all(row.seconds > 0 and row.spread >= 0 for row in rows)
    assert (rows[0].speedup, rows[0].residual, rows[0].spread) == (1, 1, 0)
    for row in rows:
        assert row.speedup == rows[0].seconds / row.seconds
        assert 1 - 1e-5 <= row.residual <= 1.005


def test_a_given_rank_is_used_and_the_seed_decides_the_matrix() -> None:
    # at full rank only rounding is left, and a share of that would be far from 1
    assert bench_solver(size=64, rank=63)[1].residual < 1.01
    assert torch.equal(error_matrix(64, 3), error_matrix(64, 3))
    assert not torch.equal(error_matrix(64, 3), error_matrix(64, 4))


def test_the_error_has_a_flat_spectrum() -> None:
    S = torch.linalg.svdvals(error_matrix(512, 0))
    assert 0.5 < S[51] / S[0] < 0.8
    assert 0.25 < S[:51].square().sum() / S.square().sum() < 0.45
