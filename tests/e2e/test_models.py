"""Every kind of model compresses, and the result is the model with the stored weights in it."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import pytest
import torch
from models import (
    KINDS,
    RECIPES,
    Chain,
    Rows,
    answer,
    aten,
    bits,
    captured,
    case,
    compressed,
    count,
    emulate,
    ids,
    normal,
    tiny_llama,
)
from slimfx.runtime.manifest import manifest_of
from torch import Tensor, nn

import slimfx
from slimfx.errors import CalibrationError, SolveError
from slimfx.recipe import Recipe

linear_24 = torch.ops.slimfx.linear_24.default
linear_int = torch.ops.slimfx.linear_int.default
linear_bitmask = torch.ops.slimfx.linear_bitmask.default
PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default)


@dataclass(frozen=True)
class Expected:
    """Linear nodes of a program: those compressed, those left dense; and distinct weights."""

    uses: int
    dense: int
    layers: int
    products: tuple = PRODUCTS


EXPECTED = {
    "llama": Expected(uses=14, dense=1, layers=14),
    "gpt2": Expected(uses=8, dense=1, layers=8),
    "opt": Expected(uses=12, dense=1, layers=12),
    "bert": Expected(uses=12, dense=0, layers=12),
    "qwen2": Expected(uses=14, dense=1, layers=14),
    "albert": Expected(uses=13, dense=0, layers=7),
    "vit": Expected(uses=13, dense=0, layers=13),
    "mlp": Expected(uses=2, dense=0, layers=2),
    "rows": Expected(uses=2, dense=0, layers=2),
    "tied": Expected(uses=3, dense=0, layers=2),
    "transposed storage": Expected(uses=2, dense=0, layers=2),
    "encoder layer": Expected(uses=4, dense=0, layers=4),
    "in out": Expected(uses=2, dense=0, layers=2, products=(*PRODUCTS, aten.matmul.default)),
    "out in": Expected(uses=2, dense=0, layers=2),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_that_of_the_model_with_the_stored_weights(kind: str, recipe: str) -> None:
    each, program = case(kind), compressed(kind, recipe)
    emulated, replaced = emulate(each, program, RECIPES[recipe])
    assert len(replaced) == EXPECTED[kind].layers
    with torch.no_grad():
        found = program.module()(**each.inputs)
    torch.testing.assert_close(found, answer(emulated, each.inputs), rtol=1e-5, atol=1e-5)
    assert (found - answer(each.model, each.inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_becomes_one_sparse_node_and_its_adapter_two(kind: str) -> None:
    expected = EXPECTED[kind]
    before = captured(kind)
    assert count(before, *expected.products) == expected.uses + expected.dense
    assert count(before, linear_24, linear_int, linear_bitmask) == 0

    slim = compressed(kind, "slim")
    assert count(slim, linear_24) == expected.uses
    assert count(slim, linear_int) == 0
    assert count(slim, *expected.products) == expected.dense + 2 * expected.uses

    slim_q = compressed(kind, "slim-q")
    assert count(slim_q, linear_24) == expected.uses
    assert count(slim_q, linear_int) == 2 * expected.uses
    assert count(slim_q, *expected.products) == expected.dense


@pytest.mark.parametrize("kind", KINDS)
def test_without_pruning_and_adapter_in_codes_every_node_is_dense(kind: str) -> None:
    expected, program = EXPECTED[kind], compressed(kind, "int4")
    assert count(program, linear_24) == 0
    assert count(program, linear_int) == 3 * expected.uses
    assert count(program, *expected.products) == expected.dense


@pytest.mark.parametrize("kind", KINDS)
def test_each_layout_and_the_input_scale_have_their_nodes(kind: str) -> None:
    expected, before, program = EXPECTED[kind], captured(kind), compressed(kind, "50%")
    assert count(program, linear_bitmask) == expected.uses
    assert count(program, linear_24) == count(program, linear_int) == expected.uses
    assert count(program, *expected.products) == expected.dense
    scaled = count(program, aten.mul.Tensor) - count(before, aten.mul.Tensor)
    assert scaled == expected.uses


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_float_copy_of_a_compressed_weight_remains(kind: str, recipe: str) -> None:
    each, program = case(kind), compressed(kind, recipe)
    _, replaced = emulate(each, program, RECIPES[recipe])
    weights = [each.model.get_parameter(name) for name in replaced]
    memory = {weight.untyped_storage().data_ptr() for weight in weights}
    originals = {_sorted(weight) for weight in weights}
    left = {**program.state_dict, **program.constants}
    for name, tensor in left.items():
        assert tensor.untyped_storage().data_ptr() not in memory, name
        assert _sorted(tensor) not in originals, name


def _sorted(tensor: Tensor) -> bytes:
    """Equal for a matrix, its transpose and any other arrangement of the same numbers."""
    return bits(tensor.detach().flatten().sort().values)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen2"])
def test_the_head_is_skipped_by_default_and_the_manifest_says_so(kind: str) -> None:
    program = compressed(kind, "slim")
    manifest = manifest_of(program)
    assert dict(manifest.skipped) == {"model.lm_head": "skipped by the recipe"}
    assert "model.lm_head" not in [layer.name for layer in manifest.layers]
    dense = [n for n in program.graph.nodes if n.target is aten.linear.default]
    assert sum("lm_head" in str(n.meta["nn_module_stack"]) for n in dense) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen2"])
def test_the_embedding_is_kept_bit_for_bit(kind: str) -> None:
    before, after = captured(kind), compressed(kind, "slim")
    embeddings = [
        node.args[0].name for node in before.graph.nodes if node.target is aten.embedding.default
    ]
    targets = {spec.arg.name: spec.target for spec in after.graph_signature.input_specs}
    assert embeddings
    for name in embeddings:
        assert bits(after.state_dict[targets[name]]) == bits(before.state_dict[targets[name]])


def test_a_head_of_its_own_is_compressed_when_the_recipe_does_not_skip_it() -> None:
    recipe = dataclasses.replace(Recipe.preset("slim"), skip=())
    each = case("llama")
    program = slimfx.compress(captured("llama"), recipe, each.batches)
    emulated, replaced = emulate(each, program, recipe)
    assert "lm_head.weight" in replaced and len(replaced) == 15
    with torch.no_grad():
        found = program.module()(**each.inputs)
    torch.testing.assert_close(found, answer(emulated, each.inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert", "albert", "in out"])
def test_the_manifest_reports_each_compressed_layer_once(kind: str) -> None:
    layers = manifest_of(compressed(kind, "slim")).layers
    assert len({layer.name for layer in layers}) == len(layers) == EXPECTED[kind].layers
    for layer in layers:
        assert layer.layout == "2:4 int4"
        assert layer.rank == max(1, min(layer.out_features, layer.in_features) // 10)
        assert layer.snr > layer.snr_without_adapter > 3


def test_a_bfloat16_model_compresses_and_stays_bfloat16() -> None:
    model = tiny_llama().to(torch.bfloat16).eval()
    program = slimfx.capture(model)
    recipe = Recipe.preset("slim")
    small = slimfx.compress(program, recipe, [ids(1, 4, 24)])
    each = dataclasses.replace(case("llama"), model=copy.deepcopy(model).float())
    emulated, replaced = emulate(each, small, recipe)
    assert len(replaced) == 14
    with torch.no_grad():
        found = small.module()(**each.inputs)
    assert found.dtype is torch.bfloat16
    expected = answer(emulated, each.inputs)
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_the_same_input_gives_the_same_bytes_twice() -> None:
    again = slimfx.compress(captured("bert"), RECIPES["slim-q"], case("bert").batches)
    first = compressed("bert", "slim-q")
    assert {k: bits(v) for k, v in again.state_dict.items()} == {
        k: bits(v) for k, v in first.state_dict.items()
    }
    assert manifest_of(again) == manifest_of(first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_names_its_layer(value: float) -> None:
    model = Chain(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model.layers[1].weight[3, 5] = value
    program = slimfx.capture(model, (normal(1, 4, 16),))
    with pytest.raises(SolveError, match=r"^layers\.1: 1 of 256 weights are NaN or infinite"):
        slimfx.compress(program, "slim", [normal(2, 32, 16)])


def test_an_activation_that_is_not_finite_names_the_first_layer_it_reaches() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    program = slimfx.capture(model)
    tokens = ids(1, 2, 12)
    tokens[1, 4] = 7
    with pytest.raises(CalibrationError, match=r"^model\.model\.layers\.0\.self_attn\.q_proj: "):
        slimfx.compress(program, "slim", [tokens])
    tokens[tokens == 7] = 8
    assert count(slimfx.compress(program, "slim", [tokens]), linear_24) == 14


def test_an_activation_that_overflows_between_layers_names_the_later_one() -> None:
    model = Chain(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model.layers[0].bias[2] = float("inf")
    program = slimfx.capture(model, (normal(1, 4, 16),))
    with pytest.raises(CalibrationError, match=r"^layers\.1: .* in 1 of 16 channels"):
        slimfx.compress(program, "slim", [normal(2, 32, 16)])


def test_control_flow_is_walked_and_survives() -> None:
    program = slimfx.capture(Branches().eval(), (normal(1, 4, 16),))
    batches = [normal(2, 20, 16), -normal(2, 20, 16)]
    assert {bool(batch.sum() > 0) for batch in batches} == {True, False}
    small = slimfx.compress(program, "slim", batches)
    assert count(small, linear_24) == 2
    each = dataclasses.replace(case("rows"), model=_eager_branches(program))
    emulated, replaced = emulate(each, small, RECIPES["slim"])
    assert replaced == ["before.weight", "after.weight"]
    for x in batches:
        torch.testing.assert_close(
            small.module()(x), answer(emulated, {"x": x}), rtol=1e-5, atol=1e-5
        )


class Branches(nn.Module):
    """A linear, a torch.cond, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(16, 16)
        self.after = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos() - 2, (self.before(x),))
        return self.after(y)


def _eager_branches(program: torch.export.ExportedProgram) -> nn.Module:
    model = Branches().eval()
    model.load_state_dict(program.state_dict)
    return model


def test_a_program_that_torch_export_made_with_positional_inputs_compresses() -> None:
    model = Rows().eval()
    x = normal(1, 20, 16)
    program = torch.export.export(model, (x,))
    small = slimfx.compress(program, "slim", [x])
    each = dataclasses.replace(case("rows"), model=model)
    emulated, replaced = emulate(each, small, RECIPES["slim"])
    assert len(replaced) == 2
    torch.testing.assert_close(small.module()(x), answer(emulated, {"x": x}), rtol=1e-5, atol=1e-5)


def test_an_input_may_be_named_like_a_builtin_as_that_of_nn_linear_is() -> None:
    x = normal(1, 20, 16)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    small = slimfx.compress(torch.export.export(model, (x,)), "slim", [x])
    assert count(small, linear_24) == 2
    assert list(small.graph_signature.user_inputs) == ["input"]
    assert small.module()(x).shape == (20, 8)


def test_inputs_that_are_no_tensors_go_through() -> None:
    model = Switch().eval()
    x = normal(1, 20, 16)
    program = torch.export.export(model, (x, True, None))
    small = slimfx.compress(program, "slim", [(x, True, None)])
    assert count(small, linear_24) == 1
    assert small.module()(x, True, None).shape == (20, 8)


class Switch(nn.Module):
    """A flag and an absent mask beside the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8)

    def forward(self, x: Tensor, flag: bool, mask: Tensor | None) -> Tensor:
        y = self.a(x if mask is None else x * mask)
        return -y if flag else y


def test_no_batch_at_all_is_a_calibration_error() -> None:
    with pytest.raises(CalibrationError):
        slimfx.compress(captured("mlp"), "slim", [])


def test_progress_rises_to_one_and_names_the_layers() -> None:
    told: list[tuple[float, str]] = []
    slimfx.compress(
        captured("mlp"),
        "slim",
        case("mlp").batches,
        progress=lambda share, what: told.append((share, what)),
    )
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert {"first", "second"} <= {what for _, what in told}
