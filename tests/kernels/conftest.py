"""Kernels run in Triton's interpreter, in a process of its own, and on a GPU where there is one."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import ptx
import pytest
import torch
from offline import Run


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process that imports Triton with TRITON_INTERPRET set: Triton reads it at each import."""
    spawn = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=(1,))
        pool.submit(len, "").result()
    with pool:
        yield pool


@pytest.fixture(scope="session", params=["interpreter", "cuda"])
def run(request: pytest.FixtureRequest) -> Run:
    """`run(function, *arguments)` calls a function of a test file with a device to begin with.

    Functions must be found by name, and give back what pickles: tensors of the CPU, numbers.
    """
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        return lambda function, *arguments: function("cuda", *arguments)
    pool = request.getfixturevalue("interpreter")

    def interpreted(function: Run, *arguments: Any) -> Any:
        work = pickle.dumps((function, ("cpu", *arguments)))
        return pickle.loads(pool.submit(ptx.call, work).result())

    return interpreted


@pytest.fixture(scope="session", autouse=True)
def own_triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What Triton compiles in a test is no file of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield
