"""split_experts: a parameter for each expert, views of the stack; stacks read whole stay."""

import torch
from slimfx.passes.find_linears import find_linears
from slimfx.passes.split_experts import split_experts
from torch import Tensor, nn
from torch.nn.functional import linear


class Stack(nn.Module):
    """Two of three experts, each linear; a stack that a product reads whole."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 4))
        self.whole = nn.Parameter(torch.randn(2, 5, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = linear(x, self.experts[0]) + linear(x, self.experts[2])
        return y @ self.whole.transpose(1, 2), linear(x + 1, self.experts[2])


def test_each_expert_that_is_read_is_a_linear() -> None:
    x = torch.randn(6, 4)
    program = torch.export.export(Stack(), (x,))
    split = split_experts(program)
    assert [(site.fqn, len(site.uses)) for site in find_linears(split)] == [
        ("experts.0", 1),
        ("experts.2", 2),
    ]
    assert set(split.state_dict) == {"experts.0", "experts.2", "whole"}
    stack = program.state_dict["experts"]
    assert split.state_dict["experts.2"].data_ptr() == stack[2].data_ptr()
    for got, expected in zip(split.module()(x), program.module()(x), strict=True):
        assert torch.equal(got, expected)


def test_a_program_without_stacks_is_the_same() -> None:
    program = torch.export.export(nn.Linear(4, 8), (torch.randn(2, 4),))
    assert split_experts(program).state_dict.keys() == program.state_dict.keys()
