"""What the commands make of the texts that they are given."""

from __future__ import annotations

from torch.export import ExportedProgram

import slimfx


def program_of(model: str, *, weights: bool = True) -> ExportedProgram:
    """A `.pt2` read, or anything else captured: a folder, the name of a model on a hub.

    Args:
        weights: read those of a captured model; False: their shapes alone.
    """
    return slimfx.load(model) if model.endswith(".pt2") else slimfx.capture(model, weights=weights)


def names_in(text: str | None) -> list[str]:
    """ "a, b" -> ["a", "b"]; none for no text."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
