"""Several processes at work on one job.

The work is cut in the same way whatever their number, and what comes of it is put together in one
order, so any number of processes comes to the same bytes, given as many threads each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from slimfx import errors
from slimfx.errors import SlimError
from slimfx.plain import built, plain

P = TypeVar("P")
T = TypeVar("T")

_SHARES = 16
"""Into how many runs the calibration batches are cut: more processes than that only solve."""


@dataclass(frozen=True)
class Ranks:
    """The processes at work, and which this one is; alone without a group."""

    group: dist.ProcessGroup | None = None

    @property
    def own(self) -> int:
        """Number of this process, from 0."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def each(self, parts: Sequence[P], work: Callable[[P], T]) -> Iterator[T]:
        """What `work` comes to for each part, in order and in every process; part i is done by
        process i modulo their number. An error in one is raised in all.
        """
        for first in range(0, len(parts), self.size):
            now = parts[first : first + self.size]
            found = attempt(lambda: work(now[self.own])) if self.own < len(now) else None  # noqa: B023
            for by in range(len(now)):
                yield self.told(by, found)

    def once(self, work: Callable[[], T]) -> T:
        """What `work` comes to in the first process, in every process."""
        return self.told(0, attempt(work) if self.own == 0 else None)

    def told(self, by: int, found: T | SlimError | None) -> T:
        """What process `by` found, in every process: tensors, numbers and results in lists, dicts
        by string or the dataclasses of `slimfx.plain`.

        Raises:
            SlimError: it found this error, or a process has ended.
        """
        if self.group is None:
            if isinstance(found, SlimError):
                raise found
            return found  # type: ignore[return-value]
        try:
            said, tensors = _broadcast(found if self.own == by else None, by, self.group)
        except RuntimeError as ended:  # what torch.distributed raises
            raise SlimError(
                f"process {self.own} heard no more of process {by}: one of {self.size} has ended; "
                f"run the same command to go on behind the last finished block"
            ) from ended
        if "error" in said:
            raise getattr(errors, said["error"], SlimError)(said["message"])
        return built(said["found"], tensors)


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # gloo for tensors of the CPU, nccl for those of GPUs
    try:
        yield Ranks(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def attempt(work: Callable[[], T]) -> T | SlimError:
    """What `work` comes to, or its error, to be told to others."""
    try:
        return work()
    except SlimError as error:
        return error


def shares(count: int) -> list[range]:
    """The numbers of so many batches in runs whose statistics are summed by themselves."""
    parts = min(count, _SHARES)
    return [range(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def _broadcast(
    found: Any, by: int, group: dist.ProcessGroup
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    if dist.get_rank(group) == by:
        said = _said(found, tensors)
        said["tensors"] = [
            [name, str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type]
            for name, t in tensors.items()
        ]
        header = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(header)]), group=group, group_src=by)
        dist.broadcast(header, group=group, group_src=by)
    else:
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, group=group, group_src=by)
        header = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(header, group=group, group_src=by)
        said = json.loads(header.numpy().tobytes())
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for name, dtype, shape, device in said["tensors"]
        }
    for tensor in tensors.values():
        if tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), group=group, group_src=by)
    return said, tensors


def _said(found: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(found, SlimError):
        return {"error": type(found).__name__, "message": str(found)}
    return {"found": plain(found, "", tensors)}
