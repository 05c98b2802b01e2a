"""find_linears: every form of a linear, named by its layer, and nothing that is not one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import (
    KINDS,
    Chain,
    InOut,
    Rows,
    Tied,
    answer,
    aten,
    captured,
    normal,
)
from slimfx.passes.find_linears import Site, find_linears, module_path
from slimfx.runtime.pack import unpack_24
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.functional import linear

import slimfx
from slimfx.recipe import Recipe


def sites(kind: str) -> list[Site]:
    return find_linears(captured(kind))


class Product(nn.Module):
    """One product with a parameter `w`."""

    def __init__(self, product: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(1, *shape) / 4)
        self.b = nn.Parameter(normal(2, 8))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.w, self.b)


IN_OUT = {
    "x @ w": lambda x, w, b: x @ w + b,
    "matmul": lambda x, w, b: torch.matmul(x, w) + b,
    "mm": lambda x, w, b: torch.mm(x, w) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
}
OUT_IN = {
    "linear": lambda x, w, b: linear(x, w, b),
    "linear without bias": lambda x, w, b: linear(x, w) + b,
    "x @ w.t()": lambda x, w, b: x @ w.t() + b,
    "x @ w.T": lambda x, w, b: x @ w.T + b,
    "x @ w.mT": lambda x, w, b: x @ w.mT + b,
    "transpose": lambda x, w, b: x @ w.transpose(0, 1) + b,
    "transpose from the end": lambda x, w, b: x @ w.transpose(-1, -2) + b,
    "permute": lambda x, w, b: x @ w.permute(1, 0) + b,
    "mm": lambda x, w, b: torch.mm(x, w.t()) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
}


def check_product(product: Callable[..., Tensor], *, transposed: bool) -> None:
    model = Product(product, *((16, 8) if transposed else (8, 16))).eval()
    program = slimfx.capture(model, (normal(3, 5, 16),))
    [site] = find_linears(program)
    assert (site.name, site.fqn) == ("w", "w")
    assert (site.out_features, site.in_features) == (8, 16)
    assert site.transposed is transposed
    assert site.other_readers == ()
    [use] = site.uses
    assert use.x.name == "x"

    recipe = Recipe.preset("slim")
    small = slimfx.compress(program, recipe, [normal(4, 40, 16)])
    state = small.state_dict
    weight = stored(state, "w")
    model.w.data = weight.T.contiguous() if transposed else weight
    x = normal(5, 6, 16)
    torch.testing.assert_close(small.module()(x), answer(model, {"x": x}), rtol=1e-5, atol=1e-5)


def stored(state: dict[str, Tensor], name: str) -> Tensor:
    part = {p: state[f"{name}.slim_{p}"] for p in ("values", "indices", "scale", "L", "R")}
    codes = unpack_24(part["values"], part["indices"], 4, part["L"].shape[1]).float()
    return codes * part["scale"].float() + part["R"].float() @ part["L"].float()


@pytest.mark.parametrize("form", IN_OUT)
def test_a_weight_stored_as_in_out_is_found_in_every_form(form: str) -> None:
    check_product(IN_OUT[form], transposed=True)


@pytest.mark.parametrize("form", OUT_IN)
def test_a_weight_stored_as_out_in_is_found_in_every_form(form: str) -> None:
    check_product(OUT_IN[form], transposed=False)


NOT_LINEAR = {
    "a weight on the left": lambda x, w, b: w @ x,
    "a weight that is computed": lambda x, w, b: linear(x, w * 2),
    "a product of activations": lambda x, w, b: (x @ x.t()) @ (x[:, :8] * w.sum()),
    "a scaled addmm": lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2),
    "a table": lambda x, w, b: nn.functional.embedding(x.long().clamp(0, 7), w),
    "half a weight": lambda x, w, b: linear(x, w[:4]),
}


@pytest.mark.parametrize("form", NOT_LINEAR)
def test_what_is_no_linear_of_a_parameter_is_left_alone(form: str) -> None:
    x = normal(3, 16, 16)
    program = torch.export.export(Product(NOT_LINEAR[form], 8, 16), (x,))
    assert find_linears(program) == []


def test_convolutions_and_batched_weights_are_no_linears() -> None:
    model = Batched()
    program = torch.export.export(model, (normal(1, 3, 4, 16),))
    assert [site.name for site in find_linears(program)] == ["last"]


class Batched(nn.Module):
    """A convolution, a batched product with a three-dimensional parameter, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.experts = nn.Parameter(torch.randn(3, 16, 16))
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.bmm(self.conv(x), self.experts))


def test_the_layers_of_a_llama_carry_their_module_paths_in_order() -> None:
    parts = ["q_proj", "k_proj", "v_proj", "o_proj"]
    layer = [f"self_attn.{part}" for part in parts]
    layer += [f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    expected = [f"model.model.layers.{i}.{part}" for i in range(2) for part in layer]
    found = sites("llama")
    assert [site.name for site in found] == [*expected, "model.lm_head"]
    assert [site.fqn for site in found] == [f"{site.name}.weight" for site in found]
    assert not any(site.transposed or site.other_readers for site in found)


def test_the_layers_of_a_gpt2_are_transposed_and_have_a_bias() -> None:
    found = sites("gpt2")
    layers = [site for site in found if site.name != "model.lm_head"]
    assert len(layers) == 8 and all(site.transposed for site in layers)
    assert all(use.bias is not None for site in layers for use in site.uses)
    sizes = {
        site.name.split("h.0.")[1]: (site.out_features, site.in_features) for site in layers[:4]
    }
    assert sizes == {
        "attn.c_attn": (96, 32),
        "attn.c_proj": (32, 32),
        "mlp.c_fc": (128, 32),
        "mlp.c_proj": (32, 128),
    }


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("mlp", ["first", "second"]),
        ("in out", ["w1", "w2"]),
        ("out in", ["w1", "w2"]),
        ("tied", ["a", "c"]),
        ("transposed storage", ["a", "b"]),
        (
            "encoder layer",
            ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"],
        ),
    ],
)
def test_a_layer_is_named_by_its_module_or_else_by_its_parameter(
    kind: str, names: list[str]
) -> None:
    assert [site.name for site in sites(kind)] == names


def test_two_parameters_of_one_module_go_by_their_own_names() -> None:
    program = slimfx.capture(Chain(InOut(), nn.Linear(8, 8)), (normal(1, 4, 16),))
    assert [site.name for site in find_linears(program)] == [
        "layers.0.w1",
        "layers.0.w2",
        "layers.1",
    ]


class Borrowing(nn.Module):
    """`head` multiplies with the weight of `other`, and its own weight is used outside."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 16)
        self.head = Given()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x, self.other.weight) + linear(x, self.head.weight)


class Given(nn.Module):
    """Multiplies with the weight it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight)


def test_no_two_layers_share_a_name_wherever_their_weights_are_used() -> None:
    program = slimfx.capture(Borrowing(), (normal(1, 4, 16),))
    found = find_linears(program)
    assert sorted(site.fqn for site in found) == ["head.weight", "other.weight"]
    assert len({site.name for site in found}) == 2
    small = slimfx.compress(program, "slim", [normal(2, 40, 16)])
    state = small.state_dict
    assert not torch.equal(state["other.slim_values"], state["head.slim_values"])


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_unique_and_every_use_multiplies_with_its_weight(kind: str) -> None:
    found = sites(kind)
    assert len({site.name for site in found}) == len(found)
    assert len({use.node for site in found for use in site.uses}) == sum(
        len(site.uses) for site in found
    )
    state = captured(kind).state_dict
    for site in found:
        shape = (site.out_features, site.in_features)
        assert tuple(state[site.fqn].shape) == (shape[::-1] if site.transposed else shape)
        assert site.dtype is state[site.fqn].dtype
        for use in site.uses:
            assert use.node.meta["val"].shape[-1] == site.out_features
            assert use.x.meta["val"].shape[-1] == site.in_features
            assert use.x in use.node.args


def test_the_bias_of_a_layer_is_the_parameter_that_it_alone_adds() -> None:
    assert [site.bias for site in sites("mlp")] == ["first.bias", "second.bias"]
    assert [site.bias for site in sites("out in")] == [None, "bias"]
    assert {site.bias for site in sites("llama")} == {None}
    for site in sites("opt"):
        if site.name != "model.lm_head":
            assert site.bias == f"{site.name}.bias"
    state = captured("gpt2").state_dict
    for site in sites("gpt2")[:-1]:
        assert site.bias == f"{site.name}.bias"
        assert state[site.bias].shape == (site.out_features,)


def test_layers_that_are_called_twice_have_a_bias_of_their_own() -> None:
    biases = {site.name: site.bias for site in sites("albert")}
    assert biases == {name: f"{name}.bias" for name in biases}


NO_BIAS = {
    "none": lambda x, w, b: linear(x, w),
    "added later": lambda x, w, b: linear(x, w) + b,
    "computed": lambda x, w, b: linear(x, w, b * 2),
    "computed by addmm": lambda x, w, b: torch.addmm(b.exp(), x, w.t()),
    "read elsewhere too": lambda x, w, b: linear(x, w, b) * b,
    "an output too": lambda x, w, b: (linear(x, w, b), b),
    "added with a factor": lambda x, w, b: linear(x, w, b) + linear(x, w),
    "for each token": lambda x, w, b: torch.addmm(x[:, :8], x, w.t()),
}


@pytest.mark.parametrize("form", NO_BIAS)
def test_a_bias_that_is_shared_computed_or_no_parameter_is_not_the_layers_own(form: str) -> None:
    program = torch.export.export(Product(NO_BIAS[form], 8, 16), (normal(3, 5, 16),))
    found = find_linears(program)
    assert found and [site.bias for site in found] == [None] * len(found)


def test_a_bias_that_two_layers_share_belongs_to_neither() -> None:
    model = Chain(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    model.layers[1].bias = model.layers[0].bias
    found = find_linears(slimfx.capture(model, (normal(1, 4, 16),)))
    assert [site.bias for site in found] == [None, None, "layers.2.bias"]


def test_a_tied_weight_with_two_biases_has_none_of_its_own() -> None:
    assert [site.bias for site in sites("tied")] == [None, "c.bias"]


def test_shared_layers_are_one_site_with_a_use_for_each_call() -> None:
    uses = {site.name.rpartition(".")[2]: len(site.uses) for site in sites("albert")}
    assert uses == {
        "embedding_hidden_mapping_in": 1,
        "query": 2,
        "key": 2,
        "value": 2,
        "dense": 2,
        "ffn": 2,
        "ffn_output": 2,
    }


def test_a_weight_of_two_modules_is_one_site_with_the_bias_of_each() -> None:
    [tied, alone] = find_linears(slimfx.capture(Tied(), (normal(1, 4, 16),)))
    assert (tied.name, len(tied.uses), alone.name) == ("a", 2, "c")
    assert [use.bias.name for use in tied.uses] == ["p_a_bias", "p_b_bias"]


def test_two_parameters_over_one_storage_are_one_site() -> None:
    model = Chain(nn.Linear(16, 16), nn.Linear(16, 16))
    model.layers[1].weight = nn.Parameter(model.layers[0].weight.data)
    [site] = find_linears(slimfx.capture(model, (normal(1, 4, 16),)))
    assert (site.name, len(site.uses)) == ("layers.0", 2)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen2"])
def test_a_tied_head_names_the_embedding_as_the_other_reader(kind: str) -> None:
    [head] = [site for site in sites(kind) if site.other_readers]
    assert head.name == "model.lm_head"
    assert head.other_readers == ("aten.embedding.default",)
    assert "embed" in head.fqn or "wte" in head.fqn


@pytest.mark.parametrize(
    ("read", "reader"),
    [
        (lambda x, w, b: linear(x, w) * w.sum(), "aten.sum.default"),
        (lambda x, w, b: linear(x, w) * w.t().sum(), "aten.sum.default"),
        (lambda x, w, b: (linear(x, w), w), "output"),
    ],
)
def test_whoever_else_reads_a_weight_is_named(read: Callable[..., Tensor], reader: str) -> None:
    program = torch.export.export(Product(read, 8, 16), (normal(1, 4, 16),))
    [site] = find_linears(program)
    assert site.other_readers == (reader,)


def test_a_weight_used_both_ways_round_is_no_plain_linear() -> None:
    program = torch.export.export(
        Product(lambda x, w, b: linear(x, w) + x @ w, 16, 16), (normal(1, 4, 16),)
    )
    [site] = find_linears(program)
    assert site.other_readers == ("a transposed linear",)


def test_a_decomposed_program_has_the_same_layers() -> None:
    for model, shape in ((Rows(), (4, 16)), (Rows(), (2, 4, 16)), (Tied(), (2, 4, 16))):
        program = torch.export.export(model, (normal(1, *shape),))
        before = find_linears(program)
        plain = program.run_decompositions()
        assert not [n for n in plain.graph.nodes if n.target is aten.linear.default]
        after = find_linears(plain)
        assert [(s.name, s.fqn, len(s.uses)) for s in after] == [
            (s.name, s.fqn, len(s.uses)) for s in before
        ]
        x = normal(2, *shape)
        small = slimfx.compress(plain, "slim", [x])
        expected = slimfx.compress(program, "slim", [x]).module()(x)
        torch.testing.assert_close(small.module()(x), expected, rtol=1e-4, atol=1e-4)


def test_finding_changes_nothing_and_finds_the_same_again() -> None:
    program: ExportedProgram = captured("gpt2")
    before = str(program.graph)
    assert find_linears(program) == find_linears(program)
    assert str(program.graph) == before


def test_the_module_path_of_a_node_is_that_of_its_innermost_module() -> None:
    program = slimfx.capture(Chain(Rows(), nn.ReLU()), (normal(1, 4, 16),))
    paths = {
        str(node.target): module_path(node)
        for node in program.graph.nodes
        if node.op == "call_function"
    }
    assert paths["aten.linear.default"] == "layers.0.second"
    assert paths["aten.relu.default"] == "layers.1"
    assert {module_path(n) for n in program.graph.nodes if n.op == "placeholder"} == {""}


def test_a_model_as_deep_as_any_has_its_linears_found() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for _ in range(2000):  # residuals, which once took a stack frame each
                x = x + 1
            return x

    [site] = find_linears(torch.export.export(Deep(), (torch.ones(2, 8),)))
    assert not site.routes
