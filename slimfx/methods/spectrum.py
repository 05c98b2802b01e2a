"""How fast the singular values of an adapter fall, which says whether its rank is well chosen.

    s_1 >= s_2 >= ... of R L D,  D the rms of each input;  sum_(i <= k) s_i^2 / |E D|^2

with E the error of the weight without its adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Of the rank, at which the sum is taken."""


def energy(matrix: Tensor, rms: Tensor) -> float:
    """E|M x|^2 of a matrix M [N, K] for uncorrelated inputs of that rms [K]."""
    squares = matrix.to(torch.float64, copy=True).square_()
    return (squares.sum(dim=0) @ rms.double().square()).item()


def spectrum(whole: float, L: Tensor, R: Tensor, rms: Tensor) -> tuple[float, ...]:
    """What the leading ranks of an adapter R L take up of an error of `whole` energy, one figure
    for each of `SHARES`, in shares of it.
    """
    left, right = (torch.linalg.qr(side).R for side in (R.double(), (L.double() * rms.double()).T))
    energies = torch.linalg.svdvals(left @ right.T).square().cumsum(0) / max(whole, 1e-300)
    return tuple(energies[max(1, int(share * len(energies))) - 1].item() for share in SHARES)
