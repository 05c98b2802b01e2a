"""Times are measured, remembered, and those that a compiled program takes."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from models import Chain, captured, normal
from slimfx.passes.find_linears import find_linears
from slimfx.passes.replace_linears import replace_linears
from slimfx.runtime.cpu_ops import Form
from slimfx.runtime.inductor.direct import Sizes
from slimfx.runtime.pack import PackedDense, PackedLinear
from slimfx.runtime.targets import aoti
from torch import nn

import slimfx
from slimfx import latency, remember
from slimfx.budget import Target, choose
from slimfx.candidates import candidates
from slimfx.errors import BudgetError
from slimfx.recipe import Recipe
from slimfx.steps import Adapter, Quantize

JOINT = Recipe.preset("joint-q")
INT4 = dataclasses.replace(JOINT, prune=None, quantize=Quantize(bits=4), skip=())
WIDE = (2048, 8192)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIMFX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def int4(N: int, K: int) -> PackedDense:
    codes = torch.randint(0, 256, (N, -(-K // 2)), dtype=torch.uint8)
    groups = -(-K // 128)
    return PackedDense(codes, torch.full((N, groups), 1e-3).bfloat16(), 4, 128)


def test_a_compiled_program_takes_as_long_as_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of 57 MB, the table's too: on some servers a cache holds both, or neither."""
    monkeypatch.setattr(latency, "table", partial(latency.table, copies=57_000_000))
    narrow, wide = WIDE
    pairs = ((narrow, wide), (wide, narrow)) * 3
    layers = [nn.utils.skip_init(nn.Linear, *pair, bias=False) for pair in pairs]
    program = slimfx.capture(Chain(*layers), (torch.zeros(1, narrow),))
    sites = find_linears(program)
    quantize = Quantize("absmax", bits=4, granularity="group")
    recipe = dataclasses.replace(INT4, quantize=quantize, adapter=Adapter("lplr", rank=64, bits=4))
    packed = {
        site.name: PackedLinear(
            int4(site.out_features, site.in_features),
            *(int4(64, site.in_features), int4(site.out_features, 64)),
        )
        for site in sites
    }
    aoti.save(replace_linears(program, sites, packed), tmp_path / "chain.pt2")
    run, x, taken = aoti.load(tmp_path / "chain.pt2"), torch.randn(1, narrow), []
    predicted = latency.latency(program, recipe)
    for _ in range(100):
        began = time.perf_counter()
        run(x)
        taken.append(time.perf_counter() - began)
    ratio = min(taken) / predicted
    print(f"measured / predicted: {ratio:.2f} ({1e3 * predicted:.2f} ms)")
    assert 0.6 < ratio < 1.6


def test_a_latency_is_kept_to_and_more_time_loses_less() -> None:
    program = slimfx.capture(Chain(*(nn.Linear(512, 512) for _ in range(3))), (normal(1, 2, 512),))
    batches = [{"x": normal(2, 1024, 512)}]
    search = candidates(program, batches, recipe=JOINT, layouts=["2:4 int4", "int4", "int8"])
    with pytest.raises(BudgetError, match="ms a token are impossible; the nearest") as refused:
        choose(program, Target(latency=1e-9), JOINT, search)
    nearest = float(str(refused.value).split()[-2]) / 1e3
    losses = []
    for factor in (1, 1.2, 2):
        recipe = choose(program, Target(latency=factor * nearest), JOINT, search)
        assert latency.latency(program, recipe) <= factor * nearest
        known = {name: {c.how: c.loss for c in each} for name, each in search.items()}
        losses.append(sum(each[recipe.for_layer(name)] for name, each in known.items()))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_what_was_measured_is_remembered_for_these_threads(own_folder: Path) -> None:
    sizes = Sizes(64, 64, 0, (Form("dense", 4, 64),))
    first = latency.table([sizes], copies=1 << 20)
    assert first[sizes] > 0
    assert latency.table([sizes], copies=1 << 20) == first
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        latency.table([sizes], copies=1 << 20)
    finally:
        torch.set_num_threads(threads)
    assert len(list(own_folder.iterdir())) == 2


def test_layers_that_no_kernel_reads_take_for_ever() -> None:
    (site, *_) = find_linears(captured("llama"))
    grouped = Quantize("absmax", bits=4, granularity="group", group=8)
    how = dataclasses.replace(INT4, quantize=grouped, adapter=None).for_layer(site.name)
    dense, none = latency.latencies([(site, [None, how])])[0]
    assert 0 < dense < none == float("inf")


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIMFX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="not kept for the next time.*set SLIMFX_CACHE"):
        remember.keep("test", {"a": 1}, [0.1])
    assert remember.recall("test", {"a": 1}) is None
