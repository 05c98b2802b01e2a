"""The prediction of seconds: its arithmetic, and that it is near what compression takes."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
import transformers
from models import captured, tiny_llama
from slimfx.passes.find_linears import find_linears
from test_cli import from_json, run

import slimfx
from slimfx import Recipe, seconds
from slimfx.recipe import Calibration
from slimfx.steps import LayerRecipe

HOW = dataclasses.replace(Recipe.preset("slim"), calibration=Calibration(samples=4, length=64))


HOW_ANY = HOW.for_layer("any")


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_a_large_layer_goes_on_as_its_small_ones_grow(
    power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def measured(how: LayerRecipe, N: int, K: int) -> float:
        seen.append((N, K))
        return 1e-4 * (N * K / 2**18) ** power

    monkeypatch.setattr(seconds, "_measured", measured)
    assert HOW_ANY is not None
    for N, K in ((4096, 11008), (53248, 16384), (512, 512), (640, 512)):
        seen.clear()
        took = seconds._of_layer(HOW_ANY, N, K)
        assert took == pytest.approx(1e-4 * (N * K / 2**18) ** power)
        assert all(n * k < 1.1 * seconds._LARGEST for n, k in seen)
        assert all(n < N for n, _ in seen[:-1])


@pytest.mark.parametrize(("last", "times"), [(0.5, 4), (200.0, 8)])
def test_nothing_makes_it_sublinear_or_more_than_cubic(
    last: float, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([3.0, last])
    monkeypatch.setattr(seconds, "_measured", lambda how, N, K: next(measured))
    monkeypatch.setattr(seconds, "_LONGEST", 0.1)
    assert HOW_ANY is not None
    assert seconds._of_layer(HOW_ANY, 2048, 2048) == pytest.approx(last * times)


def test_more_processes_share_batches_and_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seconds, "_measured", lambda how, N, K: 1.0)
    monkeypatch.setattr(seconds, "_flops_a_second", lambda: 1e6)
    monkeypatch.setattr(seconds, "_reading", lambda: 1e-6)
    how = dataclasses.replace(HOW, calibration=Calibration(samples=8, length=64, batch=2))
    one, two, many = (seconds.predict(captured("llama"), how, n) for n in (1, 2, 100))
    assert one.solve == 14
    assert (two.solve, many.solve) == (7, 1)
    assert (two.calibrate, many.calibrate) == (one.calibrate / 2, one.calibrate / 4)
    assert two.read == many.read
    assert one.total == one.read + one.calibrate + one.solve + one.write


def test_a_token_meets_all_but_the_last_linear_of_a_block_twice() -> None:
    program = captured("llama")
    sizes = {s.name: s.out_features * s.in_features for s in find_linears(program)}
    last = sum(size for name, size in sizes.items() if name.endswith("down_proj"))
    head = list(sizes.values())[-1]  # whose own output nothing asks for
    assert seconds._weights_met(program, find_linears(program)) == (
        2 * sum(sizes.values()) - last - 2 * head
    )


def test_the_prediction_is_near() -> None:
    config = tiny_llama().config.to_dict() | {
        **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3},
        **{"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64},
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    program = slimfx.capture(model)
    batch = {"input_ids": torch.randint(0, 96, (4, 64))}
    predicted = seconds.predict(program, HOW)
    began = time.perf_counter()
    slimfx.compress(program, HOW, [batch])
    took = time.perf_counter() - began
    assert took / 3 < predicted.total < took * 3  # machines of tests have neighbours


def test_the_command_adds_them_to_its_totals() -> None:
    told = from_json(run("plan", "examples/demo_lm", "--recipe", "wanda", "--time", "--json"))
    parts = {name: value for name, value in told.items() if name.startswith("seconds_")}
    assert set(parts) == {
        f"seconds_{name}" for name in ("capture", "read", "calibrate", "solve", "write", "all")
    }
    assert parts.pop("seconds_all") == pytest.approx(sum(parts.values()), abs=0.3)
