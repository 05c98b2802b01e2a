"""Programs with a cache say token for token what the model says that reads everything again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from models import (
    LONGEST,
    answer,
    aten,
    bits,
    ids,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_qwen2,
    tiny_vit,
)
from slimfx.passes.inputs import module_of, tensor_inputs
from torch import Tensor, nn
from torch.export import ExportedProgram

import slimfx
from slimfx.errors import CaptureError

WINDOW = 7
PROMPT = 11
TOKENS = 20
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.2,
}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
    "qwen2": tiny_qwen2,
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=WINDOW)
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**SIZES, tie_word_embeddings=False)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(  # one layer with a window, one without
        transformers.Gemma2Config(
            **SIZES, sliding_window=WINDOW, query_pre_attn_scalar=8, tie_word_embeddings=False
        )
    ),
}


@cache
def model_of(kind: str) -> nn.Module:
    """The one model of a family; nothing may write to it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[kind]().eval()


@cache
def cached(kind: str, batch: int = 1) -> ExportedProgram:
    """Its program with a cache."""
    return slimfx.capture(model_of(kind), kv_cache=True, batch=batch)


@torch.no_grad()
def stepped(run: Callable[..., Tensor], prompt: Tensor, tokens: int = TOKENS) -> list[list[int]]:
    """Greedy tokens of each row: the prompt once, then one token at a time."""
    found, new, place = [], prompt, torch.arange(prompt.shape[1])
    for _ in range(tokens):
        new = run(input_ids=new, cache_position=place)[:, -1:].argmax(-1)
        place = place[-1:] + 1
        found.append(new)
    return torch.cat(found, 1).tolist()


@torch.no_grad()
def recomputed(run: Callable[..., Any], prompt: Tensor, tokens: int = TOKENS) -> list[list[int]]:
    """The same without a cache: everything again for each token."""
    text = prompt
    for _ in range(tokens):
        found = run(input_ids=text)
        logits = found if isinstance(found, Tensor) else found[0]
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    return text[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("kind", FAMILIES)
def test_tokens_are_those_of_the_model_that_reads_everything_again(kind: str) -> None:
    prompt = ids(3, 1, PROMPT)
    expected = recomputed(model_of(kind), prompt)
    module = module_of(cached(kind))
    assert stepped(module, prompt) == expected
    assert len(set(expected[0])) > 3


def test_a_window_is_kept_to() -> None:
    """What lies further back than every window of both layers does not matter to Mistral."""
    text = ids(4, 1, 30)
    other = text.clone()
    other[:, : 30 - 2 * WINDOW] = ids(5, 1, 30 - 2 * WINDOW)
    for kind, same in (("mistral", True), ("llama", False)):
        module = module_of(cached(kind))
        with torch.no_grad():
            found = [
                module(input_ids=t, cache_position=torch.arange(30))[0, -1] for t in (text, other)
            ]
        assert torch.allclose(*found, atol=1e-5) is same


def test_rows_of_a_batch_are_apart_and_the_cache_may_be_filled_to_its_end() -> None:
    prompt = ids(6, 2, 4)
    module = module_of(cached("llama", 2))
    found = stepped(module, prompt, LONGEST - 3)  # the last token needs no slot
    assert found == recomputed(model_of("llama"), prompt, LONGEST - 3)
    for row in (0, 1):
        assert stepped(module_of(cached("llama")), prompt[row : row + 1]) == [found[row][:TOKENS]]


def test_a_second_text_needs_no_reset() -> None:
    first, second = ids(7, 1, 30), ids(8, 1, 3)
    module = module_of(cached("llama"))
    alone = stepped(module, second)
    stepped(module, first, 30)
    assert stepped(module, second) == alone == recomputed(model_of("llama"), second)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_text_in_parts_has_the_logits_of_the_whole(kind: str) -> None:
    text, module = ids(9, 1, 24), module_of(cached(kind))
    parts = (slice(0, 1), slice(1, 12), slice(12, 13), slice(13, 24))
    with torch.no_grad():
        found = [module(input_ids=text[:, s], cache_position=torch.arange(24)[s]) for s in parts]
    whole = answer(model_of(kind), {"input_ids": text})
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)


def test_the_interface_and_the_names_of_the_cache() -> None:
    program = cached("llama", 2)
    inputs = tensor_inputs(program)
    assert {name: info.sizes for name, info in inputs.items()} == {
        "input_ids": ((2, 2), (1, LONGEST)),
        "cache_position": ((1, LONGEST),),
    }
    names = {f"kv_cache.{i}.{part}" for i in (0, 1) for part in ("key", "value")}
    held = {name: tuple(t.shape) for name, t in program.state_dict.items() if "kv_" in name}
    assert held == dict.fromkeys(names, (2, 2, LONGEST, 8))
    assert not any(t.dim() == 4 for t in program.constants.values())
    functional = program.run_decompositions()
    assert set(functional.graph_signature.buffers_to_mutate.values()) == names


def test_the_mask_and_the_writes_are_easy_to_find() -> None:
    graph = cached("llama").graph
    [slots] = graph.find_nodes(op="call_function", target=aten.arange.default)
    [compared] = slots.users
    assert slots.args == (LONGEST,) and compared.target is aten.le.Tensor
    writes = graph.find_nodes(op="call_function", target=aten.index_copy_.default)
    assert [w.args[0].name for w in writes] == [
        f"b_kv_cache_{i}_{part}" for i in (0, 1) for part in ("key", "value")
    ]
    assert {w.args[2].name for w in writes} == {"cache_position"}


def test_the_model_stays_as_it_was() -> None:
    model = tiny_llama().train()
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    slimfx.capture(model, kv_cache=True, max_length=8)
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == before
    assert [name for name, _ in model.named_modules()] == names
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_a_model_in_bfloat16_has_such_a_cache() -> None:
    program = slimfx.capture(model_of("llama"), kv_cache=True, max_length=16)
    half = slimfx.capture(tiny_llama().bfloat16(), kv_cache=True, max_length=16)
    assert program.state_dict["kv_cache.0.key"].dtype is torch.float32
    assert half.state_dict["kv_cache.0.key"].dtype is torch.bfloat16
    assert len(stepped(half.module(), ids(3, 1, 5), 4)[0]) == 4


def bloom() -> nn.Module:
    """A model whose positions come from nowhere but its mask."""
    config = transformers.BloomConfig(vocab_size=96, hidden_size=16, n_layer=1, n_head=2)
    return transformers.BloomForCausalLM(config)


def gpt_neo() -> nn.Module:
    """A model that puts windows of its own over the mask, by the place of a key in the cache."""
    config = transformers.GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        vocab_size=96,
        max_position_embeddings=LONGEST,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        initializer_range=0.2,
    )
    return transformers.GPTNeoForCausalLM(config)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "an encoder": (tiny_bert, {}, "BertModel is no causal language model"),
    "images": (tiny_vit, {}, "ViTForImageClassification takes no input_ids"),
    "no positions": (bloom, {"max_length": 8}, "BloomForCausalLM takes no position_ids"),
    "masks of its own": (
        gpt_neo,
        {},
        r"GPTNeoForCausalLM: with a cache its logits differ by 0\.\d",
    ),
    "examples": (tiny_llama, {"example_inputs": (ids(1, 1, 4),)}, "leave example_inputs"),
    "no rows": (tiny_llama, {"batch": 0}, "batch 0: a cache has one row or more"),
    "one token": (tiny_llama, {"max_length": 1}, "max_length 1 is below 2"),
    "all that it could": (
        lambda: tiny_llama(max_position_embeddings=131072),
        {},
        "takes 131072 tokens and a cache holds all of them in memory; give max_length",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_keep_a_cache_is_refused(case: str) -> None:
    make, how, message = REFUSED[case]
    with pytest.raises(CaptureError, match=message):
        slimfx.capture(make(), kv_cache=True, **how)


def test_rows_are_of_a_cache_alone() -> None:
    with pytest.raises(CaptureError, match="without kv_cache the batch is free"):
        slimfx.capture(tiny_llama(), batch=2)
