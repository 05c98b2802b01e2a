"""One linear solved: values in their pattern, an adapter that helps, refusals by name."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from slimfx.errors import SolveError
from slimfx.methods.magnitude import magnitude
from slimfx.methods.masks import NofM, Pattern, keep
from slimfx.methods.quantized import Quantized, as_float, largest_code, quantize
from slimfx.methods.slim_quant import slim_quant
from slimfx.methods.stats import Stats, add_tokens, empty_stats
from slimfx.methods.wanda import wanda
from slimfx.recipe import PRESETS, Recipe
from slimfx.solve import Solution, solve
from slimfx.steps import Adapter, Inputs, LayerRecipe, Prune, Quantize, Solve, Transform

NAME = "layers.3.mlp.up"


SPARSEGPT = Prune("sparsegpt")
HALF = Prune(sparsity=0.5, scope="layer")
MORE = {
    "2:4 floats": LayerRecipe(Prune(), None, None),
    "half of the layer, 3 bits": LayerRecipe(HALF, Quantize("absmax", bits=3), Adapter("qera")),
    "a third of each row, 2 bits": LayerRecipe(
        Prune("magnitude", sparsity=1 / 3),
        Quantize("absmax", bits=2, granularity="group", group=10),
        Adapter(sparse=True, bits=4, group=7),
    ),
    "8 bits of each output": LayerRecipe(
        None, Quantize("absmax", bits=8, granularity="channel"), Adapter("l2qer", bits=32)
    ),
    "sparsegpt floats": LayerRecipe(SPARSEGPT, None, None, Solve("second-order")),
    "sparsegpt of half the layer": LayerRecipe(
        dataclasses.replace(HALF, method="sparsegpt"), None, None, Solve("second-order")
    ),
    "joint floats": LayerRecipe(SPARSEGPT, None, Adapter("full"), Solve("joint", rounds=2)),
    "joint of half of each row": LayerRecipe(
        Prune("sparsegpt", sparsity=0.5), Quantize(), None, Solve("joint", rounds=2)
    ),
    "joint in few bits, sparse": LayerRecipe(
        SPARSEGPT, Quantize(bits=3), Adapter("full", bits=4, sparse=True), Solve("joint", rounds=2)
    ),
    "sparsegpt after awq": LayerRecipe(
        SPARSEGPT, Quantize(), None, Solve("second-order"), Transform("awq")
    ),
    "joint after smoothquant": LayerRecipe(
        SPARSEGPT,
        Quantize(),
        Adapter("full"),
        Solve("joint", rounds=2, correct_bias=True),
        Transform("smoothquant"),
        Inputs(),
    ),
    "alternating after salient channels": LayerRecipe(
        Prune(),
        Quantize(),
        Adapter("l2qer"),
        Solve("alternate", rounds=3),
        Transform("slim-quant-o", share=0.1),
    ),
}
"""Combinations that no preset has."""


def settings(name: str) -> LayerRecipe:
    """What a preset, or one of the recipes above, says of a layer."""
    if name in MORE:
        return MORE[name]
    layer = Recipe.preset(name).for_layer(NAME)
    assert layer is not None
    return layer


SOLVED = [name for name, recipe in PRESETS.items() if recipe.tune is None] + list(MORE)


def slack(name: str) -> float:
    """Decibels two equally good solutions may differ by: alternation amplifies rounding."""
    how = settings(name)
    return 0.25 if how.solve.method == "one-shot" and how.transform is None else 1.0


def inputs(K: int, tokens: int = 300) -> Tensor:
    """Tokens [tokens, K] near a few directions, with channels of unequal size."""
    x = torch.randn(tokens, 8) @ torch.randn(8, K) + torch.randn(tokens, K)
    return x * torch.logspace(-0.5, 0.5, K)


def stats_of(x: Tensor) -> Stats:
    return add_tokens(empty_stats(x.shape[1], covariance=True), x)


def decibels(W: Tensor, Wc: Tensor, x: Tensor) -> float:
    """Signal to noise of the output for inputs with the second moments of x but no correlation."""
    rms = x.double().square().mean(0).sqrt()
    signal = (W.double() * rms).square().sum()
    return 10 * math.log10(signal / ((W.double() - Wc.double()) * rms).square().sum())


def goal(name: str, W: Tensor, Wc: Tensor, x: Tensor) -> float:
    """Signal to noise as the method sees it: of x as it is where it uses the covariance."""
    if not settings(name).needs_covariance:
        return decibels(W, Wc, x)
    signal, noise = (x.double() @ w.T for w in (W.double(), W.double() - Wc.double()))
    return 10 * math.log10(signal.square().sum() / noise.square().sum())


def tensors(solution: Solution) -> list[Tensor]:
    """Everything that will be stored."""
    found = []
    for part in (
        *(solution.weight, solution.L, solution.R),
        *(solution.input_scale, solution.bias_shift),
    ):
        if isinstance(part, Quantized):
            found += [part.codes, part.scale]
        elif part is not None:
            found.append(part)
    return found


def check_form(solution: Solution, how: LayerRecipe, N: int, K: int) -> None:
    """Everything is stored as the recipe says and finite, and the values keep to the pattern."""
    assert all(tensor.isfinite().all() for tensor in tensors(solution))
    weight = solution.weight
    if how.quantize is None:
        assert isinstance(weight, Tensor)
        assert (weight.dtype, weight.shape) == (torch.bfloat16, (N, K))
        values = weight
    else:
        assert isinstance(weight, Quantized)
        assert (weight.codes.dtype, weight.codes.shape) == (torch.int8, (N, K))
        assert weight.codes.abs().max() <= largest_code(how.quantize.bits)
        assert weight.scale.dtype is torch.bfloat16
        values = weight.codes
    assert within(values != 0, how.pattern)
    scale = solution.input_scale
    assert (scale is None) == (how.transform is None)
    if scale is not None:
        assert (scale.dtype, scale.shape) == (torch.bfloat16, (K,))
        assert (scale > 0).all()
    assert (solution.L is None) == (solution.R is None) == (how.adapter is None)
    if how.adapter is not None:
        rank = how.adapter.rank_for(N, K)
        L, R = as_float(solution.L), as_float(solution.R)
        assert (L.shape, R.shape) == ((rank, K), (N, rank))
        if how.adapter.sparse:
            assert within(L != 0, NofM(2, 4))


def within(kept: Tensor, pattern: Pattern | None) -> bool:
    """Are the weights that stay among those of a mask of the pattern?"""
    if pattern is None:
        return True
    return bool((keep(kept.float(), pattern) | ~kept).all())


@pytest.mark.parametrize("preset", SOLVED)
@pytest.mark.parametrize(("N", "K"), [(32, 128), (96, 64), (5, 128), (64, 4)])
def test_what_is_stored_has_the_form_and_the_pattern_of_the_recipe(
    preset: str, N: int, K: int
) -> None:
    how = settings(preset)
    solution = solve(NAME, torch.randn(N, K), stats_of(inputs(K)), how, has_bias=True)
    check_form(solution, how, N, K)
    values = solution.weight.codes if how.quantize else solution.weight
    if how.pattern is not None and how.quantize is None:  # of floats, none is zero by chance
        assert int((values != 0).sum()) == how.pattern.kept(N, K)


def test_the_codes_are_those_of_the_whole_weight_where_the_mask_lets_them_stay() -> None:
    W, stats = torch.randn(24, 64), stats_of(inputs(64))
    scale = slim_quant(W, bits=4, granularity="tensor", group=128)
    coded = quantize(W, scale, group=128, bits=4)
    for method, prune in (("wanda", wanda), ("magnitude", magnitude)):
        for how in (Prune(method, 1, 8), Prune(method, sparsity=0.4), HALF):
            how = dataclasses.replace(how, method=method)
            solution = solve(NAME, W, stats, LayerRecipe(how, Quantize(), None))
            mask = keep(prune(W, stats), how.pattern)
            assert torch.equal(solution.weight.scale, scale)
            assert torch.equal(solution.weight.codes, coded.codes * mask)
            floats = solve(NAME, W, stats, LayerRecipe(how, None, None))
            assert torch.equal(floats.weight, (W * mask).bfloat16())


def test_a_mask_that_is_given_is_the_mask_of_every_solver() -> None:
    W, stats = torch.randn(24, 64), stats_of(inputs(64))
    mask = keep(torch.rand(24, 64), NofM(2, 4))
    prune = Prune("mask-file", path="masks.npz")
    for quantize_step in (None, Quantize("absmax")):
        for adapter, how in ((None, Solve()), (Adapter(), Solve("alternate", rounds=2))):
            for transform in (None, Transform("smoothquant"), Transform("awq")):
                if quantize_step is None and transform == Transform("awq"):
                    continue
                recipe = LayerRecipe(prune, quantize_step, adapter, how, transform)
                solution = solve(NAME, W, stats, recipe, mask=mask)
                assert not as_float(solution.weight)[~mask].any()
                assert (as_float(solution.weight)[mask] != 0).float().mean() > 0.7


def test_no_pruning_keeps_every_code_and_no_adapter_leaves_none() -> None:
    W, stats = torch.randn(24, 64), stats_of(inputs(64))
    solution = solve(NAME, W, stats, LayerRecipe(None, Quantize(), None))
    assert (solution.weight.codes.abs() >= 1).float().mean() > 0.8  # 0.84
    assert solution.L is None
    assert solution.R is None
    assert torch.equal(solution.dense(), solution.weight.dense())
    assert solution.snr == solution.snr_without_adapter


@pytest.mark.parametrize("method", ["naive", "slim-lora"])
@pytest.mark.parametrize("bits", [4, 16, 32])
@pytest.mark.parametrize(("N", "K"), [(32, 128), (96, 32), (48, 48)])
@pytest.mark.parametrize("rank", [0.1, 8, 0.9])
def test_the_adapter_raises_the_signal_to_noise(
    method: str, bits: int, N: int, K: int, rank: float
) -> None:
    recipe = LayerRecipe(Prune(), Quantize(), Adapter(method, rank, bits, group=16))
    solution = solve(NAME, torch.randn(N, K), stats_of(inputs(K)), recipe)
    assert solution.snr > solution.snr_without_adapter + 0.5  # 0.84 dB more at the least


@pytest.mark.parametrize(
    ("preset", "bar"),
    # 8.72, 9.20, 10.09, 10.91 and 10.86 dB
    [("magnitude", 8.5), ("wanda", 9.0), ("naive-lora", 9.8), ("slim", 10.6), ("slim-q", 10.6)],
)
def test_the_quality_of_a_preset_on_a_gaussian_weight(preset: str, bar: float) -> None:
    W, x = torch.randn(64, 128), inputs(128)
    solution = solve(NAME, W, stats_of(x), settings(preset))
    assert solution.snr > bar
    assert solution.snr == pytest.approx(decibels(W, solution.dense(), x), abs=1e-3)
    without = decibels(W, solution.weight.dense(), x)
    assert solution.snr_without_adapter == pytest.approx(without, abs=1e-3)


@pytest.mark.parametrize(("bits", "dtype"), [(16, torch.bfloat16), (32, torch.float32)])
def test_a_float_adapter_has_the_dtype_of_its_bits(bits: int, dtype: torch.dtype) -> None:
    recipe = LayerRecipe(Prune(), Quantize(), Adapter(rank=5, bits=bits))
    for N, K in ((12, 40), (40, 12)):
        solution = solve(NAME, torch.randn(N, K), stats_of(inputs(K)), recipe)
        for part, shape in ((solution.L, (5, K)), (solution.R, (N, 5))):
            assert isinstance(part, Tensor)
            assert part.dtype == dtype
            assert part.shape == shape
            assert part.is_contiguous()


def test_a_four_bit_adapter_is_codes_with_a_scale_per_group() -> None:
    recipe = LayerRecipe(Prune(), Quantize(), Adapter(rank=20, bits=4, group=16))
    solution = solve(NAME, torch.randn(24, 40), stats_of(inputs(40)), recipe)
    for part, shape, groups in ((solution.L, (20, 40), 3), (solution.R, (24, 20), 2)):
        assert isinstance(part, Quantized)
        assert part.group == 16
        assert part.codes.shape == shape
        assert part.codes.dtype == torch.int8
        assert part.codes.abs().max() <= 7
        assert part.scale.shape == (shape[0], groups)
        assert part.scale.dtype == torch.bfloat16


def test_the_dense_weight_is_the_sum_of_what_is_stored() -> None:
    solution = solve(NAME, torch.randn(24, 40), stats_of(inputs(40)), settings("slim-q"))
    assert solution.L is not None
    assert solution.R is not None
    product = as_float(solution.R).double() @ as_float(solution.L).double()
    expected = solution.weight.dense().double() + product
    torch.testing.assert_close(solution.dense().double(), expected, rtol=0, atol=1e-6)


def test_the_dense_weight_is_the_one_that_the_unscaled_input_meets() -> None:
    W, x = torch.randn(24, 40), inputs(40)
    how = dataclasses.replace(settings("slim-q"), transform=Transform("smoothquant"))
    solution = solve(NAME, W, stats_of(x), how)
    c = solution.input_scale.double()
    parts = solution.weight.dense() + as_float(solution.R) @ as_float(solution.L)
    y = (x.double() * c) @ parts.double().T
    found = x.double() @ solution.dense().double().T
    torch.testing.assert_close(found, y, rtol=0, atol=1e-6 * float(y.abs().max()))
    assert solution.snr == pytest.approx(decibels(W, solution.dense(), x), abs=1e-3)


@pytest.mark.parametrize("preset", SOLVED)
def test_the_bias_takes_up_the_mean_error_where_there_is_one(preset: str) -> None:
    W, x = torch.randn(24, 40), inputs(40) + torch.randn(40)
    base = settings(preset)
    how = dataclasses.replace(base, solve=dataclasses.replace(base.solve, correct_bias=True))
    solution = solve(NAME, W, stats_of(x), how, has_bias=True)
    assert solution.bias_shift.dtype is torch.float32
    E = W.double() - solution.dense().double()
    expected = E @ x.double().mean(0)
    torch.testing.assert_close(solution.bias_shift.double(), expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 1e-2
    assert solve(NAME, W, stats_of(x), how).bias_shift is None
    without = dataclasses.replace(how, solve=dataclasses.replace(how.solve, correct_bias=False))
    assert solve(NAME, W, stats_of(x), without, has_bias=True).bias_shift is None


def test_a_solver_that_knows_of_the_bias_leaves_less_error_about_the_mean() -> None:
    W, x = torch.randn(24, 40), inputs(40) + 10 * torch.randn(40)
    recipe = LayerRecipe(Prune(), Quantize(), Adapter("full"), Solve(correct_bias=True))

    def spread(solution: Solution) -> Tensor:
        error = x.double() @ (W.double() - solution.dense().double()).T
        return (error - error.mean(0)).norm()

    aware, unaware = (solve(NAME, W, stats_of(x), recipe, has_bias=has) for has in (True, False))
    assert spread(aware) < 0.95 * spread(unaware)  # 0.83


@pytest.mark.parametrize("preset", SOLVED)
def test_an_all_zero_weight_stays_zero_and_finite(preset: str) -> None:
    solution = solve(NAME, torch.zeros(16, 32), stats_of(inputs(32)), settings(preset))
    assert not solution.dense().any()
    assert all(tensor.isfinite().all() for tensor in tensors(solution))
    assert solution.clipped == 0
    assert solution.snr == math.inf
    assert "every weight is zero" in " ".join(solution.notes)


KINDS = {
    "constant": (),
    "rank one": (),
    "zero column": (),
    "zero rows": (),
    "one row": (),
    "dead inputs": ("7 of 32 inputs were zero in every calibration token",),
    "all inputs dead": ("32 of 32 inputs were zero",),
    "equal inputs": (),
    "one token": ("1 tokens cannot fill a covariance of 32 inputs",),
    "few tokens": ("5 tokens cannot fill a covariance of 32 inputs",),
}
"""What is odd of a weight or its inputs, and the note that says which rule was followed."""


@pytest.mark.parametrize("preset", SOLVED)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_weights_and_inputs_give_a_finite_solution_with_a_note(preset: str, kind: str) -> None:
    W, x = torch.randn(16, 32), inputs(32)
    if kind == "constant":
        W = torch.full((16, 32), 0.3)
    elif kind == "rank one":
        W = W[:, :1] @ W[:1]
    elif kind == "zero column":
        W[:, 3] = 0
    elif kind == "zero rows":
        W[::3] = 0
    elif kind == "one row":
        W = W[:1]
    elif kind == "dead inputs":
        x[:, ::5] = 0
    elif kind == "all inputs dead":
        x.zero_()
    elif kind == "equal inputs":
        x = x[:, :2].repeat(1, 16)
    else:
        x = x[: {"one token": 1, "few tokens": 5}[kind]]
    how = settings(preset)
    solution = solve(NAME, W, stats_of(x), how, has_bias=True)
    check_form(solution, how, *W.shape)
    for note in KINDS[kind]:
        if "fill" in note and not how.needs_covariance:
            continue
        assert any(found.startswith(note) for found in solution.notes)
    if kind == "all inputs dead":
        return  # nothing can be heard of the error
    # 2.85 dB at worst, the constant weight under jsq
    assert goal(preset, W, solution.dense(), x) > 2.6


@pytest.mark.parametrize("preset", SOLVED)
def test_a_layer_with_nothing_out_of_the_ordinary_has_no_note(preset: str) -> None:
    assert solve(NAME, torch.randn(16, 32), stats_of(inputs(32)), settings(preset)).notes == ()


@pytest.mark.parametrize("preset", ["naive-lora", "slim", "slim-q"])
@pytest.mark.parametrize("least", [1e-3, 1e-6, 1e-8, 1e-12])
@pytest.mark.parametrize(("N", "K"), [(128, 64), (64, 128)])
def test_an_input_that_is_almost_dead_costs_the_adapter_nothing(
    preset: str, least: float, N: int, K: int
) -> None:
    W, x = torch.randn(N, K), inputs(K)
    x[:, 5] = 0
    usual = solve(NAME, W, stats_of(x), settings(preset)).snr
    x[:, 4] *= least
    # within 0.06 dB where the column stays small
    assert solve(NAME, W, stats_of(x), settings(preset)).snr == pytest.approx(
        usual, abs=slack(preset)
    )


@pytest.mark.parametrize("preset", SOLVED)
def test_no_token_at_all_gives_a_finite_solution(preset: str) -> None:
    stats = stats_of(inputs(32, 0))
    solution = solve(NAME, torch.randn(16, 32), stats, settings(preset), has_bias=True)
    check_form(solution, settings(preset), 16, 32)
    assert not math.isnan(solution.snr)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused_by_the_name_of_its_layer(bad: float) -> None:
    W = torch.randn(8, 16)
    W[2, 3] = W[5, 1] = bad
    with pytest.raises(SolveError, match=rf"^{NAME}: 2 of 128 weights"):
        solve(NAME, W, stats_of(inputs(16)), settings("slim"))


@pytest.mark.parametrize("factor", [1e-25, 1e-10, 1e10, 1e25])
@pytest.mark.parametrize("preset", SOLVED)
def test_a_finite_weight_of_any_size_is_solved_as_well_or_refused_by_name(
    preset: str, factor: float
) -> None:
    W, x = torch.randn(16, 32), inputs(32)
    usual = solve(NAME, W, stats_of(x), settings(preset))
    try:
        solution = solve(NAME, W * factor, stats_of(x), settings(preset))
    except SolveError as refusal:
        assert str(refusal).startswith(f"{NAME}: ")
        assert factor in (1e-25, 1e25)
        return
    assert all(tensor.isfinite().all() for tensor in tensors(solution))
    # the scale of another factor rounds otherwise: 0.02 dB apart, 0.92 after a search
    expected = pytest.approx(goal(preset, W, usual.dense(), x), abs=slack(preset))
    assert goal(preset, W.double() * factor, solution.dense(), x) == expected
    recomputed = decibels(W.double() * factor, solution.dense(), x)
    assert solution.snr == pytest.approx(recomputed, abs=1e-2)


@pytest.mark.parametrize("factor", [1e-20, 1e15])
@pytest.mark.parametrize("preset", SOLVED)
def test_the_units_of_the_inputs_do_not_matter(preset: str, factor: float) -> None:
    W, x = torch.randn(16, 32), inputs(32)
    usual = solve(NAME, W, stats_of(x), settings(preset))
    solution = solve(NAME, W, stats_of(x * factor), settings(preset))
    expected = pytest.approx(goal(preset, W, usual.dense(), x), abs=slack(preset))
    assert goal(preset, W, solution.dense(), x) == expected


@pytest.mark.parametrize("preset", SOLVED)
def test_gives_the_same_bits_twice_whatever_the_random_state(preset: str) -> None:
    W, stats = torch.randn(48, 64), stats_of(inputs(64))
    once = solve(NAME, W, stats, settings(preset))
    torch.manual_seed(1234)
    twice = solve(NAME, W, stats, settings(preset))
    assert all(torch.equal(a, b) for a, b in zip(tensors(once), tensors(twice), strict=True))
    assert once.snr == twice.snr


@pytest.mark.parametrize("preset", SOLVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_and_the_statistics_are_only_read(preset: str, dtype: torch.dtype) -> None:
    W, stats = torch.randn(16, 32).to(dtype), stats_of(inputs(32))
    parts = (W, stats.abs_sum, stats.square_sum, stats.peak, stats.value_sum, stats.product_sum)
    before = [part.clone() for part in parts]
    solution = solve(NAME, W, stats, settings(preset), has_bias=True)
    for tensor in tensors(solution):
        tensor.zero_()  # nor does the solution share memory with them
    assert all(torch.equal(a, b) for a, b in zip(parts, before))


def test_a_parameter_is_solved_without_a_graph() -> None:
    W = torch.nn.Parameter(torch.randn(16, 32))
    solution = solve(NAME, W, stats_of(inputs(32)), settings("slim"))
    assert not any(tensor.requires_grad for tensor in tensors(solution))


def test_a_bfloat16_weight_is_solved_as_the_float32_weight_of_the_same_value() -> None:
    W, stats = torch.randn(16, 32).to(torch.bfloat16), stats_of(inputs(32))
    low, high = (solve(NAME, w, stats, settings("slim")) for w in (W, W.float()))
    assert all(torch.equal(a, b) for a, b in zip(tensors(low), tensors(high), strict=True))


def test_clipped_counts_the_weights_beyond_the_largest_code() -> None:
    W, stats = torch.randn(64, 128), stats_of(inputs(128))
    solution = solve(NAME, W, stats, LayerRecipe(None, Quantize(), None))
    step = solution.weight.scale.item()
    beyond = sum(abs(w) / step > 7.5 for w in W.double().flatten().tolist())
    assert beyond > 0
    assert solution.clipped == pytest.approx(beyond / W.numel(), rel=1e-6)
    grouped = LayerRecipe(None, Quantize("absmax", granularity="group", group=16), None)
    assert solve(NAME, W, stats, grouped).clipped == 0
