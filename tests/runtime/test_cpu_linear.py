"""The op compiled by Inductor: equal answers, the nodes behind it fused, any strides and batch."""

from collections.abc import Callable, Iterator

import pytest
import torch
from cpu_linears import linear
from slimfx.runtime.inductor import compile_graph, kernels
from torch import Tensor, nn
from torch._dynamo.utils import counters

W4, D4 = ("2:4", 4), ("dense", 4)
K, ROWS, RANKS = 100, [64, 36], [12, 20]


class Layer(nn.Module):
    """A compressed linear of two parts, and what usually follows one."""

    def __init__(self, *, rounded: bool = False) -> None:
        super().__init__()
        self.case = linear(W4, ROWS, K, adapter=(D4, D4), ranks=RANKS)
        for i, tensor in enumerate(self.case.tensors):
            self.register_buffer(f"tensor{i}", tensor)
        self.bias = nn.Parameter(torch.randn(sum(ROWS)))
        self.rounded = rounded

    def op(self, x: Tensor) -> Tensor:
        tensors = [getattr(self, f"tensor{i}") for i in range(6)]
        rest = (self.case.form, self.case.rows, self.case.ranks, self.rounded)
        return torch.ops.slimfx.linear_cpu(x, *tensors, *rest)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.op(x) + self.bias.to(x.dtype)
        return residual + nn.functional.silu(y)


class Shared(Layer):
    """The result is read by a node that fuses and by one that cannot."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.op(x)
        return torch.cat([y + residual, y.flip(-1)], -1)


@pytest.fixture(autouse=True)
def no_caches() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def compiled(module: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(module, backend=compile_graph, dynamic=True)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_every_size(dtype: torch.dtype) -> None:
    layer = Layer().eval()
    run = compiled(layer)
    for shape in ((4, K), (1, K), (2, 3, K), (80, K), (5, 13, K), (0, K)):
        x = torch.randn(shape).to(dtype)
        residual = torch.randn(*shape[:-1], sum(ROWS)).to(dtype)
        expected = layer(x.double(), residual.double())
        got = run(x, residual)
        assert got.dtype is dtype and got.shape == expected.shape
        near = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(got.double(), expected, atol=near * 4, rtol=near)


@torch.no_grad()
def test_bias_activation_and_residual_are_fused() -> None:
    run = compiled(Layer().eval())
    run(torch.randn(4, K), torch.randn(4, sum(ROWS)))
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 1
    assert counters["inductor"]["cpp_epilogue_fusion_counter"] == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", [Layer, Shared])
def test_strided_inputs_and_results_read_twice(kind: type[Layer]) -> None:
    layer = kind().eval()
    run = compiled(layer)
    x, residual = torch.randn(K, 6).T, torch.randn(6, 2 * sum(ROWS))[:, ::2]
    expected = layer(x.double(), residual.double())
    torch.testing.assert_close(run(x, residual).double(), expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_rounded_inputs() -> None:
    layer = Layer(rounded=True).eval()
    x, residual = torch.randn(3, K), torch.randn(3, sum(ROWS))
    expected = layer(x, residual)
    torch.testing.assert_close(compiled(layer)(x, residual), expected, atol=1e-3, rtol=1e-3)


def test_the_cache_key_holds_our_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> object:
        with kernels():
            return torch._inductor.config.post_grad_custom_post_pass.uuid()

    assert torch._inductor.config.post_grad_custom_post_pass is None
    before = key()
    assert before == key()
    monkeypatch.setattr("slimfx.runtime.inductor.library", lambda: "other kernels")
    assert key() != before
    assert torch._inductor.config.post_grad_custom_post_pass is None
