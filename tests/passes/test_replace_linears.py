"""replace_linears: nodes before and after, the same answers, and nothing of the float weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import (
    Chain,
    InOut,
    Mlp,
    OutIn,
    Rows,
    Tied,
    aten,
    bits,
    capture_rows,
    count,
    normal,
)
from slimfx.passes.find_linears import find_linears
from slimfx.passes.replace_linears import replace_linears
from slimfx.runtime.ops import linear_24, linear_int4
from slimfx.runtime.pack import Packed24, PackedInt4, PackedLinear, pack_24, pack_nibbles
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.functional import linear, relu

import slimfx

op_24 = torch.ops.slimfx.linear_24.default
op_int4 = torch.ops.slimfx.linear_int4.default


def sparse(seed: int, N: int, K: int) -> Packed24:
    """A 2:4 weight of random codes."""
    codes = (normal(seed, N, K) * 3).round().clamp(-7, 7).to(torch.int8)
    codes.view(N, K // 4, 4)[..., ::2] = 0
    values, indices = pack_24(codes)
    return Packed24(values, indices, torch.full((1, 1), 0.07, dtype=torch.bfloat16))


def dense(seed: int, N: int, K: int, group: int = 8) -> PackedInt4:
    """A dense int4 matrix of random codes, with a scale for each group."""
    codes = (normal(seed, N, K) * 3).round().clamp(-7, 7).to(torch.int8)
    scale = normal(seed + 1, N, -(-K // group)).abs().to(torch.bfloat16) / 20
    return PackedInt4(pack_nibbles(codes), scale, group)


def weight_of(matrix: Packed24 | PackedInt4 | Tensor, width: int) -> Tensor:
    """The float matrix behind a stored one, from what its op does to the unit vectors."""
    unit = torch.eye(width)
    if isinstance(matrix, Packed24):
        return linear_24(unit, matrix.values, matrix.indices, matrix.scale).T
    if isinstance(matrix, PackedInt4):
        return linear_int4(unit, matrix.codes, matrix.scale, matrix.group).T
    return matrix.float()


FORMS = ["sparse", "sparse with bfloat16 adapter", "sparse with int4 adapter", "dense int4"]


def packed_linear(form: str, seed: int, N: int, K: int) -> PackedLinear:
    main = dense(seed, N, K) if form == "dense int4" else sparse(seed, N, K)
    if form == "sparse with bfloat16 adapter":
        L, R = (normal(seed + i, *shape).bfloat16() for i, shape in enumerate([(3, K), (N, 3)]))
        return PackedLinear(main, L / 9, R / 9)
    if form == "sparse with int4 adapter":
        return PackedLinear(main, dense(seed + 1, 3, K), dense(seed + 2, N, 3))
    return PackedLinear(main, None, None)


def full(packed: PackedLinear, N: int, K: int) -> Tensor:
    W = weight_of(packed.weight, K)
    if packed.L is None:
        return W
    L = weight_of(packed.L, K)
    return W + weight_of(packed.R, len(L)) @ L


def pack_all(program: ExportedProgram, form: str) -> dict[str, PackedLinear]:
    return {
        site.name: packed_linear(form, 10 * i, site.out_features, site.in_features)
        for i, site in enumerate(find_linears(program))
    }


@pytest.mark.parametrize("form", FORMS)
def test_both_linears_of_an_mlp_are_replaced_with_their_bias(form: str) -> None:
    model = Mlp().eval()
    program = capture_rows(model, 4, 16)
    packed = pack_all(program, form)
    small = replace_linears(program, find_linears(program), packed)
    x = normal(1, 6, 16)
    W1, W2 = full(packed["first"], 32, 16), full(packed["second"], 8, 32)
    hidden = relu(linear(x, W1, model.first.bias))
    expected = linear(hidden, W2, model.second.bias)
    torch.testing.assert_close(small.module()(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "nodes"),
    [
        ("sparse", {op_24: 2, aten.add.Tensor: 2}),
        ("sparse with bfloat16 adapter", {op_24: 2, aten.linear.default: 4, aten.to.dtype: 4}),
        ("sparse with int4 adapter", {op_24: 2, op_int4: 4, aten.add.Tensor: 4}),
        ("dense int4", {op_int4: 2, aten.add.Tensor: 2}),
    ],
)
def test_the_nodes_of_each_form_are_counted(form: str, nodes: dict) -> None:
    program = capture_rows(Mlp(), 4, 16)
    assert count(program, aten.linear.default) == 2
    small = replace_linears(program, find_linears(program), pack_all(program, form))
    counted = {op: count(small, op) for op in nodes}
    assert counted == nodes
    total = sum(n.op == "call_function" for n in small.graph.nodes)
    bias = 0 if aten.add.Tensor in nodes else 4
    assert total == 1 + sum(nodes.values()) + bias  # 1 for the ReLU between


@pytest.mark.parametrize("model", [Rows, Mlp, InOut, OutIn, Tied])
def test_the_float_weights_and_their_placeholders_are_gone(model: type[nn.Module]) -> None:
    program = capture_rows(model(), 4, 16)
    sites = find_linears(program)
    small = replace_linears(program, sites, pack_all(program, "sparse"))
    left = set(small.state_dict)
    assert not left & {site.fqn for site in sites}
    assert all(t.dim() < 2 for name, t in small.state_dict.items() if ".slim_" not in name)
    held = {f"{s.fqn.removesuffix('.weight')}.slim_{p}" for s in sites for p in PARTS}
    biases = {name for name in program.state_dict if program.state_dict[name].dim() == 1}
    assert left == held | biases


PARTS = ("values", "indices", "scale")


@pytest.mark.parametrize("model", [InOut, OutIn])
def test_no_transpose_of_a_replaced_weight_is_left_over(model: type[nn.Module]) -> None:
    program = capture_rows(model(), 4, 16)
    small = replace_linears(program, find_linears(program), pack_all(program, "sparse"))
    called = [str(n.target) for n in small.graph.nodes if n.op == "call_function"]
    assert sorted(called) == [
        "aten.add.Tensor",
        "aten.relu.default",
        "slimfx.linear_24.default",
        "slimfx.linear_24.default",
    ]


def test_only_the_named_sites_are_replaced() -> None:
    program = capture_rows(Mlp(), 4, 16)
    packed = pack_all(program, "sparse")
    del packed["first"]
    small = replace_linears(program, find_linears(program), packed)
    assert (count(small, op_24), count(small, aten.linear.default)) == (1, 1)
    assert bits(small.state_dict["first.weight"]) == bits(program.state_dict["first.weight"])
    assert "second.weight" not in small.state_dict


def test_a_linear_that_is_an_output_hands_its_place_to_the_new_node() -> None:
    program = torch.export.export(TwoAnswers(), (normal(1, 4, 16),))
    small = replace_linears(program, find_linears(program), pack_all(program, "sparse"))
    output = next(n for n in small.graph.nodes if n.op == "output").args[0]
    names = [spec.arg.name for spec in small.graph_signature.output_specs]
    assert names == [node.name for node in output] and names[0] == names[1]
    assert output[0].target is aten.add.Tensor
    found = small.module()(normal(1, 4, 16))
    assert list(found) == ["one", "two"] and torch.equal(found["one"], found["two"])


class TwoAnswers(nn.Module):
    """One linear, answered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.a(x)
        return {"one": y, "two": y}


def test_two_uses_of_a_weight_read_the_same_stored_tensors() -> None:
    program = capture_rows(Tied(), 4, 16)
    small = replace_linears(program, find_linears(program), pack_all(program, "sparse"))
    first, second, other = (n for n in small.graph.nodes if n.target is op_24)
    assert first.args[1:] == second.args[1:] != other.args[1:]
    assert sum("a.slim_" in name for name in small.state_dict) == 3


def test_stored_tensors_are_lifted_buffers_between_the_parameters_and_the_inputs() -> None:
    program = capture_rows(Mlp(), 4, 16)
    small = replace_linears(program, find_linears(program), pack_all(program, "sparse"))
    specs = small.graph_signature.input_specs
    placeholders = [n.name for n in small.graph.nodes if n.op == "placeholder"]
    assert [spec.arg.name for spec in specs] == placeholders
    kinds = [spec.kind for spec in specs]
    assert kinds == [InputKind.PARAMETER] * 2 + [InputKind.BUFFER] * 6 + [InputKind.USER_INPUT]
    assert all(spec.persistent for spec in specs if spec.kind is InputKind.BUFFER)
    assert set(small.graph_signature.buffers) == {n for n in small.state_dict if ".slim_" in n}
    for spec in specs[:-1]:
        node = next(n for n in small.graph.nodes if n.name == spec.arg.name)
        stored, value = small.state_dict[spec.target], node.meta["val"]
        assert (value.shape, value.dtype) == (stored.shape, stored.dtype)


@pytest.mark.parametrize("form", FORMS)
def test_every_new_node_knows_its_value_and_the_module_it_stands_for(form: str) -> None:
    program = slimfx.capture(Chain(nn.Linear(16, 24), nn.Linear(24, 8)), (normal(1, 4, 16),))
    size = next(n for n in program.graph.nodes if n.name == "x").meta["val"].shape[0]
    small = replace_linears(program, find_linears(program), pack_all(program, form))
    new = [n for n in small.graph.nodes if n.op == "call_function"]
    assert len(new) > 2
    for node in new:
        path = next(reversed(node.meta["nn_module_stack"].values()))[0]
        assert path in ("layers.0", "layers.1")
        if node.target is not aten.to.dtype:
            assert str(node.meta["val"].shape[0]) == str(size)
        if node.target is aten.add.Tensor:
            assert node.meta["val"].shape[1] == {"layers.0": 24, "layers.1": 8}[path]


def test_a_double_program_multiplies_in_double() -> None:
    program = torch.export.export(Mlp().double(), (normal(1, 4, 16).double(),))
    form = "sparse with bfloat16 adapter"
    small = replace_linears(program, find_linears(program), pack_all(program, form))
    assert small.module()(normal(1, 4, 16).double()).dtype is torch.float64
    new = [n for n in small.graph.nodes if n.op == "call_function"]
    assert {n.meta["val"].dtype for n in new} == {torch.float64}


def test_the_given_program_is_unchanged() -> None:
    program = capture_rows(Tied(), 4, 16)
    before = (str(program.graph), str(program.graph_signature), list(program.state_dict))
    memory = {name: (t.data_ptr(), bits(t)) for name, t in program.state_dict.items()}
    replace_linears(program, find_linears(program), pack_all(program, "sparse"))
    assert (str(program.graph), str(program.graph_signature), list(program.state_dict)) == before
    assert {n: (t.data_ptr(), bits(t)) for n, t in program.state_dict.items()} == memory


def test_names_that_become_equal_in_the_graph_stay_apart(tmp_path: Path) -> None:
    x = normal(1, 4, 16)
    for model in (Underscores(), Cases()):
        program = torch.export.export(model.eval(), (x,))
        packed = pack_all(program, "sparse")
        assert len(packed) == 2
        small = replace_linears(program, find_linears(program), packed)
        W1, W2 = (full(each, 16, 16) for each in packed.values())
        one, two = (site.uses[0].bias for site in find_linears(program))
        biases = {s.arg.name: program.state_dict[s.target] for s in _parameters(program)}
        expected = linear(linear(x, W1, biases[one.name]), W2, biases[two.name])
        torch.testing.assert_close(small.module()(x), expected, rtol=1e-5, atol=1e-5)
        slimfx.save(small, tmp_path / "small.pt2")
        loaded = slimfx.load(tmp_path / "small.pt2").module()
        torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)


def _parameters(program: ExportedProgram) -> list:
    specs = program.graph_signature.input_specs
    return [spec for spec in specs if spec.kind is InputKind.PARAMETER]


class Underscores(nn.Module):
    """`x.y` and `x_y`."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Module()
        self.x.y = nn.Linear(16, 16)
        self.x_y = nn.Linear(16, 16)

    def forward(self, data: Tensor) -> Tensor:
        return self.x_y(self.x.y(data))


class Cases(nn.Module):
    """`a` and `A`."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.A = nn.Linear(16, 16)

    def forward(self, data: Tensor) -> Tensor:
        return self.A(self.a(data))


class Builtins(nn.Module):
    """Inputs that are named like functions of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8)

    def forward(self, input: Tensor, id: Tensor, max: Tensor) -> Tensor:
        return self.a(input * id + max)


def test_inputs_keep_the_names_they_share_with_builtins() -> None:
    inputs = {name: normal(i, 4, 16) for i, name in enumerate(("input", "id", "max"))}
    program = torch.export.export(Builtins(), (), inputs)
    packed = pack_all(program, "sparse with bfloat16 adapter")
    small = replace_linears(program, find_linears(program), packed)
    assert small.graph_signature.user_inputs == program.graph_signature.user_inputs
    x = inputs["input"] * inputs["id"] + inputs["max"]
    expected = linear(x, full(packed["a"], 8, 16), program.state_dict["a.bias"])
    torch.testing.assert_close(small.module()(**inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_program_can_be_compressed_in_two_steps() -> None:
    program = capture_rows(Mlp(), 4, 16)
    packed = pack_all(program, "sparse with int4 adapter")
    first = replace_linears(program, find_linears(program)[:1], packed)
    both = replace_linears(first, find_linears(first), packed)
    at_once = replace_linears(program, find_linears(program), packed)
    x = normal(1, 6, 16)
    assert torch.equal(both.module()(x), at_once.module()(x))
    assert set(both.state_dict) == set(at_once.state_dict)
