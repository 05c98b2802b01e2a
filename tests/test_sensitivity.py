"""How much each output matters: what is predicted for small errors is what is measured."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from models import capture_rows, captured, case, normal, padded
from slimfx.passes.cut_blocks import cut_blocks
from slimfx.passes.find_linears import find_linears
from slimfx.passes.observe_inputs import observe_inputs
from torch import Tensor, nn
from torch.export import ExportedProgram

from slimfx import calibrate
from slimfx.errors import CalibrationError
from slimfx.sensitivity import is_language_model, sensitivities


def found_for(program: ExportedProgram, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return sensitivities(program, cut_blocks(program, find_linears(program)), batches, seed=0)


def covariances(program: ExportedProgram, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of every linear's inputs in the dense program."""
    found: dict[str, Tensor] = {}
    sites = find_linears(program)
    walk = calibrate.start(program, batches)
    for block in cut_blocks(program, sites):
        watched = observe_inputs(program, block.sites, set(block.nodes))
        names = frozenset(site.name for site in block.sites)
        stats = calibrate.observe(walk, block, watched, names) if watched else {}
        found |= {name: each.covariance for name, each in stats.items()}
        walk = replace(walk, batches=dict(calibrate.advance(walk, block, {})))
    return found


def answers(program: ExportedProgram, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    module = program.module()
    with torch.no_grad():
        outputs = [module(**batch) for batch in batches]
    return [(o if isinstance(o, Tensor) else o[0]).double() for o in outputs]


def change(kind: str, before: list[Tensor], after: list[Tensor]) -> float:
    """Divergence a token of a language model, else half the relative squared error."""
    if is_language_model(captured(kind)):
        pairs = [(a.log_softmax(-1), b.log_softmax(-1)) for a, b in zip(before, after, strict=True)]
        return sum((p.exp() * (p - q)).sum(-1).mean().item() for p, q in pairs) / len(pairs)
    error = sum((a - b).square().sum().item() for a, b in zip(before, after, strict=True))
    return error / sum(a.square().sum().item() for a in before) / 2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mlp", "in out"])
def test_predicts_the_change_of_the_output(kind: str) -> None:
    program, batches = captured(kind), case(kind).batches
    matters, inputs = found_for(program, batches), covariances(program, batches)
    before = answers(program, batches)
    ratios = []
    for site in find_linears(program):
        if site.other_readers:
            continue
        E = 1e-2 * normal(7, site.out_features, site.in_features)
        changed = copy.copy(program)
        stored = program.state_dict[site.fqn].detach()
        changed._state_dict = dict(program.state_dict)
        moved = stored + (E.T if site.transposed else E)
        changed._state_dict[site.fqn] = nn.Parameter(moved, requires_grad=False)
        measured = change(kind, before, answers(changed, batches))
        predicted = (matters[site.name] @ ((E @ inputs[site.name]) * E)).sum().item()
        ratios.append(predicted / measured)
    assert all(1 / 3 < ratio < 3 for ratio in ratios), ratios
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    assert 0.6 < mean < 1.6, ratios


def test_the_output_itself_matters_evenly() -> None:
    program, batches = captured("rows"), case("rows").batches
    (first, second) = answers(program, batches)
    found = found_for(program, batches)["second"]
    sizes = [each.square().sum(-1).mean() for each in (first, second)]
    wanted = sum(1 / size for size in sizes).item() / 2 / 2
    assert found.tolist() == pytest.approx([wanted] * 8, rel=1e-5)


def test_is_the_same_twice_and_draws_nothing_from_the_global_state() -> None:
    program, batches = captured("llama"), case("llama").batches
    state = torch.get_rng_state()
    first, second = found_for(program, batches), found_for(program, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == second.keys() == {site.name for site in find_linears(program)}
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_padding_counts_for_nothing() -> None:
    program, batch = captured("bert"), padded(1, 4, 24, keep=17)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] != 0, batch["input_ids"], 5)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    first, second = found_for(program, [batch]), found_for(program, [other])
    for name, wanted in first.items():
        torch.testing.assert_close(second[name], wanted, rtol=1e-4, atol=0.0)


class Texts(nn.Module):
    """Tokens become states of eight numbers, or what a head makes of them."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 8)
        self.head = head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.table(input_ids))


@pytest.mark.parametrize("width", [8, 32])
def test_what_answers_with_other_than_logits_is_no_language_model(width: int) -> None:
    ids = torch.arange(6).view(2, 3)
    program = torch.export.export(Texts(nn.Linear(8, width)).eval(), (), {"input_ids": ids})
    assert is_language_model(program) == (width == 32)


class Chosen(nn.Module):
    """A linear behind which only indices are left."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x).argmax(-1)


def test_an_answer_without_gradients_is_refused() -> None:
    program = capture_rows(Chosen(), 4, 16)
    with pytest.raises(CalibrationError, match="answers with no floating-point tensor"):
        found_for(program, [normal(1, 4, 16)])  # type: ignore[list-item]
