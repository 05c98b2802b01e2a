"""slimfx's ops in Inductor: lowerings with kernels of our own, and their part in cache keys."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from slimfx.runtime.gpu_ops import OP
from slimfx.runtime.inductor import gpu_linear
from slimfx.runtime.inductor.cpu_linear import library, lower_linear_cpu
from slimfx.runtime.ops import REFERENCES
from torch._inductor import config, lowering
from torch._inductor.custom_graph_pass import CustomGraphPass


class _CacheKey(CustomGraphPass):
    """Changes nothing; its uuid makes Inductor's caches tell versions of our kernels apart."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __call__(self, graph: torch.fx.Graph) -> None:
        """What the pass in our place would have done."""
        if self.wrapped is not None:
            self.wrapped(graph)

    def uuid(self) -> Any:
        """Version and sources, and the key of the pass in whose place this is."""
        inner = self.wrapped.uuid() if isinstance(self.wrapped, CustomGraphPass) else None
        source = hashlib.sha256(library().encode())
        for path in sorted(Path(__file__).parents[1].glob("kernels/*.py")):
            source.update(path.read_bytes())  # templates for GPUs call what is in these
        source.update(Path(gpu_linear.__file__).read_bytes())
        return ("slimfx", version("slimfx"), source.hexdigest(), inner)


@contextmanager
def kernels() -> Iterator[None]:
    """Inductor compiles `linear_cpu` and `linear_gpu` by our templates, here and in what is cached
    under our key.
    """
    ours: dict[Any, Callable[..., Any]] = {
        torch.ops.slimfx.linear_cpu.default: lower_linear_cpu,
        OP: gpu_linear.lower_linear_gpu,
    }
    for op, lower in ours.items():
        if op not in lowering.lowerings:
            lowering.register_lowering(op, type_promotion_kind=None)(lower)
    key = _CacheKey(config.post_grad_custom_post_pass)
    with config.patch(post_grad_custom_post_pass=key):
        yield


def compile_graph(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """What `torch.compile` makes of a graph with slimfx ops; those without a kernel as ATen."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    table: Any = {**select_decomp_table(), **REFERENCES}
    with kernels():
        return compile_fx(gm, list(example_inputs), decompositions=table)  # type: ignore[return-value]
