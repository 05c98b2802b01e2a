"""replace_linears: nodes before and after, the same answers, and nothing of the float weight."""

from __future__ import annotations

import dataclasses
from collections import Counter
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
from slimfx.runtime.ops import linear_24, linear_bitmask, linear_int, quantize_fp8
from slimfx.runtime.pack import (
    Packed24,
    PackedBitmask,
    PackedDense,
    PackedLinear,
    PackedMatrix,
    pack_24,
    pack_bitmask,
    pack_codes,
)
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.functional import linear, relu

import slimfx

op_24 = torch.ops.slimfx.linear_24.default
op_int = torch.ops.slimfx.linear_int.default
op_bitmask = torch.ops.slimfx.linear_bitmask.default
op_fp8 = torch.ops.slimfx.quantize_fp8.default


def random_codes(seed: int, N: int, K: int, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    return (normal(seed, N, K) * top / 2).round().clamp(-top, top).to(torch.int8)


def sparse(seed: int, N: int, K: int) -> Packed24:
    """A 2:4 weight of random codes, one scale for all."""
    codes = random_codes(seed, N, K, 4)
    codes.view(N, K // 4, 4)[..., ::2] = 0
    scale = torch.full((1, 1), 0.07, dtype=torch.bfloat16)
    return Packed24(*pack_24(codes, 4), scale, 4, K)


def sparse_floats(seed: int, N: int, K: int) -> Packed24:
    """A 2:4 weight of bfloat16 values."""
    values = normal(seed, N, K).bfloat16() / 5
    values.view(N, K // 4, 4)[..., 1:3] = 0
    return Packed24(*pack_24(values, 16), None, 16, K)


def masked(seed: int, N: int, K: int) -> PackedBitmask:
    """Two fifths of a weight in 3 bits, one scale for each row."""
    mask = normal(seed + 1, N, K) > 0.25
    scale = normal(seed + 2, N, 1).abs().bfloat16() / 9
    return PackedBitmask(*pack_bitmask(random_codes(seed, N, K, 3) * mask, mask, 3), scale, 3, K)


def masked_floats(seed: int, N: int, K: int) -> PackedBitmask:
    """Two fifths of a weight in bfloat16."""
    mask = normal(seed + 1, N, K) > 0.25
    values = normal(seed, N, K).bfloat16() / 5 * mask
    return PackedBitmask(*pack_bitmask(values, mask, 16), None, 16, K)


def dense(seed: int, N: int, K: int, bits: int = 4, group: int = 7) -> PackedDense:
    """A dense matrix of random codes, with a scale for each group, the last one ragged."""
    scale = normal(seed + 1, N, -(-K // group)).abs().to(torch.bfloat16) / 20
    return PackedDense(pack_codes(random_codes(seed, N, K, bits), bits), scale, bits, group)


def weight_of(matrix: PackedMatrix | Tensor, width: int) -> Tensor:
    """The float matrix behind a stored one, from what its op does to the unit vectors."""
    unit = torch.eye(width)
    if isinstance(matrix, Tensor):
        return matrix.float()
    last = (matrix.scale, matrix.bits, matrix.group)
    if isinstance(matrix, Packed24):
        return linear_24(unit, matrix.values, matrix.indices, *last).T
    if isinstance(matrix, PackedBitmask):
        return linear_bitmask(unit, matrix.values, matrix.mask, *last).T
    return linear_int(unit, matrix.codes, *last).T


FORMS = {
    "sparse": sparse,
    "sparse floats": sparse_floats,
    "bitmask": masked,
    "bitmask floats": masked_floats,
    "dense": dense,
    "sparse with bfloat16 adapter": sparse,
    "sparse with int4 adapter": sparse,
    "dense with sparse adapter": dense,
    "bitmask with sparse float adapter": masked,
}


def packed_linear(form: str, seed: int, N: int, K: int) -> PackedLinear:
    main = FORMS[form](seed, N, K)
    if form == "sparse with bfloat16 adapter":
        L, R = (normal(seed + i, *shape).bfloat16() for i, shape in enumerate([(3, K), (N, 3)]))
        return PackedLinear(main, L / 9, R / 9)
    if form == "sparse with int4 adapter":
        return PackedLinear(main, dense(seed + 1, 3, K), dense(seed + 2, N, 3))
    if form == "dense with sparse adapter":
        return PackedLinear(main, sparse(seed + 1, 3, K), dense(seed + 2, N, 3))
    if form == "bitmask with sparse float adapter":
        return PackedLinear(main, sparse_floats(seed + 1, 3, K), normal(seed + 2, N, 3).bfloat16())
    return PackedLinear(main)


def full(packed: PackedLinear, N: int, K: int) -> Tensor:
    """The float weight that the layer's input meets."""
    W = weight_of(packed.weight, K)
    if packed.L is not None:
        L = weight_of(packed.L, K)
        W = W + weight_of(packed.R, len(L)) @ L
    return W if packed.input_scale is None else W * packed.input_scale.float()


def pack_all(program: ExportedProgram, form: str) -> dict[str, PackedLinear]:
    return {
        site.name: packed_linear(form, 10 * i, site.out_features, site.in_features)
        for i, site in enumerate(find_linears(program))
    }


def input_scale(seed: int, K: int) -> Tensor:
    return (normal(seed, K).abs() + 0.5).bfloat16()


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


add, product, cast, times = (
    aten.add.Tensor,
    aten.linear.default,
    aten.to.dtype,
    aten.mul.Tensor,
)
NODES: dict[str, dict] = {
    "sparse": {op_24: 2, add: 2},
    "sparse floats": {op_24: 2, add: 2},
    "bitmask": {op_bitmask: 2, add: 2},
    "bitmask floats": {op_bitmask: 2, add: 2},
    "dense": {op_int: 2, add: 2},
    "sparse with bfloat16 adapter": {op_24: 2, product: 4, cast: 4, add: 4},
    "sparse with int4 adapter": {op_24: 2, op_int: 4, add: 4},
    "dense with sparse adapter": {op_24: 2, op_int: 4, add: 4},
    "bitmask with sparse float adapter": {op_bitmask: 2, op_24: 2, product: 2, cast: 2, add: 4},
}


def called(program: ExportedProgram) -> Counter:
    """How often each op is called."""
    return Counter(node.target for node in program.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("form", FORMS)
def test_the_nodes_of_each_form_are_counted(form: str) -> None:
    program = capture_rows(Mlp(), 4, 16)
    assert called(program) == {product: 2, aten.relu.default: 1}
    small = replace_linears(program, find_linears(program), pack_all(program, form))
    assert called(small) == {**NODES[form], aten.relu.default: 1}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_scale_adds_one_product_before_each_use(form: str, dtype: torch.dtype) -> None:
    program = torch.export.export(Mlp().to(dtype).eval(), (normal(1, 4, 16).to(dtype),))
    packed = {
        name: dataclasses.replace(each, input_scale=input_scale(5, K))
        for (name, each), K in zip(pack_all(program, form).items(), (16, 32), strict=True)
    }
    small = replace_linears(program, find_linears(program), packed)
    casts = NODES[form].get(cast, 0)
    casts = casts + 2 if dtype is torch.float32 else 0  # all is stored as bfloat16 already
    assert called(small)[times] == 2 and called(small)[cast] == casts
    for node in small.graph.nodes:
        if node.target is times:
            users = {op_24, op_bitmask, op_int, product} & {user.target for user in node.users}
            assert users and node.meta["val"].dtype is dtype
    assert bits(small.state_dict["second.slim_input_scale"]) == bits(input_scale(5, 32))
    if dtype is torch.float32:
        x, (first, second) = normal(1, 4, 16), packed.values()
        state = program.state_dict
        hidden = relu(linear(x, full(first, 32, 16), state["first.bias"]))
        expected = linear(hidden, full(second, 8, 32), state["second.bias"])
        torch.testing.assert_close(small.module()(x), expected, rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    """Three linears of one input, a fourth of what they make, a fifth of the first input again."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.skip = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        y = relu(x)
        return self.o(self.q(y) * self.k(y) + self.v(y)) + self.skip(x)


def with_fp8(packed: dict[str, PackedLinear], *names: str) -> dict[str, PackedLinear]:
    return {
        name: dataclasses.replace(each, fp8=not names or name in names)
        for name, each in packed.items()
    }


@pytest.mark.parametrize("form", ["sparse", "dense with sparse adapter"])
def test_layers_that_read_the_same_input_share_its_fp8_node(form: str) -> None:
    model = Attention().eval()
    program = capture_rows(model, 4, 16)
    packed = with_fp8(pack_all(program, form))
    small = replace_linears(program, find_linears(program), packed)
    assert called(small)[op_fp8] == 3  # for relu(x), for what o reads, for x itself
    nodes = list(small.graph.nodes)
    shared = next(n for n in nodes if n.target is op_fp8 and n.args[0].target is aten.relu.default)
    readers = [n for n in shared.users if n.target in (op_24, op_int)]
    assert len(readers) == (3 if form == "sparse" else 6)
    assert nodes.index(shared) == min(map(nodes.index, readers)) - 1
    for node in nodes:
        assert all(nodes.index(source) < nodes.index(node) for source in node.all_input_nodes)

    W = {name: full(each, 16, 16) for name, each in packed.items()}
    x, state = normal(1, 6, 16), program.state_dict

    def layer(name: str, z: Tensor) -> Tensor:
        return linear(quantize_fp8(z), W[name], state[f"{name}.bias"])

    y = relu(x)
    expected = layer("o", layer("q", y) * layer("k", y) + layer("v", y)) + layer("skip", x)
    torch.testing.assert_close(small.module()(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(quantize_fp8(y), y)


def test_a_layer_without_fp8_reads_the_input_as_it_is() -> None:
    program = capture_rows(Attention().eval(), 4, 16)
    packed = with_fp8(pack_all(program, "sparse"), "k", "v")
    small = replace_linears(program, find_linears(program), packed)
    assert called(small)[op_fp8] == 1
    q, k, v = [n for n in small.graph.nodes if n.target is op_24][:3]
    assert q.args[0].target is aten.relu.default
    assert k.args[0] is v.args[0] and k.args[0].target is op_fp8


def test_what_is_rounded_is_the_scaled_input_and_that_is_not_shared() -> None:
    program = capture_rows(Attention().eval(), 4, 16)
    packed = {
        name: dataclasses.replace(each, fp8=True, input_scale=input_scale(i, 16))
        for i, (name, each) in enumerate(pack_all(program, "sparse").items())
    }
    small = replace_linears(program, find_linears(program), packed)
    assert called(small)[op_fp8] == called(small)[times] - 1 == 5
    assert all(n.args[0].target is times for n in small.graph.nodes if n.target is op_fp8)


class Crossed(nn.Module):
    """A weight whose second use reads what another layer has read before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) + self.a(y)


def test_an_fp8_node_is_there_before_its_first_use_whatever_the_order_of_the_sites() -> None:
    program = capture_rows(Crossed().eval(), 4, 16)
    packed = with_fp8(pack_all(program, "sparse"))
    sites = find_linears(program)
    for order in (sites, sites[::-1]):
        small = replace_linears(program, order, packed)
        assert called(small)[op_fp8] == 2
        x, state = normal(1, 6, 16), program.state_dict
        a, b = (full(packed[name], 16, 16) for name in "ab")
        y = linear(quantize_fp8(x), a, state["a.bias"])
        y = quantize_fp8(y)
        expected = linear(y, b, state["b.bias"]) + linear(y, a, state["a.bias"])
        torch.testing.assert_close(small.module()(x), expected, rtol=1e-5, atol=1e-5)


def test_a_packed_bias_takes_the_place_of_the_layers_own_and_of_no_other() -> None:
    model = Mlp().eval()
    program = capture_rows(model, 4, 16)
    packed = pack_all(program, "sparse")
    bias = normal(7, 8)
    packed["second"] = dataclasses.replace(packed["second"], bias=bias)
    before = {name: bits(t) for name, t in program.state_dict.items()}
    small = replace_linears(program, find_linears(program), packed)
    assert {name: bits(t) for name, t in program.state_dict.items()} == before
    assert bits(small.state_dict["second.bias"]) == bits(bias)
    assert bits(small.state_dict["first.bias"]) == before["first.bias"]
    assert isinstance(small.state_dict["second.bias"], nn.Parameter)
    assert set(small.graph_signature.parameters) == {"first.bias", "second.bias"}
    x = normal(1, 6, 16)
    hidden = relu(linear(x, full(packed["first"], 32, 16), model.first.bias))
    expected = linear(hidden, full(packed["second"], 8, 32), bias)
    torch.testing.assert_close(small.module()(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [Tied, InOut])
def test_a_bias_for_a_layer_without_one_of_its_own_is_our_own_mistake(model) -> None:
    program = capture_rows(model(), 4, 16)
    packed = pack_all(program, "sparse")
    name = next(site.name for site in find_linears(program) if site.bias is None)
    packed[name] = dataclasses.replace(packed[name], bias=normal(1, 16))
    with pytest.raises(AssertionError, match=f"^{name}: a bias"):
        replace_linears(program, find_linears(program), packed)


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
    assert called(small) == {add: 1, aten.relu.default: 1, op_24: 2}


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
