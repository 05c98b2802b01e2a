"""Read GPTQ weights: symmetric codes of 4 or 8 bits, inputs in their own order.

    X.qweight int32 [K bits / 32, N]       code + 2^(bits-1), the first input in the lowest bits
    X.qzeros  int32 [K / group, N bits / 32]
    X.scales  [K / group, N], X.g_idx int32 [K]

The zero point of a symmetric weight is 2^(bits-1). The first format stores it less one, the second
(checkpoint_format "gptq_v2") as it is; writers of the first that left the one out are understood
where the checkpoint says sym.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from slimfx.runtime.checkpoints.linears import (
    ForeignLinear,
    Found,
    checked_bits,
    group_of,
    in_bfloat16,
    take,
    take_floats,
)
from slimfx.runtime.int_weights import from_words, stored_codes
from slimfx.runtime.pack import PackedLinear
from torch import Tensor

from slimfx.errors import ArtifactError

_PACKED = ".qweight"
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_FORMATS = ("gptq", "gptq_v2")


def read_gptq(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """The compressed linears of a folder.

    Args:
        settings: the quantization_config, or quantize_config.json.

    Raises:
        ArtifactError: another format, or weights that slimfx's layouts cannot express.
    """
    bits = checked_bits(settings.get("bits"), "GPTQ: bits")
    kind = settings.get("checkpoint_format") or "gptq"
    if kind not in _FORMATS:
        raise ArtifactError(
            f"GPTQ checkpoint_format {kind!r} is not one of {', '.join(_FORMATS)}; save it as one"
        )
    middle = 2 ** (bits - 1)
    zeros = {middle} if kind == "gptq_v2" else {middle - 1}
    if settings.get("sym"):
        zeros = {middle - 1, middle}
    names = [key.removesuffix(_PACKED) for key in tensors if key.endswith(_PACKED)]
    linears = {name: _linear(name, tensors, bits, zeros) for name in names}
    if not linears:
        raise ArtifactError("no tensor of the checkpoint ends in .qweight")
    used = frozenset(f"{name}.{part}" for name in linears for part in _PARTS)
    return Found(linears, used)


def _linear(name: str, tensors: Mapping[str, Tensor], bits: int, zeros: set[int]) -> ForeignLinear:
    words = take(tensors, f"{name}.qweight", torch.int32, -1, -1).T
    N, K = words.shape[0], words.shape[1] * 32 // bits
    scales = take_floats(tensors, f"{name}.scales", -1, N)
    group = group_of(name, K, scales.shape[0])
    _check_zeros(name, tensors, bits, zeros, scales.shape[0], N)
    order = tensors.get(f"{name}.g_idx")
    if order is not None and not torch.equal(order.long(), torch.arange(K) // group):
        raise ArtifactError(
            f"{name}: its g_idx puts inputs in another order (desc_act); slimfx's groups are "
            f"neighbours, quantize with desc_act=False"
        )
    scale, change = in_bfloat16(name, scales.T)
    matrix = stored_codes(from_words(words, bits, K), scale, bits=bits, group=group, K=K)
    return ForeignLinear(PackedLinear(matrix), (N, K), change)


def _check_zeros(
    name: str, tensors: Mapping[str, Tensor], bits: int, zeros: set[int], groups: int, N: int
) -> None:
    """Every zero point is that of a symmetric weight."""
    words = take(tensors, f"{name}.qzeros", torch.int32, groups, -(-N * bits // 32))
    stored = from_words(words, bits, N)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    each = ((stored[..., None] >> shifts) & (2**bits - 1)).flatten(1)[:, :N]
    found = set(each.unique().tolist())
    if len(found) != 1 or not found <= zeros:
        raise ArtifactError(
            f"{name}: its zero points are stored as {sorted(found)[:4]}, not all as "
            f"{' or '.join(map(str, sorted(zeros)))}: an asymmetric weight, which slimfx's layouts "
            f"cannot express; quantize with sym=True"
        )
