"""From a budget to a recipe: it fits, it is the same twice, and what is impossible is said."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DEMO, captured, case
from slimfx.passes.find_linears import find_linears
from slimfx.runtime.manifest import manifest_of
from torch.export import ExportedProgram

import slimfx
from slimfx import budget, latency
from slimfx.budget import Target, fit
from slimfx.candidates import LAYOUTS, Candidates, candidates
from slimfx.errors import BudgetError, PlanError
from slimfx.plan import plan
from slimfx.ranks import Ranks
from slimfx.recipe import Calibration, Recipe

JOINT = Recipe.preset("joint-q")
QUICK = dataclasses.replace(
    JOINT,
    calibration=Calibration(samples=8, length=64),
    skip=("lm_head", "*.layers.[2-5].*", "*.mlp.*"),
)


@cache
def short_demo() -> ExportedProgram:
    return slimfx.capture(DEMO, max_length=64)


@cache
def search(kind: str) -> Candidates:
    if kind == "demo":
        return candidates(short_demo(), recipe=QUICK)
    return candidates(captured(kind), case(kind).batches, recipe=JOINT)


def chosen(monkeypatch: pytest.MonkeyPatch, kind: str, target: Target) -> Recipe:
    """`fit` with the search of the kind, which is made once."""
    monkeypatch.setattr(budget, "candidates", lambda *rest, **words: search(kind))
    return fit(captured(kind), target, case(kind).batches)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [4.0, 5.0, 6.5])
def test_bits_are_hit_from_below(monkeypatch: pytest.MonkeyPatch, kind: str, bits: float) -> None:
    found = plan(captured(kind), chosen(monkeypatch, kind, Target(bits=bits)))
    assert 0.99 * bits <= found.bits_per_weight <= bits


@pytest.mark.parametrize("bits", [2.9, 3.4, 4.5])
def test_attention_of_the_demo_model_hits_bits(
    monkeypatch: pytest.MonkeyPatch, bits: float
) -> None:
    monkeypatch.setattr(budget, "candidates", lambda *rest, **words: search("demo"))
    found = plan(short_demo(), fit(short_demo(), Target(bits=bits), recipe=QUICK))
    assert 0.99 * bits <= found.bits_per_weight <= bits


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_a_size_is_that_of_the_file(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    small = plan(captured("llama"), "joint-q")
    size = small.file_bytes + share * (small.bytes_before - small.bytes_after)
    found = plan(captured("llama"), chosen(monkeypatch, "llama", Target(size=size)))
    assert 0.99 * size <= found.file_bytes <= size


def test_a_compressed_layer_has_the_bytes_and_layout_it_was_chosen_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = chosen(monkeypatch, "llama", Target(bits=4.2))
    rows = {row.name: row for row in plan(captured("llama"), recipe).rows if not row.skipped}
    for name, row in rows.items():
        how = recipe.for_layer(name)
        known = {c.how: c.bytes for c in search("llama")[name]}
        assert known[how] == row.bytes_after
        assert row.layout in LAYOUTS


def test_more_bits_never_lose_more() -> None:
    found = search("llama")
    weights = sum(s.out_features * s.in_features for s in find_linears(captured("llama"))[:-1])
    losses = []
    for bits in (2.6, 3.0, 3.4, 4.0, 5.0, 8.0):
        inside = budget._within(found, bits * weights / 8)
        assert inside is not None
        losses.append(sum(c.loss for c in inside))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.1 * losses[0]


def test_only_the_layouts_that_are_given_are_used() -> None:
    recipe = fit(
        captured("llama"), Target(bits=5.0), case("llama").batches, layouts=["2:4 int4", "int4"]
    )
    layouts = {r.layout for r in plan(captured("llama"), recipe).rows if not r.skipped}
    assert layouts <= {"2:4 int4", "int4"}


def test_a_recipe_with_a_budget_is_searched_and_then_compressed() -> None:
    kind, target = "llama", Target(bits=4.2)
    asked, shares = dataclasses.replace(JOINT, budget=target), []
    small = slimfx.compress(
        *(captured(kind), asked, case(kind).batches),
        progress=lambda share, what: shares.append(share),
    )
    recipe = fit(captured(kind), target, case(kind).batches)
    assert manifest_of(small).recipe == recipe.to_dict() and recipe.budget is None
    assert shares == sorted(shares) and min(shares) < 0.1 and max(shares) > 0.9


def test_a_search_needs_the_weights() -> None:
    with pytest.raises(BudgetError, match="no weights: capture it with weights=True or"):
        fit(slimfx.capture(DEMO, max_length=64, weights=False), Target(bits=4.2))
    with pytest.raises(BudgetError, match="whole program: capture with weights=True"):
        fit(slimfx.capture(DEMO, max_length=64, weights="unread"), Target(loss=0.1))


def test_weights_that_stay_in_files_are_searched_to_the_same() -> None:
    program = slimfx.capture(DEMO, max_length=64, weights="unread")
    assert candidates(program, recipe=QUICK) == search("demo")
    assert all(tensor.is_meta for tensor in program.state_dict.values())


def test_a_search_that_was_ended_goes_on_behind_its_last_block(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLIMFX_CACHE", str(tmp_path))
    program, batches, solved = captured("llama"), case("llama").batches, list[str]()
    solve = slimfx.candidates.solve

    def counted(name: str, *rest: Any, **words: Any) -> Any:
        solved.append(name)
        return solve(name, *rest, **words)

    def stop(share: float, what: str) -> None:
        if what.endswith("layers.1"):
            raise KeyboardInterrupt

    monkeypatch.setattr("slimfx.candidates.solve", counted)
    search = partial(candidates, program, batches, recipe=JOINT, layouts=["2:4 int4", "int8"])
    with pytest.raises(KeyboardInterrupt):
        search(remembered=True, progress=stop)
    assert solved and all("layers.0" in name for name in solved)
    solved.clear()
    found = search(remembered=True)
    assert solved and not any("layers.0" in name for name in solved)
    assert len(list(tmp_path.iterdir())) == 1  # the whole; its parts are gone
    solved.clear()
    assert search(remembered=True) == found
    assert not solved
    assert search() == found
    assert any("layers.0" in name for name in solved)


def test_processes_beside_the_first_take_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search("llama")

    class Second(Ranks):
        def once(self, work: Any) -> Any:
            return [[1.0 + i for i, _ in enumerate(found.get(site.name, [0]))] for site in sites]

    monkeypatch.setattr(latency, "latencies", None)  # it would fail to measure
    sites = find_linears(captured("llama"))
    with pytest.raises(BudgetError, match=f"the nearest possible .* is {1000 * len(sites)}.000 ms"):
        budget.choose(captured("llama"), Target(latency=1e-9), JOINT, found, Second())


def test_a_plan_does_not_search() -> None:
    with pytest.raises(PlanError, match=r"searched with data: compress does it"):
        plan(captured("llama"), dataclasses.replace(JOINT, budget=Target(bits=4.2)))


def test_the_same_search_twice_is_the_same_recipe_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    first, second = (fit(captured("gpt2"), Target(bits=4), case("gpt2").batches) for _ in range(2))
    assert first.digest() == second.digest()
    assert torch.equal(torch.get_rng_state(), state)
    assert Recipe.from_yaml(first.to_yaml()) == first


def test_another_budget_searches_nothing_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: object, **words: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setenv("SLIMFX_CACHE", str(tmp_path))
    program, batches = captured("llama"), case("llama").batches
    anew = fit(program, Target(bits=5), batches)
    fit(program, Target(bits=4), batches, remembered=True)
    monkeypatch.setattr("slimfx.candidates.sensitivities", refuse)
    assert fit(program, Target(bits=5), batches, remembered=True).to_yaml() == anew.to_yaml()
    for other in ({"layouts": ["int4"]}, {"recipe": "joint"}):
        with pytest.raises(AssertionError, match="searched again"):
            fit(program, Target(bits=5), batches, remembered=True, **other)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="searched again"):
        fit(program, Target(bits=5), batches[:1], remembered=True)


def test_the_recipe_compresses_to_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = chosen(monkeypatch, "mlp", Target(bits=6))
    small = slimfx.compress(captured("mlp"), recipe, case("mlp").batches)
    assert find_linears(small) == []


def test_impossible_bits_name_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match="1 bits a weight are impossible; the nearest") as refused:
        chosen(monkeypatch, "llama", Target(bits=1))
    nearest = float(str(refused.value).rpartition(" ")[2])
    found = plan(captured("llama"), chosen(monkeypatch, "llama", Target(bits=nearest + 1e-3)))
    assert found.bits_per_weight == pytest.approx(nearest, abs=2e-3)


def test_an_impossible_size_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match="1,000 bytes is impossible; the nearest") as refused:
        chosen(monkeypatch, "llama", Target(size=1000))
    nearest = int(str(refused.value).rpartition(" ")[2].replace(",", ""))
    found = plan(captured("llama"), chosen(monkeypatch, "llama", Target(size=nearest)))
    assert found.file_bytes == nearest


def test_a_budget_that_the_model_fits_into_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match="nothing is to be compressed"):
        chosen(monkeypatch, "llama", Target(bits=40))


def test_a_loss_holds_on_held_out_text_and_a_larger_one_is_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "candidates", lambda *rest, **words: search("demo"))
    program, sizes = short_demo(), []
    dense = slimfx.evaluate(program, samples=48).value
    for loss in (0.005, 0.03):
        recipe = fit(program, Target(loss=loss), recipe=QUICK)
        small = slimfx.compress(program, recipe)
        assert slimfx.evaluate(small, samples=48).value <= dense * (1 + loss)
        sizes.append(plan(program, recipe).file_bytes)
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "one of bits, size, loss and latency"),
        ({"bits": 3.0, "loss": 0.1}, "one of bits, size, loss and latency"),
        ({"size": -1.0}, "a budget of -1.0 is impossible"),
        ({"bits": float("nan")}, "a budget of nan is impossible"),
    ],
)
def test_a_target_is_one_number_above_zero(values: dict[str, float], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Target(**values)


def test_what_cannot_be_searched_is_refused_before_any_work() -> None:
    program, batches = captured("llama"), case("llama").batches
    with pytest.raises(BudgetError, match=r"q_proj: a budget is searched for solve.method joint"):
        fit(program, Target(bits=4), batches, recipe="slim")
    with pytest.raises(BudgetError, match="layout 'int5' is not one of int2, "):
        fit(program, Target(bits=4), batches, layouts=["int5"])
    with pytest.raises(BudgetError, match="skips every linear"):
        fit(program, Target(bits=4), batches, recipe=dataclasses.replace(JOINT, skip=("*",)))
    with pytest.raises(BudgetError, match=r"its weight .* is also read by"):
        everything = dataclasses.replace(JOINT, skip=())
        fit(captured("qwen2"), Target(bits=4), case("qwen2").batches, recipe=everything)
    with pytest.raises(BudgetError, match="needs a language model"):
        fit(captured("bert"), Target(loss=0.1), case("bert").batches)
