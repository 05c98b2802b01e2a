"""The joint method: better than its parts, with adapters stored either way."""

import pytest
import torch
from torch import Tensor

from slimfx.methods.stats import add_tokens, empty_stats
from slimfx.recipe import PRESETS, Solve
from slimfx.solve import solve


def output_error(preset: str, W: Tensor, x: Tensor, rounds: int = 4) -> float:
    stats = add_tokens(empty_stats(W.shape[1], covariance=True), x)
    how = PRESETS[preset].for_layer("layer")
    assert how is not None
    if how.solve.method == "joint":
        how = type(how)(how.prune, how.quantize, how.adapter, Solve("joint", rounds=rounds))
    dense = solve("layer", W, stats, how).dense()
    return float((x @ (W - dense).T).square().sum() / (x @ W.T).square().sum())


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_joint_loses_less_than_half_of_what_slim_loses(shape: tuple[int, int]) -> None:
    W = torch.randn(shape) * torch.rand(shape[0], 1)
    x = torch.randn(2000, shape[1]) @ torch.randn(shape[1], shape[1]) / shape[1] ** 0.5
    slim, full, joint, joint_q = (
        output_error(name, W, x) for name in ("slim", "full-lora", "joint", "joint-q")
    )
    assert full <= slim
    assert joint < 0.5 * slim  # 0.2 seen
    assert joint < full
    assert joint <= joint_q < 1.3 * joint  # 1.1 seen: int4 adapters, their error taken up


def test_more_rounds_do_not_hurt_by_much_and_usually_help() -> None:
    W = torch.randn(48, 64)
    x = torch.randn(1000, 64) @ torch.randn(64, 64) / 8
    assert output_error("joint", W, x, rounds=12) < output_error("joint", W, x, rounds=2)


@pytest.mark.parametrize("weight", ["zero", "constant", "one row"])
def test_edges_are_finite(weight: str) -> None:
    W = {
        "zero": torch.zeros(8, 16),
        "constant": torch.full((8, 16), 0.3),
        "one row": torch.randn(1, 16),
    }[weight]
    stats = add_tokens(empty_stats(16, covariance=True), torch.randn(1, 16))
    how = PRESETS["joint-q"].for_layer("layer")
    assert how is not None
    assert solve("layer", W, stats, how).dense().isfinite().all()
