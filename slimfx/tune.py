"""Gradient descent on what one block answers: its compressed layers against its dense ones.

For each batch the block runs once with its own weights; then Adam lowers the mean squared error of
the compressed block's outputs to these, relative to their size. Padding counts for nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.fx import Node

from slimfx.calibrate import Walk, read_block, run_batch, with_weights
from slimfx.errors import CalibrationError
from slimfx.methods.learnable import Learnable
from slimfx.passes.base import changes_in_place
from slimfx.passes.cut_blocks import Block

Weights = Callable[[str, Tensor], Tensor]
"""(parameter name, dense float32 [N, K]) -> the parameter as the program holds it."""

Learned = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class _Target:
    """What one batch should come to, and how much each of its tokens counts."""

    outputs: dict[Node, Tensor]
    mask: Tensor | None


def tune(
    walk: Walk,
    block: Block,
    learnables: Mapping[str, Learnable],
    stored: Weights,
    *,
    fixed: Mapping[str, Tensor],
    epochs: int,
    rate: float,
    seed: int,
) -> Learned:
    """The values of each learnable (by parameter name) with the least loss over all batches.

    The start counts: the result is never worse than it. `fixed` are other parameters that the
    compressed block has changed. Values that no floating-point output of the block depends on stay
    as they are. `rate` falls to zero along a cosine; the order of the batches is
    drawn with `seed`.

    Raises:
        CalibrationError: the loss is not finite; names the block.
    """
    walk = read_block(walk, block)
    walk = replace(walk, lifted={node: _detached(v) for node, v in walk.lifted.items()})
    targets = {i: _target(walk, block, i) for i in walk.batches}
    start = {fqn: each.values for fqn, each in learnables.items()}
    if not walk.told(0, lambda: bool(targets[0].outputs)):
        return start
    learned = {
        fqn: {name: value.clone().requires_grad_() for name, value in values.items()}
        for fqn, values in start.items()
    }

    def loss(i: int) -> Tensor:
        weights = {fqn: stored(fqn, learnables[fqn].weight(v)) for fqn, v in learned.items()}
        keep = frozenset(targets[i].outputs)
        outputs = run_batch(with_weights(walk, {**fixed, **weights}), block, i, keep=keep)
        return _difference(outputs, targets[i])

    def total() -> float:
        with torch.no_grad():
            parts = walk.ranks.each(walk.shares, lambda share: [loss(i).item() for i in share])
            losses = [found for part in parts for found in part]
        found = sum(losses) / len(losses)
        if not math.isfinite(found):
            raise CalibrationError(
                f"{block.name or 'the model'}: tuning met a loss of {found}; lower tune.rate "
                f"({rate}), or leave tune out"
            )
        return found

    least, best = total(), start
    with gradients(block):
        _descend(learned, walk, loss, epochs, rate, seed)
    if total() < least:
        best = {
            fqn: {name: value.detach() for name, value in values.items()}
            for fqn, values in learned.items()
        }
    return best


def _descend(
    learned: Learned,
    walk: Walk,
    loss: Callable[[int], Tensor],
    epochs: int,
    rate: float,
    seed: int,
) -> None:
    values = [value for each in learned.values() for value in each.values()]
    count = sum(map(len, walk.shares))

    def gradients_of(i: int) -> Sequence[Tensor | None]:
        found = loss(i)
        if not found.requires_grad:  # such as behind an argmax
            return ()
        return torch.autograd.grad(found, values, allow_unused=True)

    adam = torch.optim.Adam(values, lr=rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs * count)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for i in torch.randperm(count, generator=draw).tolist():
            found = walk.told(i, lambda: gradients_of(i))  # noqa: B023
            if not found:
                return
            for value, gradient in zip(values, found, strict=True):
                value.grad = gradient
            adam.step()
            falling.step()


@contextlib.contextmanager
def gradients(block: Block) -> Iterator[None]:
    """Record gradients, also past operations that overwrite what the backward pass needs."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if any(changes_in_place(node) for node in block.nodes):
            stack.enter_context(allow_mutation_on_saved_tensors())
        yield


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@torch.no_grad()
def _target(walk: Walk, block: Block, i: int) -> _Target:
    keep = _answers(block)
    outputs = {
        node: value
        for node, value in run_batch(walk, block, i, keep=keep).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return _Target(outputs, walk.masks[i])


def _answers(block: Block) -> frozenset[Node]:
    """What later blocks read of this one that depends on its linears."""
    reached = {use.node for site in block.sites for use in site.uses}
    for node in block.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return block.live_out & reached


def _difference(outputs: Mapping[Node, Tensor], target: _Target) -> Tensor:
    """Mean squared error over the mean square of the target, summed over the block's outputs."""
    found = []
    for node, wanted in target.outputs.items():
        error, size = (outputs[node].float() - wanted.float()).square(), wanted.float().square()
        mask = target.mask
        if mask is not None and wanted.shape[: mask.dim()] == mask.shape:
            error, size = error[mask != 0], size[mask != 0]
        found.append(error.mean() / size.mean().clamp_min(1e-30))
    return torch.stack(found).sum()
