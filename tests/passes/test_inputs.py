"""inputs: what a program takes, and batches in whatever form a user has them."""

from __future__ import annotations

import pytest
import torch
from models import LONGEST, captured, case, ids, normal, tiny_llama
from slimfx.passes.base import written_buffers
from slimfx.passes.inputs import (
    call_arguments,
    flat_inputs,
    module_of,
    rows_at_once,
    tensor_inputs,
    text_batch,
)
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import slimfx
from slimfx.errors import SlimError


def test_a_text_program_names_its_input_with_dtype_and_ranges() -> None:
    [(name, info)] = tensor_inputs(captured("llama")).items()
    assert name == info.name == "input_ids"
    assert info.dtype is torch.int64
    assert info.sizes == ((1, 1024), (1, LONGEST))


def test_an_encoder_has_its_two_inputs_in_call_order() -> None:
    inputs = tensor_inputs(captured("bert"))
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert inputs["input_ids"].sizes == inputs["attention_mask"].sizes


def test_a_fixed_size_has_one_value_and_a_free_one_no_upper_limit() -> None:
    [info] = tensor_inputs(captured("vit")).values()
    assert info.sizes[1:] == ((3, 3), (32, 32), (32, 32))
    assert info.sizes[0][0] <= 2 and info.sizes[0][1] is None
    assert info.dtype is torch.float32


class Pair(nn.Module):
    """A nested input: a mapping and a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8)

    def forward(self, table: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.a(table["left"] - table["right"] * pair[0]) + pair[1]


def pair_program() -> tuple[ExportedProgram, list[Tensor]]:
    left, right, one, two = (normal(i, 4, 16) for i in range(4))
    two = two[:, :8].contiguous()
    program = torch.export.export(Pair(), ({"left": left, "right": right}, (one, two)))
    return program, [left, right, one, two]


def same(found: list, expected: list) -> bool:
    return len(found) == len(expected) and all(a is b for a, b in zip(found, expected))


def test_a_batch_is_a_tensor_a_sequence_or_a_mapping() -> None:
    x, mask = ids(1, 2, 8), torch.ones(2, 8, dtype=torch.int64)
    one, two = captured("llama"), captured("bert")
    for batch in (x, [x], (x,), {"input_ids": x}):
        assert same(flat_inputs(one, batch), [x])
    for batch in ((x, mask), [x, mask], {"attention_mask": mask, "input_ids": x}):
        assert same(flat_inputs(two, batch), [x, mask])


@pytest.mark.parametrize("kind", ["llama", "bert", "mlp", "vit", "encoder layer"])
def test_call_arguments_fit_the_program(kind: str) -> None:
    program, inputs = captured(kind), case(kind).inputs
    args, kwargs = call_arguments(program, inputs)
    assert torch.equal(program.module()(*args, **kwargs), program.module()(**inputs))


def test_nested_inputs_are_given_flat_in_call_order() -> None:
    program, values = pair_program()
    assert list(tensor_inputs(program)) == ["table_left", "table_right", "pair_0", "pair_1"]
    args, kwargs = call_arguments(program, values)
    assert kwargs == {} and args[0]["right"] is values[1] and args[1][1] is values[3]
    named = dict(zip(tensor_inputs(program), values, strict=True))
    assert same(flat_inputs(program, named), values)
    small = slimfx.compress(program, "slim", [values, named])
    assert small.module()(*args).shape == (4, 8)


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(2, 8)},
        {"input_ids": torch.ones(2, 8), "mask": torch.ones(2, 8)},
        {"input_ids": 1, "attention_mask": 1, "token_type_ids": 1},
    ],
)
def test_other_names_are_refused_with_both_lists(batch: dict) -> None:
    with pytest.raises(SlimError) as caught:
        flat_inputs(captured("bert"), batch)
    assert str(sorted(batch)) in str(caught.value)
    assert "['attention_mask', 'input_ids']" in str(caught.value)


def test_another_number_of_inputs_is_refused_with_both_numbers() -> None:
    x = ids(1, 2, 8)
    with pytest.raises(SlimError, match=r"has 1 inputs, the program takes 2: .*attention_mask"):
        flat_inputs(captured("bert"), x)
    with pytest.raises(SlimError, match="has 2 inputs, the program takes 1"):
        flat_inputs(captured("llama"), (x, x))


class Flagged(nn.Module):
    """A tensor, a flag, a number and an absent mask."""

    def forward(self, x: Tensor, flag: bool, scale: float, mask: Tensor | None = None) -> Tensor:
        y = x * scale if flag else x
        return y if mask is None else y * mask


def test_constants_among_the_inputs_are_given_in_their_places() -> None:
    x = normal(1, 4, 16)
    program = torch.export.export(Flagged(), (x, True, 2.5), {"mask": None})
    assert list(tensor_inputs(program)) == ["x"]
    values = [x, True, 2.5, None]
    assert flat_inputs(program, values) == values
    args, kwargs = call_arguments(program, values)
    assert torch.equal(program.module()(*args, **kwargs), x * 2.5)
    named = {"x": x, "flag": True, "scale": 2.5, "mask": None}
    assert flat_inputs(program, named) == values


def test_a_derived_size_has_a_range_that_holds_its_values() -> None:
    half = Dim("half", min=2, max=20)
    program = torch.export.export(
        Halves(), (normal(1, 4, 16),), dynamic_shapes={"x": {0: 2 * half}}
    )
    (low, high), width = tensor_inputs(program)["x"].sizes
    assert width == (16, 16)
    assert low <= 4 and (high is None or high >= 40)


class Halves(nn.Module):
    """Needs an even number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 2, 16).sum(1)


class Counter(nn.Module):
    """Adds to a buffer and reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("fixed", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.sum())
        return x + self.seen + self.fixed


def test_a_module_of_ones_own_writes_to_its_own_buffers() -> None:
    program = slimfx.capture(Counter(), (torch.ones(2, 3),))
    assert written_buffers(program) == {"seen"}
    first, second = module_of(program), module_of(program)
    x = torch.ones(2, 3)
    assert first(x)[0, 0] == 1 + 6 + 1
    assert first(x)[0, 0] == 1 + 12 + 1
    assert second(x)[0, 0] == 1 + 6 + 1
    assert program.state_dict["seen"] == 0
    assert first.get_buffer("fixed").data_ptr() == program.state_dict["fixed"].data_ptr()


def test_what_a_view_is_of_may_be_written_to_as_well() -> None:
    class ThroughAView(Counter):
        def forward(self, x: Tensor) -> Tensor:
            self.seen.view(1, 1)[0].add_(1)
            return x + self.seen

    program = slimfx.capture(ThroughAView(), (torch.ones(2, 3),))
    assert written_buffers(program) == {"seen"}
    assert module_of(program)(torch.ones(2, 3))[0, 0] == 2
    assert program.state_dict["seen"] == 0


def test_rows_of_text_come_as_the_program_takes_them() -> None:
    tokens = ids(1, 3, 5)
    assert list(text_batch(captured("llama"), tokens)) == ["input_ids"]
    encoder = text_batch(captured("bert"), tokens)
    assert encoder["attention_mask"].shape == (3, 5) and encoder["attention_mask"].all()
    assert rows_at_once(captured("llama"), 2000) == 1024
    assert rows_at_once(captured("llama"), 7) == 7


def test_missing_rows_are_the_last_one_again() -> None:
    program = slimfx.capture(tiny_llama(), kv_cache=True, max_length=8, batch=4)
    assert [rows_at_once(program, wanted) for wanted in (1, 4, 9)] == [4, 4, 4]
    tokens = ids(1, 3, 5)
    batch = text_batch(program, tokens)
    assert batch["cache_position"].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(batch["input_ids"], tokens[[0, 1, 2, 2]])
