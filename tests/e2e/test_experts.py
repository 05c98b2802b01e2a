"""Mixtures of experts: every expert is compressed, in the ledger, and computes what it stores."""

import copy
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import answer, ids, stored_weight
from slimfx.passes.find_linears import find_linears
from slimfx.runtime.manifest import manifest_of
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import slimfx
from slimfx.errors import CalibrationError
from slimfx.recipe import Calibration, Recipe

EXPERTS = 4
SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
    **{"num_experts_per_tok": 2, "head_dim": 16},
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=EXPERTS, **SIZES)),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=32, **SIZES)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(num_local_experts=EXPERTS, **SIZES)),
}
RECIPE = dataclasses.replace(Recipe.preset("slim-q"), calibration=Calibration(16, 32))
TEXT = ids(3, 16, 32)


@cache
def made(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]()
    model.set_experts_implementation("eager")
    return model.eval()


@cache
def captured(kind: str) -> ExportedProgram:
    return slimfx.capture(made(kind))


@cache
def compressed(kind: str) -> ExportedProgram:
    return slimfx.compress(captured(kind), RECIPE, TEXT)


@pytest.mark.parametrize("kind", MODELS)
def test_the_captured_program_answers_as_the_model_and_leaves_it(kind: str) -> None:
    model, program = made(kind), captured(kind)
    for shape in ((1, 1), (2, 9)):
        x = {"input_ids": ids(5, *shape)}
        torch.testing.assert_close(answer(program.module(), x), answer(model, x))
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize("kind", MODELS)
def test_every_expert_is_in_the_ledger_and_the_router_stays(kind: str) -> None:
    manifest = manifest_of(compressed(kind))
    for part in ("gate_up_proj", "down_proj"):
        stack = f"model.model.layers.0.mlp.experts.{part}"
        rows = [row for row in manifest.layers if row.name.startswith(stack)]
        assert [row.name for row in rows] == [f"{stack}.{i}" for i in range(EXPERTS)]
        assert sum(row.tokens for row in rows) == 2 * TEXT.numel()
    routers = [name for name, why in manifest.skipped.items() if "topk chooses" in why]
    assert [name.rpartition(".")[0] for name in routers] == ["model.model.layers.0.mlp"]
    assert manifest.calibration["coverage"] == 1.0


@pytest.mark.parametrize("kind", MODELS)
def test_the_program_is_the_model_with_the_weights_it_stores(kind: str) -> None:
    program, model = compressed(kind), copy.deepcopy(made(kind))
    replaced = 0
    for site in find_linears(captured(kind)):
        shape = (site.out_features, site.in_features)
        W = stored_weight(program, site.fqn.removesuffix(".weight"), shape, RECIPE)
        if W is not None:
            _put(model, site.fqn.removeprefix("model."), W.T if site.transposed else W)
            replaced += 1
    assert replaced == len(manifest_of(program).layers) == 4 + 2 * EXPERTS
    for shape in ((1, 1), (3, 11)):
        x = {"input_ids": ids(6, *shape)}
        torch.testing.assert_close(
            answer(program.module(), x), answer(model, x), rtol=1e-4, atol=1e-5
        )


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Write a weight, or one of a stack."""
    stack, _, expert = name.rpartition(".")
    named = dict(model.named_parameters())
    target = named[name] if name in named else named[stack][int(expert)]
    target.data.copy_(value)


def test_it_is_saved_and_lowered_like_any_other(tmp_path: Path) -> None:
    program = compressed("gpt-oss")
    slimfx.save(program, tmp_path / "op.pt2")
    slimfx.save(program, tmp_path / "aten.pt2", form="aten")
    slimfx.export(program, "aoti", tmp_path / "aoti.pt2")
    for form in ("op", "aten"):
        assert slimfx.check(tmp_path / f"{form}.pt2").identical
    assert slimfx.check(tmp_path / "aoti.pt2").max_difference < 1e-5


def test_an_expert_that_no_token_reached_is_refused_or_takes_all_inputs_alike() -> None:
    model = copy.deepcopy(made("mixtral"))
    with torch.no_grad():  # all scores are equal, and topk takes the same two experts each time
        model.model.layers[0].mlp.gate.weight.zero_()
    program = slimfx.capture(model)
    said = (
        r"experts.down_proj.\d: no calibration token reached it \(4 of 12 layers so far\); give .*"
        r"calibration.min_coverage \(1.0\)"
    )
    with pytest.raises(CalibrationError, match=said):
        slimfx.compress(program, RECIPE, TEXT)
    lenient = dataclasses.replace(RECIPE.calibration, min_coverage=0.6)
    done = slimfx.compress(program, dataclasses.replace(RECIPE, calibration=lenient), TEXT)
    manifest = manifest_of(done)
    missed = [row for row in manifest.layers if row.tokens == 0]
    assert len(missed) == 4
    assert all("no calibration token reached it" in row.notes[0] for row in missed)
    assert manifest.calibration["coverage"] == pytest.approx(8 / 12)


def test_a_plan_needs_no_weights_of_it(tmp_path: Path) -> None:
    made("mixtral").save_pretrained(tmp_path)
    planned = slimfx.plan(slimfx.capture(tmp_path, weights=False), RECIPE)
    whole = slimfx.plan(captured("mixtral"), RECIPE)
    assert planned.rows == whole.rows
    assert 0 < planned.peak_memory < whole.peak_memory + 1_000_000
