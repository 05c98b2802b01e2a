"""From a score per weight to a mask that keeps exactly n of every m along the inputs."""

import torch
from torch import Tensor


def keep_largest(score: Tensor, *, n: int, m: int) -> Tensor:
    """Boolean mask [N, K] with the n largest scores of every m along K; ties go to the lower index.

    K must be a multiple of m.
    """
    order = score.unflatten(1, (-1, m)).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :n], True).flatten(1)
