"""Whether a tensor has been written to since it was last looked at."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mark:
    """A tensor as it was; does not keep it alive."""

    tensor: weakref.ref[Tensor]
    version: int | None
    """None where writes are expected or torch does not count them: inference tensors."""
    address: int
    watch: bool

    @classmethod
    def of(cls, tensor: Tensor, *, watch: bool) -> Mark:
        """`watch`: a write to it is a change."""
        version = tensor._version if watch and not tensor.is_inference() else None
        return cls(weakref.ref(tensor), version, tensor.data_ptr(), watch)

    def fits(self, tensor: Tensor | None) -> bool:
        """Is it this tensor, unchanged?"""
        alive = tensor is not None and self.tensor() is tensor
        return alive and Mark.of(tensor, watch=self.watch) == self  # type: ignore[arg-type]
