"""What every pass needs: an editable copy of a program, and a checked program made from the
edit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)
from torch.fx import Graph, Node
from torch.fx.node import map_arg


@dataclass
class Edit:
    """A program taken apart: change the graph and the specs, then `finish`."""

    program: ExportedProgram
    graph: Graph
    signature: ExportGraphSignature
    state_dict: dict[str, torch.Tensor]

    def finish(self) -> ExportedProgram:
        """A new program; placeholders and specs must agree, and torch's own verifier must pass."""
        order = [n.name for n in self.graph.nodes if n.op == "placeholder"]
        specs = {spec.arg.name: spec for spec in self.signature.input_specs}  # type: ignore[union-attr]
        if sorted(order) != sorted(specs):
            raise AssertionError(f"placeholders without a spec: {set(order) ^ set(specs)}")
        self.graph.lint()
        program, symbols = self.program, _symbols(self.graph)
        return ExportedProgram(
            root=program.graph_module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(
                [specs[name] for name in order], self.signature.output_specs
            ),
            state_dict=self.state_dict,
            range_constraints={
                symbol: limits
                for symbol, limits in program.range_constraints.items()
                if symbol in symbols
            },
            module_call_graph=program.module_call_graph,
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=program.verifiers,
        )


def edit(program: ExportedProgram) -> Edit:
    """Copy the graph, the signature and the buffers a program writes to; share other tensors."""
    signature = program.graph_signature
    buffers = written_buffers(program)
    return Edit(
        program=program,
        graph=_copied(program.graph),
        signature=ExportGraphSignature(
            list(signature.input_specs), copy.deepcopy(signature.output_specs)
        ),
        state_dict={
            name: tensor.detach().clone() if name in buffers else tensor
            for name, tensor in program.state_dict.items()
        },
    )


def with_state(program: ExportedProgram, tensors: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """The same program with other tensors under these names of its state."""
    change = edit(program)
    change.state_dict.update(tensors)
    return change.finish()


def _copied(graph: Graph) -> Graph:
    """The same nodes under the same names; deepcopy would also copy torch's call specs, with a
    warning.
    """
    copied = Graph()
    copies: dict[Any, Node] = {}
    output, old = copied.graph_copy(graph, val_map=copies, return_output_node=True)  # type: ignore[misc]
    copies[old] = copied.output(output)
    for node, copy_of in copies.items():
        copy_of.meta = dict(node.meta)
        copy_of.name = node.name  # torch.fx renames what shadows a builtin, such as `input`
    return copied


def _symbols(graph: Graph) -> set[Any]:
    """Every symbol in a tensor's shape."""
    shapes = [
        size.node.expr
        for node in graph.nodes
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val"))
        for size in (value.shape if isinstance(value, torch.Tensor) else (value,))
        if isinstance(size, torch.SymInt)
    ]
    return {symbol for expression in shapes for symbol in expression.free_symbols}


def add_buffer(change: Edit, fqn: str, tensor: torch.Tensor) -> Node:
    """The placeholder of a new lifted buffer, before the inputs of the caller."""
    graph, signature = change.graph, change.signature
    user_inputs = {
        spec.arg.name  # type: ignore[union-attr]
        for spec in signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    }
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first = next((node for node in inputs if node.name in user_inputs), inputs[-1].next)
    with graph.inserting_before(first):
        node = graph.placeholder("b_" + fqn.replace(".", "_").lower())
    node.target = node.name  # made unique where two names differ in case or dots alone
    node.meta["val"] = _fake(fake_mode(graph), tensor)
    spec = InputSpec(InputKind.BUFFER, TensorArgument(node.name), fqn, persistent=True)
    signature.input_specs.append(spec)
    change.state_dict[fqn] = tensor
    return node


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """What stands for a tensor in the graph; one that is unread will be on the CPU."""
    if not tensor.is_meta:
        return mode.from_tensor(tensor, static_shapes=True)
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def written_buffers(program: ExportedProgram) -> set[str]:
    """The buffers a program may write to."""
    signature = program.graph_signature
    written = {node.name for node in written_nodes(program.graph.nodes)}
    buffers = signature.inputs_to_buffers
    return {fqn for name, fqn in buffers.items() if name in written} | set(
        signature.buffers_to_mutate.values()
    )


def written_nodes(nodes: Iterable[Node]) -> set[Node]:
    """Whose tensors these nodes may write to: what they change in place, and all that this is made
    of, since it may be a view.
    """
    found: set[Node] = set()
    ahead = [argument for node in nodes for argument in _changed_arguments(node)]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead += node.all_input_nodes
    return found


def _changed_arguments(node: Node) -> list[Node]:
    found: list[Node] = []
    if not changes_in_place(node):
        return found
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            map_arg(value, found.append)
    return found


def changes_in_place(node: Node) -> bool:
    """Does the node write to one of its arguments?"""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake tensor mode, symbols included, that the graph was traced under."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode
    raise AssertionError("the graph holds no fake tensor")


def input_specs(program: ExportedProgram) -> dict[str, InputSpec]:
    """Placeholder name -> what it stands for."""
    return {spec.arg.name: spec for spec in program.graph_signature.input_specs}  # type: ignore[union-attr]


def lifted_tensor(program: ExportedProgram, spec: InputSpec) -> Any:
    """The parameter, buffer or constant behind a lifted placeholder."""
    target = spec.target
    if spec.kind is InputKind.CONSTANT_TENSOR or target not in program.state_dict:
        return program.constants[target]  # type: ignore[index]
    return program.state_dict[target]


def reader(program: ExportedProgram) -> Callable[[Node], Any]:
    """Node -> the tensor behind a lifted placeholder, None for the result of a computation."""
    specs = input_specs(program)
    return lambda node: lifted_tensor(program, specs[node.name]) if node.name in specs else None
