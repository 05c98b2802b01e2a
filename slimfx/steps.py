"""The steps a linear goes through, as frozen data that checks itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from typing import Any

from slimfx.errors import BudgetError, RecipeError
from slimfx.methods import COMPENSATORS, PRUNERS, QUANTIZERS
from slimfx.methods.masks import NofM, Pattern, Unstructured
from slimfx.methods.quantized import BITS


@dataclass(frozen=True)
class Prune:
    """Which weights stay."""

    method: str = "wanda"
    """A score (`methods.PRUNERS`), "sparsegpt", or "mask-file" for masks made elsewhere."""
    n: int = 2
    m: int = 4
    """n of every m along the inputs stay."""
    sparsity: float | None = None
    """Instead of n:m, a share of the weights that goes wherever they are."""
    scope: str = "row"
    """Where that share is exact: in each "row" (output) or over the "layer"."""
    path: str | None = None
    """The masks of "mask-file": .safetensors or .npz."""

    def __post_init__(self) -> None:
        one_of("prune.method", self.method, (*PRUNERS, "sparsegpt", "mask-file"))
        one_of("prune.scope", self.scope, ("row", "layer"))
        if not 1 <= self.n < self.m:
            raise RecipeError(f"prune: {self.n}:{self.m} is impossible; n must be from 1 to m - 1")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise RecipeError(f"prune.sparsity: {self.sparsity} is not between 0 and 1")
        if (self.path is None) == (self.method == "mask-file"):
            raise RecipeError(
                f"prune.path: {self.path!r} does not go with method {self.method}; method "
                f"mask-file needs the path of its masks, no other takes one"
            )

    @property
    def pattern(self) -> Pattern:
        """What masks of this step look like."""
        if self.sparsity is None:
            return NofM(self.n, self.m)
        return Unstructured(self.sparsity, self.scope)


@dataclass(frozen=True)
class Quantize:
    """The integer codes of the weights that stay."""

    method: str = "slim-quant"
    bits: int = 4
    granularity: str = "tensor"
    """One scale for each "tensor", "channel" (output) or "group" of inputs."""
    group: int = 128
    """Inputs that share a scale when granularity is "group"."""

    def __post_init__(self) -> None:
        one_of("quantize.method", self.method, QUANTIZERS)
        one_of("quantize.bits", self.bits, BITS)
        one_of("quantize.granularity", self.granularity, ("tensor", "channel", "group"))
        at_least("quantize.group", self.group, 1)
        if self.method != "absmax" and self.granularity != "tensor":
            raise RecipeError(
                f"quantize: method {self.method} fits one scale per tensor, not per "
                f"{self.granularity}; set granularity: tensor, or method: absmax"
            )


@dataclass(frozen=True)
class Adapter:
    """The low-rank pair that takes up the error of pruning and quantization."""

    method: str = "slim-lora"
    rank: float = 0.1
    """Below 1 a share of min(in, out), rounded down; else the rank itself."""
    bits: int = 16
    """16 stores bfloat16, 32 float32, 4 integer codes in groups."""
    group: int = 128
    """Inputs that share a scale when bits is 4."""
    sparse: bool = False
    """Prune L to 2:4 by magnitude, so that R L x costs less."""
    fast: bool = False
    """Find the adapter by iteration (within about 0.5% of the best error), not exactly."""

    def __post_init__(self) -> None:
        one_of("adapter.method", self.method, (*COMPENSATORS, "lplr"))
        one_of("adapter.bits", self.bits, (4, 16, 32))
        at_least("adapter.group", self.group, 1)
        whole = math.isfinite(self.rank) and self.rank == int(self.rank) > 0
        if not (0 < self.rank < 1 or whole):
            raise RecipeError(
                f"adapter.rank: {self.rank} is neither a share below 1 nor a whole number above 0"
            )
        if self.sparse and (self.bits == 32 or self.method == "lplr"):
            raise RecipeError(
                f"adapter.sparse: does not go with {self.bits} bits and method {self.method}; "
                f"set bits: 16 or 4, and another method than lplr"
            )

    @property
    def full(self) -> bool:
        """Does the method weigh errors with X^T X?"""
        return self.method in ("full", "lplr")

    def rank_for(self, out_features: int, in_features: int) -> int:
        """The rank of a layer; a share gives at least 1, a number is taken as it is."""
        if self.rank >= 1:
            return int(self.rank)
        return max(1, int(self.rank * min(out_features, in_features)))


@dataclass(frozen=True)
class Solve:
    """How the weight that stays, its codes and the adapter are found together."""

    method: str = "one-shot"
    """ "one-shot": each step by itself. "second-order": SparseGPT and OPTQ in one pass, the errors
    taken up by the weights that are left. "joint": alternates that, and descent on the codes, with
    the adapter. "alternate": alternates whatever the other steps say with the adapter."""
    rounds: int = 8
    """Alternations of "joint" and "alternate"."""
    weight: str = "one-shot"
    """How "alternate" finds the weight: "one-shot" or "second-order"."""
    low_rank_first: bool = False
    """Does "alternate" begin with the low-rank part of the weight, as LoSparse and OATS do?"""
    correct_bias: bool = False
    """Add the mean error of the output to the bias of a layer that has one (costs no bytes)."""

    def __post_init__(self) -> None:
        one_of("solve.method", self.method, ("one-shot", "second-order", "joint", "alternate"))
        one_of("solve.weight", self.weight, ("one-shot", "second-order"))
        at_least("solve.rounds", self.rounds, 1)

    @property
    def second_order(self) -> bool:
        """Does the weight take up its own errors, column by column?"""
        weight = self.weight if self.method == "alternate" else self.method
        return weight in ("second-order", "joint")


@dataclass(frozen=True)
class Transform:
    """A scale for each input, so that x * c meets W / c: the codes spend their range better."""

    method: str = "awq"
    alpha: float = 0.5
    """Of "smoothquant": how much of the range moves from the inputs to the weights."""
    share: float = 0.01
    """Of "slim-quant-o": which share of the inputs is salient."""
    factor: float = 2.0
    """Of "slim-quant-o": what the salient inputs' weights are multiplied with."""

    def __post_init__(self) -> None:
        one_of("transform.method", self.method, ("awq", "smoothquant", "slim-quant-o"))
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"transform.alpha: {self.alpha} is not from 0 to 1")
        if not 0 < self.share <= 1:
            raise RecipeError(f"transform.share: {self.share} is not above 0 and at most 1")
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise RecipeError(f"transform.factor: {self.factor} is below 1")


@dataclass(frozen=True)
class Inputs:
    """Rounding of what reaches a layer, at run time."""

    format: str = "fp8"
    """ "fp8": E4M3, or E5M2 where the range asks for it, one choice for the whole tensor."""

    def __post_init__(self) -> None:
        one_of("inputs.format", self.format, ("fp8",))


@dataclass(frozen=True)
class Tune:
    """Gradient descent on the output of one block at a time, after its layers are solved."""

    method: str = "match"
    """ "match": the adapters, and the scales of the codes. "clipping": how far below absmax the
    scales lie (OmniQuant). "affine": that and a scale for each input (AffineQuant)."""
    epochs: int = 4
    """Passes over the calibration batches."""
    rate: float = 1e-2
    """Learning rate of Adam, at the start."""

    def __post_init__(self) -> None:
        one_of("tune.method", self.method, ("match", "clipping", "affine"))
        at_least("tune.epochs", self.epochs, 1)
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise RecipeError(f"tune.rate: {self.rate} is not above 0")


@dataclass(frozen=True)
class Override:
    """Other settings for the layers whose name matches a pattern."""

    match: str
    prune: Any = field(default_factory=dict)
    quantize: Any = field(default_factory=dict)
    adapter: Any = field(default_factory=dict)
    solve: Any = field(default_factory=dict)
    transform: Any = field(default_factory=dict)
    inputs: Any = field(default_factory=dict)
    """Keys that differ from the recipe's own, or null to leave the step out."""


@dataclass(frozen=True)
class Target:
    """What to reach; one of the four."""

    bits: float | None = None
    """Stored bits for each weight of the linears, scales and adapters included, at most."""
    size: float | None = None
    """Bytes of the file at most."""
    loss: float | None = None
    """Relative increase of perplexity on held-out text at most."""
    latency: float | None = None
    """Seconds that all linears take for one token on this processor at most (`latency`)."""

    def __post_init__(self) -> None:
        given = [value for value in astuple(self) if value is not None]
        if len(given) != 1:
            raise BudgetError("a budget is one of bits, size, loss and latency; give exactly one")
        if not (math.isfinite(given[0]) and given[0] > 0):
            raise BudgetError(f"a budget of {given[0]} is impossible; it must be above 0")


@dataclass(frozen=True)
class LayerRecipe:
    """What the recipe says of one layer; None leaves a step out."""

    prune: Prune | None
    quantize: Quantize | None
    adapter: Adapter | None
    solve: Solve = field(default_factory=Solve)
    transform: Transform | None = None
    inputs: Inputs | None = None
    tune: Tune | None = None

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise RecipeError(problem)

    def _problems(self) -> Iterable[str]:
        solve, prune = self.solve, self.prune
        if prune is None and self.quantize is None:
            yield "quantize: null and prune: null leave the layer as it is; add it to skip"
        if prune is not None and (prune.method == "sparsegpt") != solve.second_order:
            yield (
                f"prune.method: {prune.method} does not go with solve.method {solve.method}; "
                f"sparsegpt needs second-order, joint, or alternate with weight: second-order, "
                f"the others one-shot or alternate"
            )
        if solve.method == "joint" and self.adapter and not self.adapter.full:
            yield (
                f"adapter.method: {self.adapter.method} does not go with solve.method joint; "
                f"set adapter: {{method: full}}"
            )
        if solve.method == "alternate" and self.adapter is None:
            yield "adapter: null does not go with solve.method alternate; set method: one-shot"
        if self.tune is not None and self.tune.method != "match":
            absmax = self.quantize is not None and self.quantize.method == "absmax"
            if not absmax or self.adapter is not None or self.solve.method != "one-shot":
                yield (
                    f"tune.method: {self.tune.method} learns absmax scales alone; set quantize: "
                    f"{{method: absmax}}, adapter: null and solve: {{method: one-shot}}"
                )
        if self.transform is not None and self.transform.method == "awq" and not self.quantize:
            yield "quantize: null does not go with transform awq, which fits it; leave one out"

    @property
    def pattern(self) -> Pattern | None:
        """Which weights may stay; None where nothing is pruned."""
        return None if self.prune is None else self.prune.pattern

    @property
    def scales_inputs(self) -> bool:
        """Is the layer's input multiplied by a scale for each channel?"""
        learned = self.tune is not None and self.tune.method == "affine"
        return learned or self.transform is not None

    @property
    def needs_covariance(self) -> bool:
        """Do the steps use X^T X, and not its diagonal alone?"""
        steps = (self.prune, self.transform, self.adapter)
        methods = {step.method for step in steps if step is not None}
        return bool(methods & {"jsq", "awq", "full", "lplr"}) or self.solve.second_order


def at_least(key: str, value: float, least: float) -> None:
    """Refuse a value below the least one."""
    if value < least:
        raise RecipeError(f"{key}: {value} is below {least}")


def one_of(key: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuse a value that is not in the list."""
    allowed = list(allowed)
    if value not in allowed:
        raise RecipeError(f"{key}: {value!r} is not one of {', '.join(map(str, allowed))}")
