"""Masks: exactly n of every m or an exact share, the largest scores, ties to the lower index."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfx.methods import masks
from slimfx.methods.masks import NofM, Pattern, Unstructured, keep


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
    m = draw(st.integers(2, 9) | st.just(2 * masks._FEW))
    n = draw(st.integers(1, m - 1))
    N, K = draw(st.integers(1, 5)), m * draw(st.integers(1, 5))
    flat = draw(st.lists(st.integers(0, 4), min_size=N * K, max_size=N * K))
    return torch.tensor(flat, dtype=torch.float32).reshape(N, K), n, m


@settings(max_examples=80, deadline=None, derandomize=True)
@given(scores())
def test_equals_the_sort_of_each_group_for_any_n_m_and_shape(case: tuple[Tensor, int, int]) -> None:
    score, n, m = case
    mask = keep(score, NofM(n, m))
    assert mask.dtype == torch.bool
    assert mask.tolist() == reference(score, n, m)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(scores())
def test_keeps_exactly_n_of_every_m(case: tuple[Tensor, int, int]) -> None:
    score, n, m = case
    per_group = keep(score, NofM(n, m)).unflatten(1, (-1, m)).sum(-1)
    assert per_group.unique().tolist() == [n]


def test_keeps_the_lower_index_of_equal_scores() -> None:
    mask = keep(torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]), NofM(2, 4))
    assert mask.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_score_does_not_change_the_order(dtype: torch.dtype) -> None:
    score = torch.randint(0, 100, (7, 24)).float()
    assert torch.equal(keep(score.to(dtype), NofM(3, 8)), keep(score, NofM(3, 8)))


def test_a_width_that_is_no_multiple_of_m_is_refused() -> None:
    with pytest.raises(RuntimeError):
        keep(torch.ones(2, 10), NofM(2, 4))


def test_leaves_the_scores_as_they_were() -> None:
    score = torch.randn(3, 8)
    before = score.clone()
    keep(score, NofM(2, 4))
    assert torch.equal(score, before)


def share(score: Tensor, sparsity: float, scope: str) -> list[list[bool]]:
    """Sort the indices of each row, or of the layer, by score; round(share * size) go."""
    parts = score.double().tolist() if scope == "row" else [score.double().flatten().tolist()]
    kept = []
    for part in parts:
        order = sorted(range(len(part)), key=lambda j: (-part[j], j))
        stay = order[: len(part) - round(sparsity * len(part))]
        kept += [j in stay for j in range(len(part))]
    return torch.tensor(kept).view(score.shape).tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scores(), st.floats(0.01, 0.99), st.sampled_from(["row", "layer"]))
def test_equals_the_sort_of_each_row_or_layer_for_any_share(
    case: tuple[Tensor, int, int], sparsity: float, scope: str
) -> None:
    score, pattern = case[0], Unstructured(sparsity, scope)
    mask = keep(score, pattern)
    assert mask.tolist() == share(score, sparsity, scope)
    assert mask.sum().item() == pattern.kept(*score.shape)


def test_the_share_of_a_layer_may_differ_between_rows_that_of_a_row_may_not() -> None:
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert keep(score, Unstructured(0.5, "layer")).sum(1).tolist() == [0, 4]
    assert keep(score, Unstructured(0.5, "row")).sum(1).tolist() == [2, 2]


def test_no_pattern_keeps_all() -> None:
    assert keep(torch.zeros(2, 3), None).all()


@pytest.mark.parametrize(
    ("pattern", "density", "kept"),
    [
        (NofM(2, 4), 0.5, 16),
        (NofM(1, 8), 0.125, 4),
        (Unstructured(0.3), 0.7, 24),  # 8 - round(2.4) in each of 4 rows
        (Unstructured(0.3, "layer"), 0.7, 22),  # 32 - round(9.6)
        (Unstructured(0.999), 0.001, 0),
    ],
    ids=str,
)
def test_a_pattern_says_how_many_stay(pattern: Pattern, density: float, kept: int) -> None:
    assert pattern.density == pytest.approx(density)
    assert pattern.kept(4, 8) == kept
    assert keep(torch.randn(4, 8), pattern).sum().item() == kept
