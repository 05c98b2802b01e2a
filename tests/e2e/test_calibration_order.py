"""What each layer is solved from: the compressed layers before it, and tokens that count."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from models import (
    KINDS,
    RECIPES,
    Chain,
    bits,
    captured,
    case,
    compressed,
    ids,
    normal,
    same_tensors,
)
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.pack import pack_24
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import linear, relu

import slimfx
from slimfx.methods.stats import Stats, add_tokens, empty_stats
from slimfx.recipe import Recipe
from slimfx.solve import Solution, solve

SLIM = Recipe.preset("slim")
PLAIN = dataclasses.replace(SLIM, adapter=None)


def by_hand(
    model: Chain, batches: list[Tensor], recipe: Recipe, *, compress_before: bool
) -> dict[str, Tensor]:
    """The tensors of a chain of linears: solve, replace, go on with what comes out."""
    found = {}
    for i, layer in enumerate(model.layers):
        stats = empty_stats(layer.in_features)
        for x in batches:
            stats = add_tokens(stats, x)
        how = recipe.for_layer(f"layers.{i}")
        solution = solve(f"layers.{i}", layer.weight, stats, how)
        found |= stored(f"layers.{i}", solution)
        weight = solution.dense() if compress_before else layer.weight
        with torch.no_grad():
            batches = [linear(x, weight, layer.bias) for x in batches]
    return found


def stored(name: str, solution: Solution) -> dict[str, Tensor]:
    values, indices = pack_24(solution.weight.codes, 4)
    parts = {"values": values, "indices": indices, "scale": solution.weight.scale}
    if solution.L is not None:
        parts |= {"L": solution.L, "R": solution.R}
    return {f"{name}.slim_{part}": tensor for part, tensor in parts.items()}


def slim_tensors(program: ExportedProgram) -> dict[str, Tensor]:
    return {name: t for name, t in program.state_dict.items() if ".slim_" in name}


@pytest.mark.parametrize("recipe", [SLIM, PLAIN], ids=["slim", "without adapter"])
def test_a_block_is_calibrated_on_the_compressed_output_of_the_one_before(recipe: Recipe) -> None:
    model = Chain(nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 8))
    batches = [normal(1, 40, 16), normal(2, 24, 16) * 3]
    program = slimfx.capture(model, (normal(3, 4, 16),))
    found = slim_tensors(slimfx.compress(program, recipe, batches))
    assert same_tensors(found, by_hand(model, batches, recipe, compress_before=True))
    dense = by_hand(model, batches, recipe, compress_before=False)
    assert [k for k in found if bits(found[k]) != bits(dense[k])]


def test_a_skipped_block_passes_its_dense_output_on() -> None:
    model = Chain(nn.Linear(16, 24), nn.Linear(24, 16))
    batches = [normal(1, 40, 16)]
    program = slimfx.capture(model, (normal(3, 4, 16),))
    recipe = dataclasses.replace(SLIM, skip=("layers.0",))
    found = slim_tensors(slimfx.compress(program, recipe, batches))
    with torch.no_grad():
        after = [model.layers[0](x) for x in batches]
    rest = by_hand(Chain(model.layers[1]), after, SLIM, compress_before=True)
    assert same_tensors(found, {k.replace("layers.0", "layers.1"): t for k, t in rest.items()})


def test_two_parameters_over_one_storage_count_as_one_weight_in_every_block() -> None:
    shared, last = nn.Linear(16, 16), nn.Linear(16, 8)
    model = Chain(shared, nn.Linear(16, 16), last)
    model.layers[1].weight = shared.weight
    batches = [normal(1, 40, 16)]
    tied = slimfx.compress(slimfx.capture(model, (batches[0],)), SLIM, batches)
    model.layers[1].weight = nn.Parameter(shared.weight.data)
    alias = slimfx.compress(slimfx.capture(model, (batches[0],)), SLIM, batches)
    assert same_tensors(slim_tensors(tied), slim_tensors(alias))


@pytest.fixture
def observations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each tensor that statistics are taken of, as they come."""
    seen: list[int] = []

    def counted(stats: Stats, x: Tensor) -> Stats:
        seen.append(len(x))
        return add_tokens(stats, x)

    monkeypatch.setattr("slimfx.calibrate.add_tokens", counted)
    return seen


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [("llama", 2 * 4), ("gpt2", 2 * 4), ("bert", 2 * 4), ("mlp", 2), ("encoder layer", 4)],
)
def test_linears_with_one_input_share_its_statistics(
    kind: str, inputs: int, observations: list[int]
) -> None:
    batches = case(kind).batches
    slimfx.compress(captured(kind), SLIM, batches)
    assert len(observations) == inputs * len(batches)


def test_linears_that_share_statistics_are_those_of_one_input() -> None:
    model = Chain(Fork())
    batches = [normal(1, 40, 16), normal(2, 40, 16)]
    program = slimfx.capture(model, (batches[0],))
    found = slim_tensors(slimfx.compress(program, SLIM, batches))
    fork = model.layers[0]
    for name, layer, inputs in (
        ("left", fork.left, batches),
        ("right", fork.right, batches),
        ("squared", fork.squared, [x * x for x in batches]),
    ):
        alone = by_hand(Chain(layer), inputs, SLIM, compress_before=True)
        renamed = {k.replace("layers.0", f"layers.0.{name}"): t for k, t in alone.items()}
        assert same_tensors({k: found[k] for k in renamed}, renamed), name


class Fork(nn.Module):
    """Two linears of x and one of x * x."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(16, 16)
        self.right = nn.Linear(16, 24)
        self.squared = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.squared(x * x) + self.right(x)[:, :16]


def test_a_weight_used_twice_gets_the_statistics_of_both_inputs() -> None:
    model = Twice()
    batches = [normal(1, 40, 16)]
    program = slimfx.capture(model, (batches[0],))
    found = slim_tensors(slimfx.compress(program, SLIM, batches))
    with torch.no_grad():
        inputs = [batches[0], relu(model.a(batches[0]))]
    stats = empty_stats(16)
    for x in inputs:
        stats = add_tokens(stats, x)
    expected = stored("a", solve("a", model.a.weight, stats, SLIM.for_layer("a")))
    assert same_tensors(found, expected)
    assert manifest_of(slimfx.compress(program, SLIM, batches)).layers[0].tokens == 80


class Twice(nn.Module):
    """The same linear two times."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(relu(self.a(x)))


class AddInPlace(nn.Module):
    """x + a(x), written to the memory of x or not."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y)
        if not self.in_place:
            return y + z
        y += z
        return y


class ScaleInPlace(nn.Module):
    """A linear of 2 x, where x is doubled in its own memory or not."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.mul_(2) if self.in_place else x * 2)


@pytest.mark.parametrize("block", [AddInPlace, ScaleInPlace])
def test_an_operation_in_place_changes_no_statistics(block: Callable[..., nn.Module]) -> None:
    models = [
        Chain(*(block(in_place=in_place) for _ in range(3))).eval() for in_place in (True, False)
    ]
    models[1].load_state_dict(models[0].state_dict())
    programs = [slimfx.capture(model, (normal(1, 4, 16),)) for model in models]
    assert any(str(n.target).endswith("_.Tensor") for n in programs[0].graph.nodes)
    found = [slimfx.compress(program, SLIM, [normal(2, 40, 16)]) for program in programs]
    assert same_tensors(found[0].state_dict, found[1].state_dict)


def test_a_reshape_before_the_first_block_is_no_obstacle() -> None:
    model = Flattened()
    x = normal(1, 5, 8, 16)
    program = slimfx.capture(model, (x,))
    found = slim_tensors(slimfx.compress(program, SLIM, [x]))
    flat = [torch.tanh(x).reshape(-1, 16)]
    assert same_tensors(found, by_hand(model, flat, SLIM, compress_before=True))


class Flattened(Chain):
    """Flattens before the numbered container."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(x).reshape(-1, 16))


def padded(seed: int, garbage: int, side: str) -> dict[str, Tensor]:
    """Six rows of 40 tokens of which four count; `seed` draws those, `garbage` the others."""
    mask = torch.zeros(6, 40, dtype=torch.int64)
    mask[:, :4] = 1
    if side == "left":
        mask = mask.flip(1)
    tokens = torch.where(mask == 1, ids(seed, 6, 40), ids(garbage, 6, 40))
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_in_the_padding_does_not_change_a_byte(side: str) -> None:
    program = captured("bert")
    one, two = padded(1, 8, side), padded(1, 9, side)
    assert not torch.equal(one["input_ids"], two["input_ids"])
    first, second = (slimfx.compress(program, "slim-q", [batch]) for batch in (one, two))
    other = slimfx.compress(program, "slim-q", [padded(2, 8, side)])
    tensors = [slim_tensors(each) for each in (first, second, other)]
    assert same_tensors(tensors[0], tensors[1])
    assert not same_tensors(tensors[0], tensors[2])


def test_an_encoder_counts_the_tokens_that_its_mask_keeps() -> None:
    batches = [padded(1, 8, "right"), padded(2, 9, "left"), *case("bert").batches]
    program = slimfx.compress(captured("bert"), SLIM, batches)
    kept = sum(int(batch["attention_mask"].sum()) for batch in batches)
    tokens = {layer.name: layer.tokens for layer in manifest_of(program).layers}
    assert set(tokens.values()) == {kept} and len(tokens) == 12


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen2"])
def test_a_decoder_counts_every_token(kind: str) -> None:
    tokens = sum(batch["input_ids"].numel() for batch in case(kind).batches)
    layers = manifest_of(compressed(kind, "slim")).layers
    assert Counter(layer.tokens for layer in layers) == {tokens: len(layers)}


def test_shared_layers_count_the_tokens_of_every_use() -> None:
    kept = sum(int(batch["attention_mask"].sum()) for batch in case("albert").batches)
    tokens = {x.name: x.tokens for x in manifest_of(compressed("albert", "slim")).layers}
    shared = [n for name, n in tokens.items() if "albert_layers" in name]
    assert shared == [2 * kept] * 6
    assert tokens["model.encoder.embedding_hidden_mapping_in"] == kept


class Transposing(nn.Module):
    """torch's own encoder, which works on [tokens, batch, width] inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.encoder(x, src_key_padding_mask=attention_mask == 0)


def test_padding_is_not_counted_where_a_model_transposes_its_batch() -> None:
    batch = padded(1, 8, "right")
    dims = {0: Dim("batch"), 1: Dim("sequence")}
    program = slimfx.capture(Transposing(), batch, dynamic_shapes=dict.fromkeys(batch, dims))
    layers = manifest_of(slimfx.compress(program, SLIM, [batch])).layers
    assert {layer.name: layer.tokens for layer in layers} == {layer.name: 24 for layer in layers}


@pytest.mark.parametrize("kind", KINDS)
def test_splitting_the_batches_changes_no_count_and_hardly_a_number(kind: str) -> None:
    batches = case(kind).batches
    halves = [
        dict(zip(batch, parts, strict=True))
        for batch in batches
        for parts in zip(*(t.chunk(2) for t in batch.values()), strict=True)
    ]
    whole = manifest_of(compressed(kind, "slim")).layers
    split = manifest_of(slimfx.compress(captured(kind), RECIPES["slim"], halves)).layers
    assert [layer.tokens for layer in split] == [layer.tokens for layer in whole]
    for one, two in zip(whole, split, strict=True):
        assert abs(one.snr - two.snr) < 0.5, one.name
