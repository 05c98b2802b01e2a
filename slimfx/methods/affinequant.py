"""AffineQuant's learned equivalent transform, in its diagonal form, with learned clipping.

    y = (x c) Q(W / c)^T,     c = exp(log c), positive by construction

(Ma et al. 2024, eq. 4). The paper learns a whole matrix A where its inverse can be folded into the
layer before, and the diagonal of it behind a normalization, which is OmniQuant's learned transform
(Shao et al. 2023, eq. 4). Here the inverse is a scale of the layer's input, so the diagonal it is.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from slimfx.methods.learnable import Learnable, Values, in_bfloat16
from slimfx.methods.omniquant import clipped_scale, learned_clipping, masked, rounded
from slimfx.methods.quantized import Parts, quantize


def learned_transform(
    W: Tensor, mask: Tensor | None, c: Tensor, *, bits: int, granularity: str, group: int
) -> Learnable:
    """Codes for W / c [N, K], the clipping of their scales and c [K] learned; `c` is the start."""
    scale_for = partial(clipped_scale, bits=bits, granularity=granularity, group=group)

    def scale_of(values: Values) -> tuple[Tensor, Tensor, Tensor]:
        c = in_bfloat16(values["log_c"].exp())
        return W / c, scale_for(W / c, values["gamma"]), c

    def weight(values: Values) -> Tensor:
        V, scale, c = scale_of(values)
        return rounded(V, mask, scale, bits, group) * c

    def finish(values: Values) -> tuple[Parts, Tensor | None]:
        V, scale, c = scale_of(values)
        coded = quantize(V, scale.to(torch.bfloat16), group=group, bits=bits)
        return Parts(masked(coded, mask), None, None), c.to(torch.bfloat16)

    start = learned_clipping(W, mask, bits=bits, granularity=granularity, group=group).values
    return Learnable({**start, "log_c": c.float().log()}, weight, finish)
