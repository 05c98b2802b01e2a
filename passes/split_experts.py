"""Give every expert of a stack a parameter of its own.

linear(x, select(W, 0, 3))   W [experts, N, K]       becomes       linear(x, W.3)   W.3 [N, K]
"""

from __future__ import annotations

import torch
from slimfx.passes.base import Edit, edit, fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

aten = torch.ops.aten


def split_experts(program: ExportedProgram) -> ExportedProgram:
    """The program with a parameter [N, K], a view, for each that is selected from a stack; a stack
    that is also read as a whole stays.
    """
    change = edit(program)
    nodes = {node.name: node for node in change.graph.nodes if node.op == "placeholder"}
    for spec in list(change.signature.input_specs):
        stack = nodes[spec.arg.name]  # type: ignore[union-attr]
        if spec.kind is InputKind.PARAMETER and _is_stack(stack):
            _split(change, spec, stack)
    return change.finish()


def _is_stack(node: Node) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 3
        and bool(node.users)
        and all(_selects(user) for user in node.users)
    )


def _selects(node: Node) -> bool:
    """select(stack, 0, number)"""
    if node.target is not aten.select.int:
        return False
    dim, index = node.args[1:]
    return bool(dim == 0 and isinstance(index, int) and index >= 0)


def _split(change: Edit, spec: InputSpec, stack: Node) -> None:
    fqn = str(spec.target)
    tensor = change.state_dict.pop(fqn)
    made: dict[int, Node] = {}
    for user in list(stack.users):
        expert: int = user.args[2]  # type: ignore[assignment]
        if expert not in made:
            own = torch.nn.Parameter(tensor.detach()[expert], requires_grad=tensor.requires_grad)
            made[expert] = _parameter(change, stack, f"{fqn}.{expert}", own)
        user.replace_all_uses_with(made[expert])
        change.signature.replace_all_uses(user.name, made[expert].name)
        change.graph.erase_node(user)
    change.graph.erase_node(stack)
    change.signature.input_specs.remove(spec)


def _parameter(change: Edit, beside: Node, fqn: str, tensor: torch.Tensor) -> Node:
    with change.graph.inserting_before(beside):
        node = change.graph.placeholder("p_" + fqn.replace(".", "_").lower())
    node.target = node.name
    node.meta["val"] = fake_mode(change.graph).from_tensor(tensor, static_shapes=True)
    change.signature.input_specs.append(
        InputSpec(InputKind.PARAMETER, TensorArgument(node.name), fqn)
    )
    change.state_dict[fqn] = tensor
    return node
