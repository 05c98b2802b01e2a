"""A graph that Dynamo hands to a backend: what its inputs are, and the same as an exported program.

Dynamo lifts parameters to inputs and names all of them after where it found them; an exported
program owns its parameters under the model's own names.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta

from slimfx.errors import CaptureError, SlimError


@dataclass(frozen=True)
class Input:
    """An input of a Dynamo graph."""

    node: Node
    name: str
    """The parameter's in the state dict, or the argument's in the model's signature."""
    kind: str
    """ "held" by the model, "given" by the caller, the "size" of what is given, or a "number" that
    the model holds, in a tensor."""
    of: tuple[int, int] = (0, 0)
    """Of a size: which given tensor's, and which of its dimensions."""


@dataclass(frozen=True)
class Captured:
    """A Dynamo graph whose inputs are known by name."""

    gm: GraphModule
    inputs: tuple[Input, ...]
    module: Callable[[], nn.Module | None]
    arguments: tuple[str, ...]
    """The names of the model's arguments in call order."""
    whole: bool
    """Is it (the beginning of) the model, rather than what follows a graph break?"""

    def given(self, args: Sequence[Any]) -> list[Any]:
        """What the caller gave, of all inputs."""
        return [arg for i, arg in zip(self.inputs, args, strict=True) if i.kind == "given"]

    def held(self, args: Sequence[Any]) -> dict[str, Tensor]:
        """The model's own tensors, by name."""
        return {i.name: arg for i, arg in zip(self.inputs, args, strict=True) if i.kind == "held"}

    def numbers(self, args: Sequence[Any]) -> dict[str, float]:
        """The model's own numbers, by name."""
        found = zip(self.inputs, args, strict=True)
        return {i.name: float(arg) for i, arg in found if i.kind == "number"}

    def refuse_training(self, args: Sequence[Any]) -> None:
        """Raise if this call is one for training."""
        module = self.module()
        exported = isinstance(module, GraphModule)  # its mode is fixed, whatever it says
        if module is not None and module.training and not exported:
            raise SlimError(
                f"backend slim: {type(module).__name__} is in training mode; call .eval() on it"
            )
        for i, arg in zip(self.inputs, args, strict=True):
            if i.kind == "given" and torch.is_grad_enabled() and _needs_grad(arg):
                raise SlimError(
                    f"backend slim: input {i.name} needs a gradient, and a compressed model has "
                    f"none; call it under torch.no_grad(), or give {i.name}.detach()"
                )


def _needs_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def capture_graph(gm: GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Name the inputs of a graph that Dynamo is just tracing."""
    module, arguments = _frame()
    inputs: list[Input] = []
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    taken: set[str] = set()
    for node, example in zip(nodes, example_inputs, strict=True):
        source = str(getattr(getattr(node, "_dynamo_source", None), "name", "") or node.name)
        if isinstance(example, torch.SymInt):
            inputs.append(Input(node, node.name, "size"))
            continue
        as_tensor = getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
        if as_tensor and example.dim() == 0:
            inputs.append(Input(node, _module_path(source), "number"))
            continue
        held = isinstance(example, nn.Parameter) or re.search(r"\._(buffers|parameters)\[", source)
        name = _module_path(source) if held else _argument(source, arguments)
        name = name if name.isidentifier() or held else f"input_{name}"
        while name in taken:
            name += "_"
        taken.add(name)
        inputs.append(Input(node, name, "held" if held else "given"))
    given = [i for i in inputs if i.kind == "given"]
    sized = [replace(i, of=_size_of(i.node, given)) if i.kind == "size" else i for i in inputs]
    return Captured(gm, tuple(sized), module, arguments, _is_whole())


def _frame() -> tuple[Callable[[], nn.Module | None], tuple[str, ...]]:
    """The module whose forward Dynamo is tracing, if it is one, and the names of its arguments."""
    translator = InstructionTranslator.current_tx()
    module = translator.f_locals.get("self", translator.f_locals.get("fn"))  # fn: a torch.nn class
    if isinstance(module, nn.Module):
        return weakref.ref(module), tuple(inspect.signature(module.forward).parameters)
    code = translator.f_code
    return lambda: None, code.co_varnames[: code.co_argcount]


def _is_whole() -> bool:
    """Was the frame that Dynamo traces called by torch.compile, not by another one of the model?"""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        name = frame.f_code.co_filename
        if not name.startswith(_MACHINERY):
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return True


_MACHINERY = (
    *(str(Path(file).parent) for file in (torch.__file__, __file__)),
    *(contextlib.__file__, functools.__file__, "<frozen"),
)
"""Files whose frames may stand between torch.compile and a graph."""


def _module_path(source: str) -> str:
    """ "L['self']._modules['fc']._parameters['weight']" -> "fc.weight"."""
    path = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", source)
    path = re.sub(r"^[LG]\['(\w+)'\]", r"\1", path)
    return re.sub(r"[^\w.]", "_", re.sub(r"^(self|fn)(\.|$)", "", path))


def _argument(source: str, arguments: tuple[str, ...]) -> str:
    """ "L['x']", "L['kwargs']['x']" or "L['args'][0]" -> "x"."""
    found = re.fullmatch(r"L\['\w+'\]\[(\d+)\]", source)
    if found and int(found[1]) < len(arguments):
        return arguments[int(found[1])]
    found = re.fullmatch(r"L\['(?:kwargs'\]\[')?(\w+)'\]", source)
    return found[1] if found else re.sub(r"\W+", "_", source)


def _size_of(node: Node, given: list[Input]) -> tuple[int, int]:
    wanted = node.meta["example_value"]
    for place, each in enumerate(given):
        for dimension, size in enumerate(shape_of(each.node)):
            if isinstance(size, torch.SymInt) and size.node.expr == wanted.node.expr:
                return place, dimension
    raise CaptureError(
        f"backend slim: the graph takes the number {node.name}, which is no dimension of a tensor "
        f"it takes; give the model tensors alone, or compile with dynamic=False"
    )


def shape_of(node: Node) -> Sequence[Any]:
    """Sizes of an input as Dynamo sees them, symbols included."""
    return getattr(node.meta.get("example_value"), "shape", ())


def export_graph(captured: Captured, args: Sequence[Any]) -> ExportedProgram:
    """The Dynamo graph as a program that owns what the model holds, under the model's names."""
    given = [i for i in captured.inputs if i.kind == "given"]
    shapes = {
        i.name: {d: Dim.AUTO for d, s in enumerate(shape_of(i.node)) if isinstance(s, torch.SymInt)}
        for i in given
    }
    owner = _Owner(captured, args)
    try:
        program = torch.export.export(
            owner, tuple(captured.given(args)), dynamic_shapes=shapes, strict=False
        )
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise CaptureError(f"backend slim: torch.export cannot trace a graph: {error}") from error
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:  # Dynamo's, whose paths begin with the expression for the model
            path = _module_path(next(reversed(stack.values()))[0])
            node.meta["nn_module_stack"] = {path: (path, "torch.nn.Module")}
    return program


class _Owner(nn.Module):
    """A Dynamo graph with its held inputs as its own parameters and buffers."""

    def __init__(self, captured: Captured, args: Sequence[Any]) -> None:
        super().__init__()
        for name, tensor in captured.held(args).items():
            _own_(self, name, tensor)
        numbers = captured.numbers(args)
        names = [i.name for i in captured.inputs if i.kind == "given"]

        def forward(*given: Tensor) -> Any:
            values = iter(given)
            values_of_all: list[Any] = []
            for i in captured.inputs:
                if i.kind == "held":
                    path, _, name = i.name.rpartition(".")
                    values_of_all.append(getattr(self.get_submodule(path), name))
                elif i.kind == "given":
                    values_of_all.append(next(values))
                else:
                    place, dimension = i.of
                    size = i.kind == "size"
                    values_of_all.append(given[place].shape[dimension] if size else numbers[i.name])
            with preserve_node_meta():
                return _WithNumbers(captured.gm).run(*values_of_all)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, kind) for name in names]
        )
        self.forward = forward


def _own_(root: nn.Module, fqn: str, tensor: Tensor) -> None:
    *path, name = fqn.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)


class _WithNumbers(Interpreter):
    """Runs a graph in which Dynamo reads a number of the model out of a tensor."""

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The number itself where one is read."""
        if target == "item" and isinstance(args[0], float):
            return args[0]
        return super().call_method(target, args, kwargs)
