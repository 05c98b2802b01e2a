"""How long calibration and a search take in one process and in several, of as many threads each.

export OMP_NUM_THREADS=1
python examples/processes.py
python -m torch.distributed.run --standalone --nproc-per-node 2 examples/processes.py

A Llama of three layers with random weights and 16 windows of random tokens: calibration with the
diagonal of the inputs' covariance, and with all of it; what a search for a budget looks at, two
layouts of each layer at all ranks.
"""

import argparse
import time
from dataclasses import replace

import torch
from slimfx.passes.cut_blocks import cut_blocks
from slimfx.passes.find_linears import find_linears
from slimfx.passes.observe_inputs import observe_inputs
from torch.export import ExportedProgram
from transformers import LlamaConfig, LlamaForCausalLM

import slimfx
from slimfx import calibrate, ranks
from slimfx.candidates import candidates
from slimfx.steps import Solve

QUICK = replace(slimfx.Recipe.preset("joint-q"), solve=Solve("joint", rounds=2))


def main() -> None:
    """Three lines, from the first process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    program = build(args.width)
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(4096, (1, args.length), generator=draw) for _ in range(16)]
    with ranks.joined() as mine:
        for full in (False, True):
            calibrated(program, batches[:1], mine, full=full)  # to warm up
            seconds = calibrated(program, batches, mine, full=full)
            if mine.own == 0:
                kind = "whole covariance" if full else "diagonal"
                print(f"{mine.size} processes, {kind}: {seconds:.2f} s", flush=True)
        seconds = searched(program, batches, mine)
        if mine.own == 0:
            print(f"{mine.size} processes, search: {seconds:.1f} s", flush=True)


def build(width: int) -> ExportedProgram:
    """Three layers with linears of this width and 2.75 times as much."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=3,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
    )
    return slimfx.capture(LlamaForCausalLM(config).eval())


def calibrated(
    program: ExportedProgram, batches: list[torch.Tensor], mine: ranks.Ranks, *, full: bool
) -> float:
    """Seconds of observing all blocks and of passing through them."""
    sites = find_linears(program)
    names = frozenset(site.name for site in sites) if full else frozenset()
    walk = calibrate.start(program, batches, mine)
    mine.once(lambda: None)  # all begin together
    began = time.perf_counter()
    for block in cut_blocks(program, sites):
        watched = observe_inputs(program, block.sites, set(block.nodes))
        if watched:
            calibrate.observe(walk, block, watched, names)
        walk = replace(walk, batches=dict(calibrate.advance(walk, block, {})))
    mine.once(lambda: None)
    return time.perf_counter() - began


def searched(program: ExportedProgram, batches: list[torch.Tensor], mine: ranks.Ranks) -> float:
    """Seconds of a search without what follows it."""
    mine.once(lambda: None)
    began = time.perf_counter()
    candidates(program, batches, recipe=QUICK, layouts=["2:4 int4", "int4"], ranks=mine)
    mine.once(lambda: None)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
