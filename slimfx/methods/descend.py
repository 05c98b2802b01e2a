"""Cyclic descent on integer codes: each step replaces a few codes by the best ones, all else fixed.

The error of a row is (t - q) H (t - q)^T. For the columns g of one group, with the others fixed, it
is the small quadratic  q_g H_gg q_g^T - 2 c q_g^T,  c = ((t - q) H)_g + q_g H_gg.  A step can only
lower it. One code at a time is QuantEase (Behdin et al. 2023); here 2:4 groups also choose anew
which two of the four weights stay, by trying all six pairs.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from slimfx.methods.quantized import Quantized, largest_code, spread

_BLOCK = 64  # columns updated together before the rest of the row is


def descend(
    target: Tensor, H: Tensor, start: Quantized, *, bits: int, n: int, m: int, sweeps: int
) -> Quantized:
    """Better codes for target [N, K] under the damped covariance H [K, K], scales as they are.

    n:m = 2:4 moves the mask; any other keeps the zeros that are there.
    """
    T = target.float()
    N, K = T.shape
    step = spread(start.scale.float(), start.group, K).expand(N, K)
    codes = start.codes.float()
    moving = (n, m) == (2, 4)
    keep = torch.ones_like(codes) if n == m else (codes != 0).float()
    for _ in range(sweeps):
        gradient = (T - codes * step) @ H
        for begin in range(0, K, _BLOCK):
            end = min(begin + _BLOCK, K)
            H_in, s = H[begin:end, begin:end], step[:, begin:end]
            before = codes[:, begin:end].clone()
            inside = gradient[:, begin:end].clone()
            for i in range(0, end - begin, 4 if moving else 1):
                here = slice(i, i + (4 if moving else 1))
                old = codes[:, begin:end][:, here]
                c = inside[:, here] + (old * s[:, here]) @ H_in[here, here]
                if moving:
                    new = _best_pair(c, H_in[here, here], s[:, here], old, largest_code(bits))
                else:
                    new = _nearest(c, H_in[i, i], s[:, here], largest_code(bits))
                    new = new * keep[:, begin:end][:, here]
                inside -= ((new - old) * s[:, here]) @ H_in[here]
                codes[:, begin:end][:, here] = new
            gradient -= ((codes[:, begin:end] - before) * s) @ H[begin:end]
    return Quantized(codes.to(torch.int8), start.scale, start.group)


def _nearest(c: Tensor, h: Tensor, s: Tensor, top: int) -> Tensor:
    """The code that minimises h (s q)^2 - 2 c s q."""
    return torch.where(s > 0, c / (h * s), 0.0).round().clamp(-top, top)


def _best_pair(c: Tensor, h: Tensor, s: Tensor, old: Tensor, top: int) -> Tensor:
    """The best two non-zero codes of four, [N, 4]; `old` where nothing is better.

    For each pair the free optimum of one weight is rounded and the other follows, in both orders.
    """
    pairs = torch.tensor(list(combinations(range(4), 2)), device=c.device)
    pairs = torch.cat([pairs, pairs.flip(1)])  # the first of a pair is rounded first
    a, b = pairs[:, 0], pairs[:, 1]
    haa, hab, hbb = h[a, a], h[a, b], h[b, b]
    ca, cb, sa, sb = c[:, a], c[:, b], s[:, a], s[:, b]
    free = (ca * hbb - cb * hab) / (haa * hbb - hab * hab)
    qa = torch.where(sa > 0, free / sa, 0.0).round().clamp(-top, top)
    qb = _nearest(cb - qa * sa * hab, hbb, sb, top)
    wa, wb = qa * sa, qb * sb
    value = haa * wa * wa + 2 * hab * wa * wb + hbb * wb * wb - 2 * (ca * wa + cb * wb)
    best, which = value.min(1)
    new = torch.zeros_like(old)
    new.scatter_(1, a[which, None], qa.gather(1, which[:, None]))
    new.scatter_(1, b[which, None], qb.gather(1, which[:, None]))
    w = old * s
    stay = ((w @ h) * w).sum(1) - 2 * (w * c).sum(1)
    return torch.where((best < stay)[:, None], new, old)
