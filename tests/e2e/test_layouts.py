"""Every layout and every step of a recipe from end to end, on programs of two linears."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from models import Case, Chain, answer, aten, bits, captured, case, count, emulate, normal
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.pack import unpack_bits
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.functional import relu

import slimfx
from slimfx.errors import RecipeError
from slimfx.recipe import Recipe
from slimfx.steps import Adapter, Inputs, Override, Prune, Quantize, Solve, Transform

linear_int = torch.ops.slimfx.linear_int.default
linear_24 = torch.ops.slimfx.linear_24.default
linear_bitmask = torch.ops.slimfx.linear_bitmask.default
quantize_fp8 = torch.ops.slimfx.quantize_fp8.default
FORMS = ("op", "aten")


def grouped(bits: int) -> Quantize:
    """One scale for every 100 inputs, which no width here is a multiple of."""
    return Quantize("absmax", bits=bits, granularity="group", group=100)


def alone(prune: Prune | None, quantize: Quantize | None) -> Recipe:
    return Recipe(prune, quantize, adapter=None)


LAYOUTS = {
    **{f"int{b}": alone(None, grouped(b)) for b in (2, 3, 4, 8)},
    **{f"2:4 int{b}": alone(Prune("magnitude"), grouped(b)) for b in (2, 3, 4, 8)},
    "2:4 bf16": alone(Prune(), None),
    **{f"bitmask int{b}": alone(Prune(sparsity=0.6), grouped(b)) for b in (2, 3, 4, 8)},
    "bitmask bf16": alone(Prune(sparsity=0.6), None),
    "bitmask int4 of the layer": alone(Prune(sparsity=0.6, scope="layer"), Quantize()),
    "bitmask bf16 of the layer": alone(Prune(sparsity=0.37, scope="layer"), None),
    "bitmask bf16 of 3:4": alone(Prune(n=3, m=4), None),
    "int4 of 3:4": alone(Prune(n=3, m=4), Quantize()),  # a bitmask would be as large
    "int2 of 50%": alone(Prune(sparsity=0.5), grouped(2)),
    "2:4 int4 of 1:8": alone(Prune(n=1, m=8), Quantize()),
    "2:4 int4 + sparse int4 adapter": Recipe(adapter=Adapter(bits=4, sparse=True, group=48)),
    "2:4 int4 + sparse bf16 adapter": Recipe(adapter=Adapter(sparse=True)),
    "bitmask bf16 + sparse int4 adapter": Recipe(
        Prune(sparsity=0.6), None, Adapter("qera", bits=4, sparse=True)
    ),
    "int3 scaled by awq": dataclasses.replace(alone(None, grouped(3)), transform=Transform("awq")),
    "2:4 int4 scaled by slim-quant-o, fp8 inputs": Recipe(
        transform=Transform("slim-quant-o", share=0.05), inputs=Inputs("fp8")
    ),
    "2:4 bf16 scaled by smoothquant": Recipe(
        quantize=None, adapter=None, transform=Transform("smoothquant", alpha=0.7)
    ),
}
"""By the name of the layout, and what else is special."""


def layout_name(name: str) -> str:
    for word in (" of ", " + ", " scaled "):
        name = name.partition(word)[0]
    return name


class Wide(nn.Module):
    """Layers large enough that their bytes and not the graph's decide the size of a file."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(256, 392)
        self.down = nn.Linear(392, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(relu(self.up(x)))


@cache
def wide() -> tuple[ExportedProgram, Case]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Wide().eval()
    scale = torch.logspace(-1, 1, 256)
    batches = [{"x": (normal(1, 100, 256) + 0.3) * scale}]
    each = Case(model, batches, {"x": (normal(3, 5, 256) + 0.3) * scale})
    return slimfx.capture(model, each.inputs), each


@cache
def small(name: str) -> ExportedProgram:
    program, each = wide()
    return slimfx.compress(program, LAYOUTS[name], each.batches)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_bytes_are_those_of_the_plan_and_the_layout_has_its_name(name: str) -> None:
    program, planned = small(name), slimfx.plan(wide()[0], LAYOUTS[name])
    for row, layer in zip(planned.rows, manifest_of(program).layers, strict=True):
        stored = parts(program, row.name)
        assert row.bytes_after == layer.bytes == sum(t.nbytes for t in stored.values())
        assert row.layout == layer.layout == layout_name(name)
        assert ("scale" in stored) == (LAYOUTS[name].quantize is not None)
    assert planned.bytes_after == sum(t.nbytes for t in program.state_dict.values())


def parts(program: ExportedProgram, layer: str) -> dict[str, Tensor]:
    start = f"{layer}.slim_"
    return {k[len(start) :]: t for k, t in program.state_dict.items() if k.startswith(start)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_answer_is_that_of_the_model_with_the_stored_weights(name: str) -> None:
    each, recipe = wide()[1], LAYOUTS[name]
    emulated, replaced = emulate(each, small(name), recipe)
    assert len(replaced) == 2
    if recipe.inputs is not None:
        for layer, stored in ((emulated.up, "up"), (emulated.down, "down")):
            c = parts(small(name), stored)["input_scale"].float()
            layer.register_forward_pre_hook(lambda _, x, c=c: quantize_by_hand(x[0] * c) / c)
    found = small(name).module()(**each.inputs)
    expected = answer(emulated, each.inputs)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def quantize_by_hand(x: Tensor) -> Tensor:
    assert x.abs().max() <= 448
    return x.to(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_saved_file_repeats_its_golden_outputs_and_has_the_planned_size(
    name: str, form: str, tmp_path: Path
) -> None:
    program, each = small(name), wide()[1]
    size = slimfx.save(program, tmp_path / "small.pt2", form=form, verify=False)
    assert slimfx.check(tmp_path / "small.pt2").identical
    loaded = slimfx.load(tmp_path / "small.pt2")
    found, expected = loaded.module()(**each.inputs), program.module()(**each.inputs)
    if form == "op":
        assert bits(found) == bits(expected)
        planned = slimfx.plan(wide()[0], LAYOUTS[name]).file_bytes
        assert math.isclose(planned, size, rel_tol=0.02)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_fp8_is_in_the_graph_of_both_forms(tmp_path: Path) -> None:
    name = "2:4 int4 scaled by slim-quant-o, fp8 inputs"
    program = small(name)
    assert count(program, quantize_fp8) == 2
    assert "fp8 inputs" in slimfx.plan(wide()[0], LAYOUTS[name]).rows[0].method
    for form in FORMS:
        slimfx.save(program, tmp_path / form, form=form, verify=False)
    op, plain = (slimfx.load(tmp_path / form) for form in FORMS)
    assert count(op, quantize_fp8) == 2
    assert count(plain, quantize_fp8) == 0
    nodes = [node for node in plain.graph.nodes if node.op == "call_function"]
    casts = [str(arg) for node in nodes for arg in (*node.args, *node.kwargs.values())]
    assert casts.count("torch.float8_e4m3fn") == casts.count("torch.float8_e5m2") == 2


# which weights stay


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("sparsity", [0.5, 0.3, 0.873])
@pytest.mark.parametrize("quantize", [None, grouped(4)])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_stored_mask_is_as_sparse_as_asked_to_one_weight(
    scope: str, sparsity: float, quantize: Quantize | None, method: str
) -> None:
    solve = Solve("second-order" if method == "sparsegpt" else "one-shot")
    recipe = Recipe(Prune(method, sparsity=sparsity, scope=scope), quantize, None, solve)
    program = slimfx.compress(captured("mlp"), recipe, case("mlp").batches)
    for name, (N, K) in {"first": (32, 16), "second": (8, 32)}.items():
        stored = parts(program, name)
        kept = unpack_bits(stored["mask"], K)
        if scope == "row":
            assert kept.sum(1).tolist() == [K - round(sparsity * K)] * N
        assert abs(int((~kept).sum()) - sparsity * N * K) <= (N / 2 if scope == "row" else 0.5)
        held = stored["values"].numel() * (1 if quantize is None else 2)
        assert held - int(kept.sum()) in (0, 1)


def mask_of(N: int, K: int, seed: int, *, share: float | None = None) -> Tensor:
    """Random: two of every four, or a share of each row."""
    score = normal(seed, N, K)
    if share is None:
        pairs = score.view(N, K // 4, 4).argsort(-1)[..., :2]
        return torch.zeros(N, K // 4, 4).scatter(-1, pairs, 1).bool().view(N, K)
    kept = score.argsort(-1)[:, : K - round(share * K)]
    return torch.zeros(N, K).scatter(-1, kept, 1).bool()


def written(folder: Path, **masks: Tensor) -> Path:
    path = folder / "masks.safetensors"
    safetensors.torch.save_file({name: mask.contiguous() for name, mask in masks.items()}, path)
    return path


@pytest.mark.parametrize("share", [None, 0.5])
def test_masks_from_a_file_are_the_masks_of_the_program(
    share: float | None, tmp_path: Path
) -> None:
    masks = {"first": mask_of(32, 16, 1, share=share), "second": mask_of(8, 32, 2, share=share)}
    path = written(tmp_path, **masks)
    for quantize in (None, grouped(4)):
        prune = Prune("mask-file", path=str(path), sparsity=share)
        recipe = Recipe(prune, quantize, adapter=None)
        each = case("mlp")
        program = slimfx.compress(captured("mlp"), recipe, each.batches)
        emulated, _ = emulate(each, program, recipe)
        for name, mask in masks.items():
            W = emulated.get_parameter(f"{name}.weight")
            assert not W[~mask].any()
            if quantize is None:
                assert bool((W != 0)[mask].all())
                dense = each.model.get_parameter(f"{name}.weight")
                assert torch.equal(W, (dense * mask).bfloat16().float())


WRONG_MASKS = {
    "a layer without a mask": (lambda: {"first": mask_of(32, 16, 1)}, "second"),
    "another shape": (
        lambda: {"first": mask_of(16, 32, 1), "second": mask_of(8, 32, 2)},
        r"first.*\[16, 32\].*\[32, 16\]",
    ),
    "another pattern": (
        lambda: {"first": mask_of(32, 16, 1), "second": mask_of(8, 32, 2).flip(1).roll(1, 1)},
        "second.*n:m group",
    ),
    "numbers": (
        lambda: {"first": mask_of(32, 16, 1) * 0.5, "second": mask_of(8, 32, 2)},
        "first.*0 and 1",
    ),
}


@pytest.mark.parametrize("case_name", WRONG_MASKS)
def test_a_wrong_mask_is_refused_with_its_file_and_layer_before_the_data_is_touched(
    case_name: str, tmp_path: Path
) -> None:
    make, message = WRONG_MASKS[case_name]
    path = written(tmp_path, **make())
    touched = []

    def data() -> object:
        touched.append(True)
        yield normal(1, 4, 16)

    recipe = Recipe(Prune("mask-file", path=str(path)), adapter=None)
    with pytest.raises(RecipeError, match=message) as caught:
        slimfx.compress(captured("mlp"), recipe, data())
    assert "masks.safetensors" in str(caught.value)
    assert not touched


def test_a_mask_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    recipe = Recipe(Prune("mask-file", path=str(tmp_path / "none.npz")), adapter=None)
    with pytest.raises(RecipeError, match=r"none\.npz"):
        slimfx.compress(captured("mlp"), recipe, case("mlp").batches)


# adapters, transforms, biases, alternation


@pytest.mark.parametrize("adapter_bits", [4, 16])
def test_a_sparse_adapter_stores_L_as_24_and_R_densely(adapter_bits: int) -> None:
    recipe = Recipe(adapter=Adapter(bits=adapter_bits, rank=4, group=5, sparse=True))
    each = case("mlp")
    program = slimfx.compress(captured("mlp"), recipe, each.batches)
    assert count(program, linear_24) == 4  # the weights and L
    assert count(program, linear_int) == (2 if adapter_bits == 4 else 0)
    for name, (N, K) in {"first": (32, 16), "second": (8, 32)}.items():
        stored = parts(program, name)
        assert stored["L_indices"].shape == (4, K // 8)
        if adapter_bits == 4:
            assert stored["L_values"].shape == (4, K // 4)
            assert stored["L_scale"].shape == (4, -(-K // 5))
            assert stored["R_codes"].shape == (N, 2)
        else:
            assert stored["L_values"].dtype is stored["R"].dtype is torch.bfloat16
            assert stored["L_values"].shape == (4, K // 2)
            assert "L_scale" not in stored


@pytest.mark.parametrize("method", ["awq", "smoothquant", "slim-quant-o"])
def test_a_transform_is_one_product_before_each_layer(method: str) -> None:
    how = Transform(method, share=0.1)
    recipe = dataclasses.replace(alone(None, grouped(4)), transform=how)
    program = slimfx.compress(captured("mlp"), recipe, case("mlp").batches)
    assert count(program, aten.mul.Tensor) == 2
    for name, K in (("first", 16), ("second", 32)):
        c = parts(program, name)["input_scale"]
        assert (c.dtype, c.shape) == (torch.bfloat16, (K,))
        assert (c > 0).all() and c.isfinite().all()
        if method == "slim-quant-o":
            assert c.tolist().count(0.5) == round(0.1 * K)
            assert c.tolist().count(1) == K - round(0.1 * K)
    assert method in slimfx.plan(captured("mlp"), recipe).rows[0].method


def shifted_inputs() -> tuple[ExportedProgram, nn.Module, Tensor]:
    """Two linears with a bias, and inputs whose mean is not zero."""
    model = Chain(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    x = normal(1, 200, 16) + 2
    return slimfx.capture(model, (x,)), model, x


@pytest.mark.parametrize("method", ["one-shot", "joint"])
def test_correcting_the_bias_takes_the_mean_error_off_the_output(method: str) -> None:
    program, model, x = shifted_inputs()
    state = {name: bits(t) for name, t in program.state_dict.items()}
    prune = Prune("sparsegpt") if method == "joint" else Prune()
    adapter = Adapter("full" if method == "joint" else "slim-lora")
    recipes = [
        Recipe(prune, Quantize(), adapter, Solve(method, correct_bias=correct))
        for correct in (False, True)
    ]
    expected = answer(model, {"x": x})
    without, corrected = (slimfx.compress(program, recipe, [x]) for recipe in recipes)
    errors = [each.module()(x) - expected for each in (without, corrected)]
    assert errors[1].square().mean() < errors[0].square().mean()
    # the same compressed weights with the biases as they were
    own = {f"layers.{i}.bias": program.state_dict[f"layers.{i}.bias"] for i in (0, 2)}
    uncorrected = torch.func.functional_call(corrected.module(), own, (x,)) - expected
    assert errors[1].mean(0).norm() < 0.5 * uncorrected.mean(0).norm()
    assert {name: bits(t) for name, t in program.state_dict.items()} == state
    for name in ("layers.0.bias", "layers.2.bias"):
        assert bits(without.state_dict[name]) == state[name]
        assert bits(corrected.state_dict[name]) != state[name]
    sizes = [slimfx.plan(program, recipe).bytes_after for recipe in recipes]
    assert sizes[0] == sizes[1] == sum(t.nbytes for t in corrected.state_dict.values())


def test_the_mean_error_of_the_first_layer_is_zero_after_its_bias_was_corrected() -> None:
    model = Chain(nn.Linear(16, 24)).eval()
    x = normal(1, 200, 16) + 2
    recipe = Recipe(solve=Solve(correct_bias=True))
    program = slimfx.compress(slimfx.capture(model, (x,)), recipe, [x])
    error = program.module()(x) - answer(model, {"x": x})
    assert error.mean(0).abs().max() < 1e-4 * error.abs().max()


class OneForAll(nn.Module):
    """addmm with a bias that is not one value an output."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(1, 16, 8) / 4)
        self.b = nn.Parameter(normal(2, *shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x, self.w)


@pytest.mark.parametrize("shape", [(1,), (40, 1), (40, 8)])
def test_a_bias_that_is_not_one_value_an_output_is_left_alone(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    x = normal(3, 40, 16) + 2
    program = torch.export.export(OneForAll(*shape), (x,))
    recipe = Recipe(solve=Solve(correct_bias=True))
    small = slimfx.compress(program, recipe, [x])
    assert bits(small.state_dict["b"]) == bits(program.state_dict["b"])
    slimfx.save(small, tmp_path / "small.pt2")


@pytest.mark.parametrize("kind", ["tied", "in out", "llama"])
def test_layers_without_a_bias_of_their_own_are_compressed_as_without_correction(
    kind: str,
) -> None:
    each = case(kind)
    plain, corrected = (
        slimfx.compress(captured(kind), Recipe(solve=Solve(correct_bias=on)), each.batches)
        for on in (False, True)
    )
    changed = [k for k, t in plain.state_dict.items() if bits(corrected.state_dict[k]) != bits(t)]
    after = {"tied": ["c.bias"], "in out": ["bias"], "llama": []}[kind]
    assert changed == after


@pytest.mark.parametrize("low_rank_first", [False, True])
@pytest.mark.parametrize("weight", ["one-shot", "second-order"])
def test_alternating_leaves_less_error_than_one_shot(low_rank_first: bool, weight: str) -> None:
    prune = Prune("sparsegpt") if weight == "second-order" else Prune()
    adapter = Adapter("full", rank=4)
    solve = Solve("alternate", rounds=6, weight=weight, low_rank_first=low_rank_first)
    first = Solve("second-order" if weight == "second-order" else "one-shot")
    errors = []
    for how in (first, solve):
        recipe = Recipe(prune, grouped(4), adapter, how)
        program = slimfx.compress(captured("mlp"), recipe, case("mlp").batches)
        errors.append(error_of_first(program, recipe))
    assert errors[1] < errors[0]


def error_of_first(program: ExportedProgram, recipe: Recipe) -> float:
    """Of the output of `first` on what it was calibrated with."""
    each = case("mlp")
    emulated, _ = emulate(each, program, recipe)
    x = torch.cat([batch["x"] for batch in each.batches])
    E = emulated.first.weight.detach() - each.model.first.weight.detach()
    return float((x @ E.T).norm())


def test_each_layer_may_have_its_own_layout_transform_and_inputs() -> None:
    first = Override(
        "first",
        prune={"sparsity": 0.5},
        quantize=None,
        adapter=None,
        transform={"method": "smoothquant"},
        inputs={"format": "fp8"},
    )
    second = Override("second", prune=None, quantize={"bits": 8}, adapter={"bits": 4})
    recipe = Recipe(overrides=(first, second))
    program = slimfx.compress(captured("mlp"), recipe, case("mlp").batches)
    assert [layer.layout for layer in manifest_of(program).layers] == ["bitmask bf16", "int8"]
    assert set(parts(program, "first")) == {"values", "mask", "input_scale"}
    assert set(parts(program, "second")) == {
        "codes",
        "scale",
        *("L_codes", "L_scale", "R_codes", "R_scale"),
    }
    assert (count(program, quantize_fp8), count(program, linear_bitmask)) == (1, 1)
