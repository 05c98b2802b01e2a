"""The emulation of inline PTX agrees with CUTLASS's layout of metadata, and sees mistakes."""

import numpy as np
import ptx
import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

SPARSE = """{
mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32
{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9, $10, $11}, {$12, $13, $14, $15}, $16, SELECTOR; }"""
KINDS = ",".join(["=f"] * 4 + ["r"] * 8 + ["f"] * 4 + ["r"] * 4)
FLOAT, INT = np.dtype(np.float32), np.dtype(np.int32)


def words(values: torch.Tensor) -> np.ndarray:
    """Pairs of bfloat16 [..., 2] as int32 [...]."""
    return values.contiguous().view(torch.int32)[..., 0].numpy()


@pytest.mark.parametrize("selector", [0, 1])
def test_sparse_products_take_metadata_as_cutlass_stores_it(selector: int) -> None:
    """32 rows of a word's lanes, of which each selector takes 16."""
    order = torch.rand(32, 8, 4).argsort(-1)
    weight = (torch.randint(1, 8, (32, 32)) * (order < 2).flatten(1)).bfloat16()
    kept, meta = sparse_semi_structured_from_dense_cutlass(weight)
    mine = kept[16 * selector : 16 * selector + 16]
    x = torch.randn(8, 32).bfloat16()
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    a = [words(mine[g + 8 * (j % 2)].view(32, 8, 2)[lane, t + 4 * (j // 2)]) for j in range(4)]
    b = [words(x[g].view(32, 16, 2)[lane, t + 4 * j]) for j in range(4)]
    word = meta.contiguous().view(torch.int32).flatten().numpy()
    given = [np.stack(a, 1), np.stack(b, 1), np.zeros((32, 4), np.float32)]
    given.append(np.repeat(word[:, None], 4, 1))
    (c,) = ptx.run(SPARSE.replace("SELECTOR", f"0x{selector}"), KINDS, given, [FLOAT], 4)
    wanted = (weight[16 * selector : 16 * selector + 16].double() @ x.double().T).numpy()
    for i in range(4):
        got = c[:, i]
        np.testing.assert_allclose(got, wanted[g + 8 * (i // 2), 2 * t + i % 2], rtol=1e-6)


def one(asm: str, kinds: str, *values: np.ndarray, dtype: np.dtype = INT) -> np.ndarray:
    """The only result of assembly on one element a thread."""
    return ptx.run(asm, kinds, values, [dtype], 1)[0]


def test_bytes_and_bits_are_picked_as_the_isa_says() -> None:
    a, b = np.array([0x44332211], np.int32), np.array([0x08776655 - 2**31], np.int32)
    assert one("prmt.b32 $0, $1, $2, 0xF341;", "=r,r,r", a, b)[0] == np.int32(0xFF445522 - 2**32)
    assert one("lop3.b32 $0, $1, $2, 0xff, 0xEA;", "=r,r,r", a, b)[0] == 0x003322FF
    assert one("shr.s32 $0, $1, 40;", "=r,r", b)[0] == -1
    assert one("shr.u32 $0, $1, 31;", "=r,r", b)[0] == 1


def test_numbers_are_rounded_to_nearest() -> None:
    value = np.array([1 + 2**-8, 1 + 3 * 2**-8, 255.75, -np.inf], np.float32)
    wanted = torch.from_numpy(value).bfloat16().view(torch.int16).numpy()
    bits = one("cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", value)
    assert (bits.view(np.int16)[::2] == wanted).all() and (
        bits.view(np.int16)[1::2] == wanted
    ).all()


@pytest.mark.parametrize(
    ("asm", "message"),
    [
        ("mov.b32 $0, $1; mov.b32 $0, $1;", "after an output that may be the same register"),
        ("mov.b32 t, $1;", "t is written and not declared"),
        ("{ .reg .b32 t; mov.b32 $0, t; }", "t is read before it is set"),
    ],
)
def test_mistakes_that_a_gpu_would_not_report_are_seen(asm: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        one(asm, "=r,r", np.zeros(32, np.int32))


def test_what_is_not_emulated_is_said() -> None:
    with pytest.raises(NotImplementedError, match=r"popc\.b32 is not emulated"):
        one("popc.b32 $0, $1;", "=r,r", np.zeros(1, np.int32))


def test_positions_must_ascend() -> None:
    given = [np.zeros((32, 4), kind) for kind in (np.int32, np.int32, np.float32, np.int32)]
    with pytest.raises(AssertionError, match="do not ascend"):
        ptx.run(SPARSE.replace("SELECTOR", "0x0"), KINDS, given, [FLOAT], 4)
