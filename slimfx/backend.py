"""`torch.compile(model, backend="slim", options={...})`: compress a model on its way to Inductor.

    Dynamo graph of a compressed model -> lowered as it is
    Dynamo graph of a float model      -> exported program -> slimfx.compress -> lowered

Every graph of a model is compressed by itself, at its first call or, without calibration data,
after some calls of its own. The result is for inference: it runs without gradients. A weight that
changes afterwards is noticed at the next call, but for a write through `.data`, which torch does
not count.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils.weak import WeakTensorKeyDictionary

from slimfx.compress import compress
from slimfx.data import is_batches
from slimfx.dynamo_graph import Captured, Input, capture_graph, export_graph, shape_of
from slimfx.errors import CalibrationError, SlimError
from slimfx.passes.find_linears import Site, find_linears
from slimfx.passes.lower_cpu import lower_cpu
from slimfx.passes.lower_gpu import lower_gpu
from slimfx.passes.replace_linears import packed_linear, replace_linears
from slimfx.recipe import Recipe
from slimfx.runtime.ops import REFERENCES
from slimfx.runtime.pack import PackedLinear
from slimfx.runtime.select import Gpu, gpu_of
from slimfx.runtime.targets.aoti import ACCURACIES
from slimfx.stored_weights import lay_out_
from slimfx.writes import Mark


@dataclass(frozen=True)
class Options:
    """What `options` of torch.compile may hold."""

    recipe: Recipe | str | Path = "joint"
    calibration: Any = None
    """Batches as the model takes them (a tensor, a tuple in call order, or a mapping from argument
    to tensor), or another source of `slimfx.compress`; None takes the model's own first calls."""
    calibration_calls: int = 8
    """Calls that run the float model and are remembered, where there is no calibration."""
    on_change: str = "error"
    """When a float weight changes after compression: "error", or "recompress" to start again. A
    stored weight of a compressed model that changes is always an error."""
    accuracy: str = "exact"
    """As `slimfx.export` takes it: "exact" or "int8-activations"."""

    def __post_init__(self) -> None:
        calls = self.calibration_calls
        if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
            raise SlimError(f"backend slim: calibration_calls {calls!r} is not a number from 1 up")
        if self.on_change not in ("error", "recompress"):
            raise SlimError(
                f"backend slim: on_change {self.on_change!r} is not one of error, recompress"
            )
        if self.accuracy not in ACCURACIES:
            raise SlimError(
                f"backend slim: accuracy {self.accuracy!r} is not one of {', '.join(ACCURACIES)}"
            )

    @property
    def rounded(self) -> bool:
        """Do compressed linears round their inputs to eight bits?"""
        return self.accuracy == "int8-activations"

    @classmethod
    def read(cls, given: Mapping[str, Any] | None) -> Options:
        """The options of a torch.compile call, with the recipe loaded.

        Raises:
            SlimError: an option has no such name or value.
        """
        names = [field.name for field in fields(cls)]
        unknown = [str(name) for name in given or {} if name not in names]
        if unknown:
            raise SlimError(
                f"backend slim: no option is called {', '.join(unknown)}; options: "
                f"{', '.join(names)}"
            )
        options = cls(**(given or {}))
        return replace(options, recipe=Recipe.load(options.recipe))


def slim(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend. What it refuses it refuses when the result is called, with a SlimError
    that Dynamo does not wrap.
    """
    try:
        if mode is not None:
            raise SlimError(f"backend slim: it has no mode {mode!r}; leave mode out")
        chosen = Options.read(options)
        captured = capture_graph(gm, example_inputs)
    except SlimError as error:
        return _refusing(type(error), str(error))
    matrices = [i for i in captured.inputs if i.kind == "held" and len(shape_of(i.node)) == 2]
    compressed = _is_compressed(gm)
    if compressed:
        run = _of_compressed(gm, example_inputs, chosen)
    elif not matrices:
        with torch.no_grad():
            run = _lower(gm, example_inputs)
    else:
        run = _OnTheFly(captured, chosen)

    def checked(*args: Any) -> Any:
        captured.refuse_training(args)
        with torch.no_grad():
            return run(*args)

    return checked


def _lower(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph; the one place that does."""
    from slimfx.runtime.inductor import compile_graph  # loads the compiler, slow

    return compile_graph(gm, example_inputs)


def _of_compressed(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    """A compiled graph of stored weights, which refuses to run when one of these has changed."""
    gpu = _gpu_of(example_inputs, options)
    with torch.no_grad():
        report, marks = lay_out_(gm, example_inputs, rounded=options.rounded, gpu=gpu)
        _warn_of(report.left)
        compiled = _lower(gm, example_inputs)
    at = {id(tensor): i for i, tensor in enumerate(example_inputs)}
    known = [(at[id(mark.tensor())], mark.tensor, mark.version) for mark in marks]

    def run(*args: Any) -> Any:
        for i, tensor, version in known:
            if args[i] is not tensor() or (version is not None and args[i]._version != version):
                raise SlimError(
                    "a stored weight has changed since torch.compile laid it out for the kernels; "
                    "call torch.compile again after torch._dynamo.reset()"
                )
        return compiled(*args)

    return run


def _gpu_of(tensors: Sequence[Any], options: Options) -> Gpu | None:
    """The GPU that they are on, if any.

    Raises:
        SlimError: its kernels are asked for eight-bit inputs, which they do not take.
    """
    devices = [each.device for each in tensors if isinstance(each, Tensor) and each.is_cuda]
    if devices and options.rounded:
        raise SlimError(
            f"backend slim: accuracy 'int8-activations' is for CPUs, the model is on {devices[0]}"
        )
    return gpu_of(devices[0]) if devices else None


def _warn_of(left: Sequence[str]) -> None:
    if left:
        warnings.warn(
            f"backend slim: {len(left)} compressed linears have no kernel and run as ATen, slowly; "
            f"the first: {left[0]}",
            stacklevel=2,
        )


def _refusing(kind: type[SlimError], message: str) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        raise kind(message)

    return refuse


def _is_compressed(gm: GraphModule) -> bool:
    ops = {str(op) for op in REFERENCES} | {str(op.overloadpacket) for op in REFERENCES}
    return any(str(node.target) in ops for node in gm.graph.nodes if node.op == "call_function")


class _OnTheFly:
    """A float graph that becomes a compressed one between two calls."""

    def __init__(self, captured: Captured, options: Options) -> None:
        self.captured, self.options = captured, options
        self.calls: list[list[Any]] = []
        self.compiled: Callable[..., Any] | None = None
        self.marks: dict[str, Mark] = {}
        self.numbers: dict[str, float] = {}

    def __call__(self, *args: Any) -> Any:
        held = self.captured.held(args)
        if self.compiled is not None:
            self._refuse_changes(held, self.captured.numbers(args))
        given = self.captured.given(args)
        if self.compiled is None and self._must_wait(held):
            self.calls.append([_copied(value) for value in given])
            return self.captured.gm(*args)
        if self.compiled is None:
            program = _compressed(self.captured, args, self.options, self.calls)
            gpu = _gpu_of(args, self.options)
            if gpu is None:
                lowered, on_cpu = lower_cpu(program, rounded=self.options.rounded)
                _warn_of(on_cpu.left)
            else:
                lowered, on_gpu = lower_gpu(program, gpu)
                _warn_of(on_gpu.left)
            self.compiled = torch.compile(lowered.module(), backend=_lower)
            self.marks = {name: _watched(tensor) for name, tensor in held.items()}
            self.numbers = self.captured.numbers(args)
            self.calls = []
        return self.compiled(*_marked(self.captured, given))

    def _must_wait(self, held: Mapping[str, Tensor]) -> bool:
        if self.options.calibration is not None:
            return False
        if len(self.calls) >= self.options.calibration_calls:
            return False
        return not all(_find(tensor, self.options) for tensor in held.values())

    def _refuse_changes(self, held: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """A changed weight raises, or makes the graph a float one again."""
        changed = [name for name, tensor in held.items() if not self.marks[name].fits(tensor)]
        changed += [name for name, number in numbers.items() if self.numbers[name] != number]
        if not changed:
            return
        if self.options.on_change == "error":
            raise SlimError(
                f"{changed[0]}: changed since the model was compressed ({len(changed)} of "
                f"{len(held) + len(numbers)} values have); call torch.compile again after "
                f'torch._dynamo.reset(), or compile with options={{"on_change": "recompress"}}'
            )
        self.compiled = None
        for tensor in held.values():
            _SOLVED.pop(tensor, None)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _marked(captured: Captured, given: list[Any]) -> list[Any]:
    """The same inputs as new tensors on which dynamic dimensions are marked."""
    found = []
    for value, i in zip(given, (i for i in captured.inputs if i.kind == "given"), strict=True):
        dynamic = [d for d, size in enumerate(shape_of(i.node)) if isinstance(size, torch.SymInt)]
        if dynamic:
            value = value.detach()
            torch._dynamo.maybe_mark_dynamic(value, dynamic)
        found.append(value)
    return found


def _watched(tensor: Tensor) -> Mark:
    """The mark of a float model's tensor, whose buffers it may write to."""
    return Mark.of(tensor, watch=isinstance(tensor, nn.Parameter))


@dataclass(frozen=True)
class _Solved:
    """What became of a parameter under a recipe; `packed` is None where nothing did."""

    recipe: Recipe | str | Path
    calibration: Any
    mark: Mark
    packed: PackedLinear | None
    shift: Tensor | None
    """What the packed bias adds to the layer's own."""

    def serves(self, options: Options) -> bool:
        """Is it by the same recipe and the same calibration object?"""
        return self.recipe == options.recipe and self.calibration is options.calibration


_SOLVED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter -> its `_Solved` by recipe and calibration, for the other graphs that read it."""


def _find(tensor: Tensor, options: Options) -> _Solved | None:
    for solved in _SOLVED.get(tensor, ()):
        if solved.serves(options) and solved.mark.fits(tensor):
            return solved
    return None


def _compressed(
    captured: Captured, args: Sequence[Any], options: Options, calls: list[list[Any]]
) -> ExportedProgram:
    """The graph as a program: layers that another graph has solved as they are, others solved."""
    recipe = options.recipe
    assert isinstance(recipe, Recipe)
    held = captured.held(args)
    original = program = export_graph(captured, args)
    known: dict[str, PackedLinear] = {}
    sites = find_linears(program)
    for site in sites:
        solved = _find(held[site.fqn], options)
        if solved is not None and solved.packed is not None and recipe.for_layer(site.name):
            bias = None
            if solved.shift is not None and site.bias is not None:
                own = held[site.bias].detach()
                bias = (own.float() + solved.shift).to(own.dtype)
            known[site.name] = replace(solved.packed, bias=bias)
    if known:
        program = replace_linears(program, sites, known)
    rest = [site for site in sites if site.name not in known and recipe.for_layer(site.name)]
    if rest:
        batches = calls
        if options.calibration is not None:
            batches = _batches(captured, options.calibration)
        program = compress(program, recipe, batches)
    _remember(original, program, rest, held, options)
    return program


def _remember(
    original: ExportedProgram,
    program: ExportedProgram,
    sites: list[Site],
    held: Mapping[str, Tensor],
    options: Options,
) -> None:
    """Keep what was solved for other graphs, and of all other parameters that nothing was."""
    made = {site.fqn: site for site in sites}
    for fqn, tensor in held.items():
        if _find(tensor, options) is not None and fqn not in made:
            continue
        packed = shift = None
        if fqn in made:
            packed = packed_linear(program, fqn)
            bias = made[fqn].bias
            if bias is not None and program.state_dict[bias] is not original.state_dict[bias]:
                shift = program.state_dict[bias].float() - original.state_dict[bias].float()
        others = [solved for solved in _SOLVED.get(tensor, ()) if not solved.serves(options)]
        solved = _Solved(options.recipe, options.calibration, _watched(tensor), packed, shift)
        _SOLVED[tensor] = [*others, solved]


def _batches(captured: Captured, calibration: Any) -> Any:
    """Batches in the order of the graph's inputs; other sources as they are."""
    if isinstance(calibration, Mapping):
        calibration = [calibration]
    if not is_batches(calibration):
        return calibration
    given = [i for i in captured.inputs if i.kind == "given"]
    if not captured.whole:
        raise CalibrationError(
            "backend slim: the model breaks into several graphs, and the calibration fits the "
            "first alone; leave calibration out and each one takes its own first calls"
        )
    return [_batch(captured.arguments, given, batch) for batch in calibration]


def _batch(arguments: tuple[str, ...], given: list[Input], batch: Any) -> list[Any]:
    values = batch
    if not isinstance(batch, Mapping):
        values = dict(zip(arguments, batch if isinstance(batch, Sequence) else [batch]))
    missing = [i.name for i in given if i.name not in values]
    if missing:
        raise CalibrationError(
            f"backend slim: a calibration batch holds {', '.join(values) or 'nothing'}, the graph "
            f"also takes {', '.join(missing)}; give those"
        )
    for i in given:
        wanted, found = shape_of(i.node), getattr(values[i.name], "shape", ())
        fits = all(isinstance(w, torch.SymInt) or w == f for w, f in zip(wanted, found))
        if len(wanted) != len(found) or not fits:
            raise CalibrationError(
                f"backend slim: {i.name} of a calibration batch is {list(found)}, the graph takes "
                f"{[w if isinstance(w, int) else 'any' for w in wanted]}; give batches of that "
                f"shape, or compile with dynamic=True"
            )
    return [values[i.name] for i in given]
