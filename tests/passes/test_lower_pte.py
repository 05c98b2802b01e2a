"""Compressed linears become nodes that ExecuTorch lowers: their answers, and what is said."""

import dataclasses

import pytest
import torch
from models import KINDS, RECIPES, answer, captured, case, compressed, count
from slimfx.passes.decompose import slimfx_nodes
from slimfx.passes.lower_pte import FORMS, lower_pte
from slimfx.runtime.pack import unpack_24
from torch import Tensor, nn
from torch.export import ExportedProgram

import slimfx
from slimfx.errors import ArtifactError
from slimfx.recipe import Recipe
from slimfx.steps import Adapter, Inputs, Prune, Quantize

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed
CHANNELS = Quantize("absmax", bits=8, granularity="channel")


def products(program: ExportedProgram) -> int:
    """Products with stored matrices, those of adapters among them."""
    ops = torch.ops.slimfx
    return count(program, ops.linear_int.default, ops.linear_24.default, ops.linear_bitmask.default)


def error(program: ExportedProgram, lowered: ExportedProgram, kind: str) -> float:
    a, b = (answer(p.module(), case(kind).inputs) for p in (program, lowered))
    return ((a - b).norm() / a.norm()).item()


def rounded(x: Tensor) -> Tensor:
    """Each row through int8, as XNNPACK defines it, in float64."""
    x = x.double()
    least, most = x.amin(-1, True).clamp(max=0), x.amax(-1, True).clamp(min=0)
    step = (most - least).float().double() / 255
    zero = (-128 - least / step).round()
    return (((x / step).round() + zero).clamp(-128, 127) - zero) * step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["slim-q", "50%"])
def test_the_portable_form_answers_as_before(kind: str, recipe: str) -> None:
    program = compressed(kind, recipe)
    lowered, report = lower_pte(program, form="portable")
    assert report.notes == ()
    assert (report.integer, report.floating) == (0, products(program))
    assert slimfx_nodes(lowered) == 0
    assert error(program, lowered, kind) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["slim-q"])
def test_xnnpack_takes_every_product_of_one_scale_a_row(kind: str, recipe: str) -> None:
    program = compressed(kind, recipe)
    lowered, report = lower_pte(program)
    assert (report.integer, report.floating) == (products(program), 0)
    assert count(lowered, quantized.choose_qparams_per_token_asymmetric.default) == report.integer
    assert slimfx_nodes(lowered) == 0
    assert 1e-4 < error(program, lowered, kind) < 0.1


def test_the_rounded_product_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 24).eval(), torch.randn(7, 48)
    recipe = dataclasses.replace(RECIPES["slim"], adapter=None)
    program = slimfx.compress(slimfx.capture(layer, {"input": x}), recipe, [torch.randn(64, 48)])
    part = program.state_dict
    codes = unpack_24(part["weight.slim_values"], part["weight.slim_indices"], 4, 48)
    W = codes.double() * part["weight.slim_scale"].double()
    expected = rounded(x) @ W.T + layer.bias.double()
    found = answer(lower_pte(program)[0].module(), {"input": x})
    assert (found - expected).abs().max() < 1e-5


def test_scales_and_codes_keep_their_values_and_leave_no_other_tensors() -> None:
    program = compressed("llama", "slim")
    lowered, _ = lower_pte(program)
    start = "model.model.layers.0.self_attn.q_proj.slim_"
    scale, before = lowered.state_dict[f"{start}pte_scale"], program.state_dict[f"{start}scale"]
    assert scale.shape == (32, 1) and torch.equal(scale, before.float().expand(32, 1))
    assert lowered.state_dict[f"{start}pte_codes"].dtype is torch.int8
    names = {name[len(start) :] for name in lowered.state_dict if name.startswith(start)}
    kept = {"pte_codes", "pte_scale", "pte_zero", "L_pte_float", "R_pte_float"}
    assert names == kept
    assert program.state_dict.keys() == compressed("llama", "slim").state_dict.keys()


def test_ranks_are_filled_up_to_whole_groups_on_both_sides() -> None:
    lowered, _ = lower_pte(compressed("llama", "slim-q"))
    start = "model.model.layers.0.mlp.up_proj.slim_"
    L, R = (lowered.state_dict[f"{start}{name}_pte_codes"] for name in "LR")
    assert L.shape == (32, 32) and R.shape == (64, 32)  # the rank is 3
    assert not L[3:].any() and not R[:, 3:].any()
    assert count(lowered, aten.cat.default) == count(
        compressed("llama", "slim-q"), aten.cat.default
    )


def test_groups_that_fit_are_kept_and_a_ragged_last_one_is_filled() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 80)
    recipe = Recipe(
        prune=None,
        quantize=Quantize("absmax", granularity="group", group=32),
        adapter=Adapter(rank=4, bits=4, group=32),
    )
    program = slimfx.capture(nn.Linear(80, 16).eval(), {"input": x})
    program = slimfx.compress(program, recipe, [torch.randn(64, 80)])
    lowered, report = lower_pte(program)
    assert (report.integer, report.notes) == (3, ())
    assert lowered.state_dict["weight.slim_pte_codes"].shape == (16, 96)
    assert lowered.state_dict["weight.slim_pte_scale"].shape == (16, 3)
    a, b = (answer(p.module(), {"input": x}) for p in (program, lowered))
    assert ((a - b).norm() / a.norm()) < 0.05


def test_other_groups_are_unpacked_and_said() -> None:
    program = compressed("mlp", "wanda")
    lowered, report = lower_pte(program)
    assert (report.integer, report.floating) == (0, 2)
    assert report.notes[0] == (
        "first: groups of 8 inputs, not a multiple of 32; its codes are unpacked on each call, and "
        "the product is not XNNPACK's"
    )
    assert error(program, lowered, "mlp") < 1e-5


@pytest.mark.parametrize(
    ("quantize", "integer"),
    [(CHANNELS, 2), (dataclasses.replace(CHANNELS, granularity="group", group=8), 0)],
)
def test_eight_bits_go_with_one_scale_a_row(quantize: Quantize, integer: int) -> None:
    recipe = Recipe(prune=Prune("wanda"), quantize=quantize, adapter=None)
    program = slimfx.compress(captured("mlp"), recipe, case("mlp").batches)
    lowered, report = lower_pte(program)
    assert (report.integer, len(report.notes)) == (integer, 2 - integer)
    assert count(lowered, quantized.dequantize_per_channel.default) == integer
    assert error(program, lowered, "mlp") < 0.02
    exact, _ = lower_pte(program, form="portable")
    assert error(program, exact, "mlp") < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prune", [Prune("wanda"), Prune("wanda", sparsity=0.5)])
def test_floats_are_stored_densely_and_said(form: str, prune: Prune) -> None:
    recipe = Recipe(prune=prune, quantize=None, adapter=None)
    program = slimfx.compress(captured("mlp"), recipe, case("mlp").batches)
    lowered, report = lower_pte(program, form=form)
    assert (report.integer, report.floating) == (0, 2)
    assert any("2 matrices of bfloat16 are stored densely as float32" in n for n in report.notes)
    assert error(program, lowered, "mlp") < 1e-5


def test_what_it_does_not_take_is_named() -> None:
    program = compressed("mlp", "slim")
    with pytest.raises(ArtifactError, match="form 'coreml' is not one of xnnpack, portable"):
        lower_pte(program, form="coreml")
    recipe = dataclasses.replace(RECIPES["slim"], inputs=Inputs("fp8"))
    rounds = slimfx.compress(captured("mlp"), recipe, case("mlp").batches)
    with pytest.raises(ArtifactError, match="8-bit floats, which ExecuTorch does not have"):
        lower_pte(rounds)
    half = slimfx.capture(nn.Linear(16, 8).bfloat16().eval(), (torch.randn(4, 16).bfloat16(),))
    half = slimfx.compress(half, "slim", [torch.randn(64, 16).bfloat16()])
    with pytest.raises(ArtifactError, match=r"inputs are torch.bfloat16.*dtype='float32'"):
        lower_pte(half)
