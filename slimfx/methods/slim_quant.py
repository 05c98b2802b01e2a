"""SLiM-Quant^W: the one scale per tensor with the smallest squared error, found exactly.

For a scale s the weight w takes code k once |w| passes the breakpoint (k - 1/2) s. With
A(s) = sum_k sum_{|w| > (k-1/2) s} |w| and B(s) = sum_k (2k - 1) #{|w| > (k-1/2) s} the squared
error is

    E(s) = sum w^2 - 2 s A(s) + s^2 B(s),     k = 1 .. 2^(bits-1) - 1

Artifacts store scales in bfloat16, so the candidates are the bfloat16 numbers themselves: one pass
counts the weights between all breakpoints of all candidates, and the best candidate is the global
optimum over everything that can be stored. A continuous optimum rounded afterwards can be worse.
A candidate has 8 significant bits and (2k - 1) / 2 has `bits`, so a breakpoint has 8 + bits of the
24 of a float32: the others cut off, |w| is at once the number of its bin.
The paper minimises the same error over a histogram (arXiv 2410.09615, eq. 4-6): slim_histogram.py.
"""

import torch
from torch import Tensor

from slimfx.methods.quantized import largest_code

_OCTAVES = 17  # how far below absmax the best scale may be: see `_candidates`
_CHUNK = 1 << 22  # weights looked at together, so that memory stays flat


def slim_quant(weight: Tensor, *, bits: int, granularity: str, group: int) -> Tensor:
    """The bfloat16 scale [1, 1] that minimises sum (w - s * code)^2 over a tensor, in float32.

    `granularity` must be "tensor" (the recipe checks it). An all-zero weight has scale zero.
    """
    magnitude = weight.detach().float().flatten().abs()
    candidates = _candidates(magnitude.max().item(), bits)
    if not len(candidates):
        return torch.zeros(1, 1, dtype=torch.bfloat16, device=weight.device)
    candidates = candidates.to(weight.device)
    codes = torch.arange(1, largest_code(bits) + 1, dtype=torch.float64, device=weight.device)
    cut = 24 - 8 - bits
    edges = (candidates[:, None] * (codes - 0.5)).float().view(torch.int32) >> cut
    lowest, highest = int(edges.min()) - 1, int(edges.max())
    counts = torch.zeros(highest - lowest + 1, dtype=torch.float64, device=weight.device)
    sums = torch.zeros_like(counts)
    for part in magnitude.split(_CHUNK):
        bins = (part.view(torch.int32) - 1) >> cut  # -1: a weight on an edge is below it
        bins = bins.clamp_(lowest, highest) - lowest
        counts += torch.bincount(bins, minlength=len(counts))
        sums += torch.bincount(bins, weights=part.double(), minlength=len(sums))
    A = _from(sums)[edges - lowest].sum(1)
    B = (_from(counts)[edges - lowest] * (2 * codes - 1)).sum(1)
    best = (candidates.square() * B - 2 * candidates * A).argmin()
    return candidates[best].to(torch.bfloat16).reshape(1, 1)


def _from(bins: Tensor) -> Tensor:
    """The sum of each bin and all above it."""
    return bins.flip(0).cumsum(0).flip(0)


def _candidates(peak: float, bits: int) -> Tensor:
    """Every normal bfloat16 that can be the best scale, ascending, as float64.

    They end just above max|w|, where only code 1 is in use, and begin 17 octaves below
    max|w| / 2^(bits-1). A smaller scale s leaves almost max|w|^2 on the largest weight. Giving that
    weight a code, and zeros to the ones that s does not clip, costs less than (2^(bits-1) s)^2 on
    each of these, so s can be the best only with more than 2^33 of them.
    """
    highest = int(torch.tensor(peak, dtype=torch.bfloat16).view(torch.int16)) + 1
    lowest = max(highest - (_OCTAVES + bits - 1) * 128, 128)
    numbers = torch.arange(lowest, max(lowest, highest), dtype=torch.int16)
    values = numbers.view(torch.bfloat16).double()
    return values[(values > 0) & values.isfinite()]
