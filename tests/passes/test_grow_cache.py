"""Decoders whose cache grows: step by step, padded or not, they say what the model says at once."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import RECIPES, VOCABULARY, captured, ids, tiny_gpt2, tiny_llama
from slimfx.passes.grow_cache import Grown, grow_cache, has_cache
from torch import Tensor, nn
from torch.export import ExportedProgram

import slimfx
from slimfx.errors import ArtifactError

LENGTH = 16
STEPS = (1, 3, 1, 2)
PADDED = (0, 2, 1)
"""Tokens of each row that are padding, at its start."""


def windowed() -> nn.Module:
    """Two layers, one of which sees three tokens, with scores that no fused attention computes."""
    config = transformers.Gemma2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCABULARY,
        sliding_window=3,
        initializer_range=0.2,
    )
    return transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager")


def made(model: Callable[..., nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return model(**options).eval()


def with_cache(model: nn.Module, *, length: int = LENGTH, batch: int = 1) -> ExportedProgram:
    return slimfx.capture(model, kv_cache=True, max_length=length, batch=batch)


def stepped(grown: Grown, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits of all tokens, a few at a time, from an empty past on."""
    program = grown.program
    sizes = {n.name: n.meta["val"].shape for n in program.graph.nodes if n.op == "placeholder"}
    names = [name.replace(".", "_") for name in grown.inputs]
    past = [torch.zeros(len(tokens), sizes[n][1], 0, sizes[n][3]) for n in names if "past" in n]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    module = program.module(check_guards=False)  # which ask for sizes of two or more
    found, start = [], 0
    for step in STEPS:
        end = start + step
        own = [tokens[:, start:end], mask[:, :end], positions[:, start:end]]
        with torch.no_grad():
            logits, *past = module(**dict(zip(names, [*own, *past], strict=True)))
        found.append(logits)
        start = end
    assert all(held.shape[2] == tokens.shape[1] for held in past)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("model", "options", "length", "batch"),
    [
        (tiny_llama, {}, LENGTH, 1),
        (tiny_llama, {"num_hidden_layers": 1}, 8, 2),  # as many slots as a head is wide
        (tiny_llama, {"attn_implementation": "eager", "num_hidden_layers": 1}, LENGTH, 4),
        (tiny_gpt2, {}, 32, 1),  # as many slots as the model is wide
        (windowed, {}, LENGTH, 1),
    ],
    ids=["llama", "llama-8", "llama-eager", "gpt2", "windowed"],
)
def test_steps_say_what_the_model_says_at_once(
    model: Callable[..., nn.Module], options: dict[str, Any], length: int, batch: int
) -> None:
    decoder = made(model, **options)
    grown = grow_cache(with_cache(decoder, length=length, batch=batch))
    assert grown.inputs[:3] == ("input_ids", "attention_mask", "position_ids")
    tokens = ids(5, len(PADDED), sum(STEPS))
    mask = torch.ones_like(tokens)
    for row, padding in enumerate(PADDED):
        mask[row, :padding] = 0
    found = stepped(grown, tokens, mask)
    assert found.isfinite().all()
    for row, padding in enumerate(PADDED):
        with torch.no_grad():
            expected = decoder(input_ids=tokens[row : row + 1, padding:], use_cache=False).logits[0]
        assert (found[row, padding:] - expected).abs().max() < 1e-4


def test_the_cache_becomes_inputs_and_outputs() -> None:
    program = with_cache(made(tiny_llama, num_hidden_layers=1))
    before = set(program.state_dict)
    assert has_cache(program) and not has_cache(captured("mlp"))
    grown = grow_cache(program)
    parts = ["0.key", "0.value"]
    assert grown.inputs[3:] == tuple(f"past_key_values.{part}" for part in parts)
    assert grown.outputs == ("logits", *(f"present.{part}" for part in parts))
    assert set(program.state_dict) == before
    assert not any("kv_cache" in name for name in grown.program.state_dict)
    assert grown.program.graph_signature.buffers_to_mutate == {}


def test_a_compressed_program_grows_as_well() -> None:
    program = with_cache(made(tiny_llama, num_hidden_layers=1))
    recipe = dataclasses.replace(RECIPES["slim"], adapter=None)
    batches = [{"input_ids": ids(1, 1, LENGTH), "cache_position": torch.arange(LENGTH)}]
    small = slimfx.compress(program, recipe, batches)
    grown = grow_cache(small)
    tokens = ids(5, 1, sum(STEPS))
    found = stepped(grown, tokens, torch.ones_like(tokens))
    with torch.no_grad():
        expected = small.module()(input_ids=tokens, cache_position=torch.arange(sum(STEPS)))
    assert (found - expected).abs().max() < 1e-4


def test_what_shows_no_length_is_refused() -> None:
    with pytest.raises(ArtifactError, match="the cache has 4 slots, 8 are needed"):
        grow_cache(with_cache(made(tiny_llama, num_hidden_layers=1), length=4))


class Toy(nn.Module):
    """Attention over tokens themselves, with or without a mask, times something of the length."""

    def __init__(self, *, masked: bool, times_length: bool) -> None:
        super().__init__()
        self.kv_cache = nn.ModuleList([nn.Module()])
        self.kv_cache[0].register_buffer("key", torch.zeros(1, 1, LENGTH, 4))
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.masked, self.times_length = masked, times_length

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        x = self.embedding(input_ids)[:, None]
        key = self.kv_cache[0].key.index_copy_(2, cache_position, x)
        slots = torch.arange(LENGTH)
        scores = x @ key.mT
        if self.masked:
            mask = (slots <= cache_position[:, None])[None, None]
            scores = torch.where(mask, scores, -1e9)
        answer = (scores.softmax(-1) @ key)[:, 0]
        return answer * slots.sum() if self.times_length else answer


def test_a_length_that_is_not_seen_is_noticed() -> None:
    given = (ids(1, 1, 6), torch.arange(6))
    sequence = torch.export.Dim("sequence", max=LENGTH)

    def toy(*, masked: bool = True, times_length: bool = False) -> ExportedProgram:
        made = Toy(masked=masked, times_length=times_length).eval()
        return torch.export.export(made, given, dynamic_shapes=({1: sequence}, {0: sequence}))

    assert grow_cache(toy()).inputs == ("input_ids", "attention_mask", "past_key_values.0.key")
    with pytest.raises(ArtifactError, match=r"the logits differ by .* of the largest, so its leng"):
        grow_cache(toy(times_length=True))
    with pytest.raises(ArtifactError, match="attends without a mask"):
        grow_cache(toy(masked=False))


class Odd(nn.Module):
    """Keeps sums instead of tokens, under the names of a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_cache = nn.ModuleList([nn.Module()])
        self.kv_cache[0].register_buffer("key", torch.zeros(1, 1, LENGTH, 4))

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        self.kv_cache[0].key.add_(input_ids.sum())
        return self.kv_cache[0].key + cache_position.sum()


class Unasked(Odd):
    """Takes something else than tokens and their positions."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.kv_cache[0].key + x


def test_a_cache_that_is_used_otherwise_is_refused() -> None:
    given = (ids(1, 1, 4), torch.arange(4))
    with pytest.raises(ArtifactError, match=re.escape("kv_cache.0.key: is not written once by")):
        grow_cache(torch.export.export(Odd(), given))
    with pytest.raises(ArtifactError, match="a program with a cache takes x, not input_ids and"):
        grow_cache(torch.export.export(Unasked(), (torch.ones(4),)))
