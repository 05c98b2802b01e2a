"""n:m masks: exactly n of every m, the largest scores, ties to the lower index."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfx.methods.masks import keep_largest


def reference(score: Tensor, n: int, m: int) -> list[list[bool]]:
    """Sort the columns of each m by score, then index; the first n stay."""
    rows = []
    for row in score.double().tolist():
        kept: set[int] = set()
        for start in range(0, len(row), m):
            order = sorted(range(start, start + m), key=lambda j: (-row[j], j))
            kept.update(order[:n])
        rows.append([j in kept for j in range(len(row))])
    return rows


@st.composite
def scores(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Small integer scores, so that ties are common, in any shape and any n:m."""
    m = draw(st.integers(2, 9))
    n = draw(st.integers(1, m - 1))
    N, K = draw(st.integers(1, 5)), m * draw(st.integers(1, 5))
    flat = draw(st.lists(st.integers(0, 4), min_size=N * K, max_size=N * K))
    return torch.tensor(flat, dtype=torch.float32).reshape(N, K), n, m


@settings(max_examples=80, deadline=None, derandomize=True)
@given(scores())
def test_equals_the_sort_of_each_group_for_any_n_m_and_shape(case: tuple[Tensor, int, int]) -> None:
    score, n, m = case
    mask = keep_largest(score, n=n, m=m)
    assert mask.dtype == torch.bool
    assert mask.tolist() == reference(score, n, m)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(scores())
def test_keeps_exactly_n_of_every_m(case: tuple[Tensor, int, int]) -> None:
    score, n, m = case
    per_group = keep_largest(score, n=n, m=m).unflatten(1, (-1, m)).sum(-1)
    assert per_group.unique().tolist() == [n]


def test_keeps_the_lower_index_of_equal_scores() -> None:
    mask = keep_largest(torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]), n=2, m=4)
    assert mask.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_score_does_not_change_the_order(dtype: torch.dtype) -> None:
    score = torch.randint(0, 100, (7, 24)).float()
    assert torch.equal(keep_largest(score.to(dtype), n=3, m=8), keep_largest(score, n=3, m=8))


def test_a_width_that_is_no_multiple_of_m_is_refused() -> None:
    with pytest.raises(RuntimeError):
        keep_largest(torch.ones(2, 10), n=2, m=4)


def test_leaves_the_scores_as_they_were() -> None:
    score = torch.randn(3, 8)
    before = score.clone()
    keep_largest(score, n=2, m=4)
    assert torch.equal(score, before)
