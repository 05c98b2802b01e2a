"""Cyclic descent on stored values: each step replaces a few by the best ones, all else fixed.

The error of a row is (t - q) H (t - q)^T. For the columns g of one group, with the others fixed, it
is the small quadratic  q_g H_gg q_g^T - 2 c q_g^T,  c = ((t - q) H)_g + q_g H_gg.  A step can only
lower it. One code at a time is QuantEase (Behdin et al. 2023); here 2:4 groups also choose anew
which two of the four weights stay, by trying all six pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from slimfx.methods.masks import NofM, Pattern, keep
from slimfx.methods.quantized import Quantized, largest_code, spread

_BLOCK = 64  # columns updated together before the rest of the row is
Choice = Callable[[int, Tensor, Tensor], Tensor]
"""(first column, ((t - q) H)_g / scale, codes) -> better codes; all [columns of the group, N]."""


def descend(
    target: Tensor,
    H: Tensor,
    start: Quantized | Tensor,
    *,
    bits: int,
    pattern: Pattern | None,
    sweeps: int,
) -> Quantized | Tensor:
    """Better values for target [N, K] under the damped covariance H [K, K], of the kind of `start`.

    Scales stay as they are; without them the values are float32 and nothing is rounded. The mask
    moves for 2:4, where the four weights share a scale. Otherwise zeros stay zeros; if there are
    more of them than the pattern asks for, the largest of the target among them may return.
    """
    T = target.float().T.contiguous()  # [K, N]: a column of the weight is one run of memory
    K, N = T.shape
    if isinstance(start, Quantized):
        values, group, top = start.codes.float(), start.group, largest_code(bits)
        scale = spread(start.scale.float(), group, K)
    else:
        values, group, top = start.float(), 1, None
        scale = T.new_ones(1, 1)
    codes = values.T.clone(memory_format=torch.contiguous_format)
    step = scale.T.expand(K, -1)
    inverse = torch.where(step > 0, 1 / step, 0.0)
    if pattern == NofM(2, 4) and (scale.shape[1] == 1 or group % 4 == 0):
        width, choose = 4, _best_pairs(H, top)
    else:
        width, choose = 1, _nearest(H, _mask(codes, T, H, pattern), top)
    for _ in range(sweeps):
        gradient = H @ (T - codes * step)
        for begin in range(0, K, _BLOCK):
            end = min(begin + _BLOCK, K)
            change = T.new_empty(end - begin, N)
            for i in range(begin, end, width):
                g, j = slice(i, i + width), i + width
                new = choose(i, gradient[g] * inverse[g], codes[g])
                moved = torch.mul(new - codes[g], step[g], out=change[i - begin : j - begin])
                codes[g] = new
                gradient[j:end].addmm_(H[j:end, g], moved, alpha=-1)
            gradient[end:].addmm_(H[end:, begin:end], change, alpha=-1)
    values = codes.T.contiguous()
    if isinstance(start, Quantized):
        return Quantized(values.to(torch.int8), start.scale, group)
    return values


def _mask(codes: Tensor, T: Tensor, H: Tensor, pattern: Pattern | None) -> Tensor:
    """The weights that may differ from zero: those that do, then the largest of the target."""
    score = T.abs() * H.diagonal().sqrt()[:, None]
    score = (codes != 0) + 0.5 * score / score.max().clamp_min(1e-30)
    return keep(score.T, pattern).T.contiguous()


def _round(q: Tensor, top: int | None) -> Tensor:
    """In place."""
    return q if top is None else q.round_().clamp_(-top, top)


def _nearest(H: Tensor, mask: Tensor, top: int | None) -> Choice:
    """One code, the nearest to the optimum."""
    h = H.diagonal()

    def choose(i: int, gradient: Tensor, old: Tensor) -> Tensor:
        return _round(gradient.div_(h[i]).add_(old), top).mul_(mask[i])

    return choose


def _best_pairs(H: Tensor, top: int | None) -> Choice:
    """The best two non-zero codes of four; the old ones where nothing is better.

    For each pair (a, b) the free optimum of a is rounded, then what is best for b.
    """
    pairs = torch.tensor(list(combinations(range(4), 2)), device=H.device).T.contiguous()
    a, b = pairs
    blocks = torch.stack([H[i : i + 4, i : i + 4] for i in range(0, len(H), 4)])
    haa, hab, hbb = blocks[:, a, a], blocks[:, a, b], blocks[:, b, b]  # [groups, 6]
    one = torch.eye(4, device=H.device)
    free = (hbb[..., None] * one[a] - hab[..., None] * one[b]) / (haa * hbb - hab * hab)[..., None]
    rows = torch.cat([free, -2 * one[a].expand_as(free), one[b] / hbb[..., None]], 1)  # [., 18, 4]
    tables = [blocks, rows, haa[..., None], -(hab / hbb)[..., None], hbb[..., None]]
    per_group = list(zip(*(table.unbind() for table in tables)))

    def choose(i: int, gradient: Tensor, old: Tensor) -> Tensor:
        block, rows, haa, ratio, hbb = per_group[i // 4]
        c = torch.addmm(gradient, block, old)
        qa, value, qb = (rows @ c).view(3, 6, -1)  # value: -2 c_a as yet, qb: c_b / h_bb
        qa = _round(qa, top)
        free = qb.addcmul(qa, ratio)
        qb = _round(qb.copy_(free), top)
        value = value.addcmul_(qa, haa).mul_(qa).addcmul_(qb.sub(free, alpha=2).mul_(qb), hbb)
        least, which = value.min(0)
        best = torch.stack([qa, qb]).gather(1, which.expand(2, 1, -1)).squeeze(1)
        new = torch.zeros_like(old).scatter_(0, pairs[:, which], best)
        stay = -gradient.add_(c).mul_(old).sum(0)
        return torch.where(least < stay, new, old)

    return choose
