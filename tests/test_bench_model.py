"""`bench model`: sane rows, each from a process of its own, and clear refusals."""

import pytest

from slimfx import bench_model
from slimfx.errors import SlimError


def test_the_rows_are_sane(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = ("float32", "compressed", "all compressed")
    monkeypatch.setattr(bench_model, "VARIANTS", variants)
    told: list[str] = []
    dense, small, least = bench_model.bench_model(
        size="tiny", tokens=3, batch=5, threads=1, progress=lambda share, name: told.append(name)
    )
    assert told == [f"{n}: {what}" for n in variants for what in ("compile", "run")]
    assert small.linear_bytes < 0.15 * dense.linear_bytes  # 2:4 int4 with adapters: 3.7 bits
    assert small.weight_bytes < dense.weight_bytes
    rows, width = 32000, 256  # of the table and of the head: float32, or codes with a scale a row
    assert small.weight_bytes - least.weight_bytes == 2 * rows * (4 * width - (width + 2))
    for row in (dense, small, least):
        assert row.one > 0 and row.many > 0
        assert row.peak >= row.resident > row.weight_bytes


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(SlimError, match="size '9t' is not one of tiny, 1b, 3b"):
        bench_model.bench_model(size="9t")
    with pytest.raises(
        SlimError, match=r"float32 failed: slimfx\.errors\.SlimError: missing: no such"
    ):
        bench_model.bench_model("missing")
