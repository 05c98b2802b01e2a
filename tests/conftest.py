"""Every test runs offline, on few threads, and leaves the global random state as it found it."""

import socket

import pytest
import torch


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anywhere but this process is a failure."""

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a test tried to open a connection to {address!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(autouse=True)
def same_random_state() -> None:
    """Each test starts from one seed, so that none depends on another's draws."""
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    """Two workers share the machine; torch must not start more threads than there are cores."""
    torch.set_num_threads(1)
