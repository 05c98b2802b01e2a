"""The two ops against loops in float64, against torch's own checks, and through torch.export."""

import itertools
import math

import pytest
import slimfx.runtime.ops
import torch
from slimfx.runtime.ops import REFERENCES
from slimfx.runtime.pack import pack_24, pack_nibbles
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

OPS = torch.ops.slimfx
LEADING = [(0,), (1,), (3,), (17,), (), (2, 3), (2, 0), (2, 1, 3)]
FORMS = ["tensor", "channel", "group"]
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 2**-7}
"""Of sum_j |x_j| |W_ij|; 1.4e-7 and 2^-7.4 seen, where 2^-24 and 2^-8 are half a unit."""


def sparse_codes(N: int, K: int) -> Tensor:
    """Random codes with two of every four at random positions."""
    codes = torch.randint(-7, 8, (N, K // 4, 4), dtype=torch.int8)
    drop = torch.rand(N, K // 4, 4).argsort(-1)[..., :2]
    return codes.scatter(-1, drop, 0).reshape(N, K)


def scale_of(form: str, N: int, K: int, group: int) -> Tensor:
    """A random bfloat16 scale of one of the three forms."""
    shape = {"tensor": (1, 1), "channel": (N, 1), "group": (N, math.ceil(K / group))}[form]
    return (torch.rand(shape) + 0.5).to(torch.bfloat16)


def weight(codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """codes[i, j] * scale[i, j // group] one by one in float64."""
    W = torch.zeros(codes.shape, dtype=torch.float64)
    for i, j in itertools.product(*map(range, codes.shape)):
        row = i if scale.shape[0] > 1 else 0
        W[i, j] = codes[i, j].item() * scale[row, j // group if scale.shape[1] > 1 else 0].item()
    return W


def assert_multiplies(y: Tensor, x: Tensor, W: Tensor) -> None:
    """y is x W^T up to the rounding of its dtype."""
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], len(W))
    expected, size = x.double() @ W.T, x.double().abs() @ W.abs().T
    assert ((y.double() - expected).abs() <= TOLERANCE[x.dtype] * size + 1e-30).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("N", "K"), [(5, 16), (1, 4), (8, 12)])
def test_the_sparse_op_is_x_times_the_weight(dtype: torch.dtype, form: str, N: int, K: int) -> None:
    codes, scale = sparse_codes(N, K), scale_of(form, N, K, 4)
    for leading in LEADING:
        x = torch.randn(*leading, K).to(dtype)
        y = OPS.linear_24(x, *pack_24(codes), scale)
        assert_multiplies(y, x, weight(codes, scale, 4))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("N", "K", "group"), [(5, 13, 4), (1, 1, 1), (7, 16, 8), (3, 9, 128)])
def test_the_dense_op_is_x_times_the_weight(
    dtype: torch.dtype, form: str, N: int, K: int, group: int
) -> None:
    codes = torch.randint(-7, 8, (N, K), dtype=torch.int8)
    scale = scale_of(form, N, K, group)
    for leading in LEADING:
        x = torch.randn(*leading, K).to(dtype)
        y = OPS.linear_int4(x, pack_nibbles(codes), scale, group)
        assert_multiplies(y, x, weight(codes, scale, group))


def test_a_zero_scale_gives_zero() -> None:
    zero = torch.zeros(1, 1, dtype=torch.bfloat16)
    x = torch.randn(3, 8)
    assert not OPS.linear_24(x, *pack_24(sparse_codes(4, 8)), zero).any()
    assert not OPS.linear_int4(x, pack_nibbles(sparse_codes(4, 8)), zero, 8).any()


def samples(dtype: torch.dtype, leading: tuple[int, ...]) -> list[tuple]:
    """(op, arguments) of both ops for every form of scale, and an x that is not contiguous."""
    found: list[tuple] = []
    for form in FORMS:
        x = torch.randn(*leading, 16, 2).to(dtype)[..., 0]
        sparse = (*pack_24(sparse_codes(5, 16)), scale_of(form, 5, 16, 8))
        found.append((OPS.linear_24.default, (x, *sparse)))
        codes = pack_nibbles(torch.randint(-7, 8, (5, 13), dtype=torch.int8))
        dense = (codes, scale_of(form, 5, 13, 4), 4)
        found.append((OPS.linear_int4.default, (x[..., :13], *dense)))
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("leading", [(3,), (0,), (), (2, 3)])
def test_torch_finds_schema_shape_rule_and_tracing_sound(
    dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    for op, arguments in samples(dtype, leading):
        torch.library.opcheck(op, arguments)


def test_both_ops_are_tagged_as_safe_to_trace() -> None:
    assert set(REFERENCES) == {OPS.linear_24.default, OPS.linear_int4.default}
    assert all(torch.Tag.pt2_compliant_tag in op.tags for op in REFERENCES)


SPARSE = (torch.zeros(5, 4, dtype=torch.uint8), torch.zeros(5, 2, dtype=torch.uint8))
CODES = torch.zeros(5, 7, dtype=torch.uint8)
"""Of a dense weight [5, 13] or [5, 14]."""


def scales(N: int, G: int) -> Tensor:
    return torch.ones(N, G, dtype=torch.bfloat16)


WRONG = {
    "sparse, K": (OPS.linear_24, (torch.zeros(3, 12), *SPARSE, scales(1, 1))),
    "sparse, indices": (OPS.linear_24, (torch.zeros(3, 16), SPARSE[0], SPARSE[0], scales(1, 1))),
    "sparse, rows of scale": (OPS.linear_24, (torch.zeros(3, 16), *SPARSE, scales(4, 1))),
    "sparse, groups of scale": (OPS.linear_24, (torch.zeros(3, 16), *SPARSE, scales(5, 3))),
    "dense, K too long": (OPS.linear_int4, (torch.zeros(3, 16), CODES, scales(1, 1), 8)),
    "dense, K too short": (OPS.linear_int4, (torch.zeros(3, 11), CODES, scales(1, 1), 8)),
    "dense, rows of scale": (OPS.linear_int4, (torch.zeros(3, 13), CODES, scales(4, 1), 8)),
    "dense, groups of scale": (OPS.linear_int4, (torch.zeros(3, 13), CODES, scales(5, 3), 4)),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_shape_rule_refuses_what_does_not_fit(case: str) -> None:
    op, arguments = WRONG[case]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        with pytest.raises(RuntimeError, match="linear_"):
            op(*fakes)


@pytest.mark.parametrize("case", WRONG)
def test_the_op_itself_refuses_what_does_not_fit(case: str) -> None:
    op, arguments = WRONG[case]
    with pytest.raises(RuntimeError):
        op(*arguments)


class Pair(torch.nn.Module):
    """Both ops, one after the other: [*, 16] to [*, 5]."""

    def __init__(self) -> None:
        super().__init__()
        values, indices = pack_24(sparse_codes(13, 16))
        self.register_buffer("values", values)
        self.register_buffer("indices", indices)
        self.register_buffer("scale", scale_of("group", 13, 16, 8))
        self.register_buffer("codes", pack_nibbles(torch.randint(-7, 8, (5, 13)).to(torch.int8)))
        self.register_buffer("scales", scale_of("group", 5, 13, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ops.slimfx.linear_24(x, self.values, self.indices, self.scale)
        return torch.ops.slimfx.linear_int4(hidden, self.codes, self.scales, 4)


def slim_nodes(program: torch.export.ExportedProgram) -> list[str]:
    """The calls of slimfx ops, in order."""
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [target for target in targets if "slimfx" in target]


@pytest.fixture
def exported() -> tuple[Pair, torch.export.ExportedProgram]:
    module = Pair()
    batch = torch.export.Dim("batch", min=0, max=64)
    return module, torch.export.export(module, (torch.randn(3, 16),), dynamic_shapes=({0: batch},))


def test_export_keeps_the_ops_opaque(exported: tuple[Pair, torch.export.ExportedProgram]) -> None:
    module, program = exported
    assert slim_nodes(program) == ["slimfx.linear_24.default", "slimfx.linear_int4.default"]
    assert sum(node.op == "call_function" for node in program.graph.nodes) == 2
    for batch in (1, 3, 17):
        x = torch.randn(batch, 16)
        assert torch.equal(program.module()(x), module(x))


def test_the_decompositions_leave_no_op_of_slimfx(
    exported: tuple[Pair, torch.export.ExportedProgram],
) -> None:
    module, program = exported
    plain = program.run_decompositions(REFERENCES)
    assert slim_nodes(plain) == []
    assert "aten.linear.default" in {str(node.target) for node in plain.graph.nodes}
    for batch in (1, 3, 17):
        x = torch.randn(batch, 16)
        torch.testing.assert_close(plain.module()(x), module(x), rtol=1e-6, atol=1e-5)


def test_the_compiler_sees_through_the_shape_rule() -> None:
    module = Pair()
    run = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (3, 5):
        x = torch.randn(batch, 16)
        assert torch.equal(run(x), module(x))


def test_the_references_are_plain_functions_with_the_answer_of_the_op() -> None:
    for op, arguments in samples(torch.float32, (3,)):
        assert torch.equal(REFERENCES[op](*arguments), op(*arguments))
    assert slimfx.runtime.ops.linear_24 is REFERENCES[OPS.linear_24.default]
