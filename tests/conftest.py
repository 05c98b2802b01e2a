"""Every test runs offline, on few threads, and leaves the global random state as it found it."""

import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import trust

LONG = (
    *("kernels/", "gpu/", "runtime/test_gpu", "runtime/test_select.py", "passes/test_lower_gpu.py"),
    *("runtime/test_aoti.py", "runtime/test_hf.py", "runtime/test_onnx", "runtime/test_pte.py"),
    *("passes/test_lower_onnx.py", "passes/test_lower_pte.py", "passes/test_grow_cache.py"),
    *("e2e/test_cache", "e2e/test_cpp_runner.py", "e2e/test_examples.py", "e2e/test_targets.py"),
    *("test_import_checkpoint.py", "test_bench_model.py", "test_bench_kernels.py"),
    *("test_finetune.py", "passes/test_train_adapters.py", "docs/test_docs.py"),
    *("test_latency.py", "runtime/test_direct.py"),
    *(
        "test_report_browser.py",
        "test_report_speed.py",
        "e2e/test_experts.py",
        "e2e/test_embeddings.py",
    ),
    *("test_ranks.py", "test_budget.py", "test_cli_budget.py"),
)
"""Files of `make test-long`: kernels and deployment targets, which compile, what trains and what
searches; `make test` has all others.
"""


TRUST = ("faults/", "fuzz/", "test_random_programs.py", "test_numerics.py")
"""Files of `make trust` alone: many tries of one kind."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anywhere but this process is a failure."""

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a test tried to open a connection to {address!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is remembered in one run of the tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from the user's folder, or written to it."""
    monkeypatch.setenv("SLIMFX_CACHE", str(cache_folder))


@pytest.fixture(autouse=True)
def same_random_state() -> None:
    """Each test starts from one seed, so that none depends on another's draws."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test tried goes into its report, from whichever worker ran it."""
    before = trust.TRIED.copy(), trust.HELD.copy()
    yield
    for name, now, then in zip(("tried", "held"), (trust.TRIED, trust.HELD), before):
        request.node.user_properties += [(name, dict(now - then))] if now - then else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One table of what was tried and what held."""
    totals: dict[str, Counter[str]] = {"tried": Counter(), "held": Counter()}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "teardown":
                for name, counts in report.user_properties:
                    if name in totals:
                        totals[name].update(counts)
    if totals["tried"]:
        terminalreporter.section("trust")
        for what, tried in sorted(totals["tried"].items()):
            terminalreporter.line(f"{what:<32}{tried:>10} tried{totals['held'][what]:>10} held")


def pytest_configure(config: pytest.Config) -> None:
    """Two workers share the machine; torch must not start more threads than there are cores."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `LONG` and `TRUST`."""
    root = Path(__file__).parent
    for item in items:
        if item.path.relative_to(root).as_posix().startswith(LONG):
            item.add_marker(pytest.mark.long)
        if item.path.relative_to(root).as_posix().startswith(TRUST):
            item.add_marker(pytest.mark.trust)
