"""Draw the pictures of the concepts.

python docs/draw.py        # tests/docs/test_written.py compares
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"
INK, PALE, BLUE, GREEN, ORANGE = "#333333", "#e8e8e8", "#4c78a8", "#54a24b", "#f58518"
"""On a white sheet, so that they read on dark pages too."""


def box(x: float, y: float, w: float, h: float, fill: str = PALE, text: str = "") -> str:
    """A rectangle with a text in its middle, white on colours."""
    ink = INK if fill == PALE else "white"
    found = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}"/>'
    return found + (label(x + w / 2, y + h / 2, text, ink=ink) if text else "")


def label(x: float, y: float, text: str, *, ink: str = INK, size: int = 14) -> str:
    """Text about a point, a line for each part between bars."""
    lines = text.split("|")
    first = y - (len(lines) - 1) * 0.6 * size
    style = f'fill="{ink}" font-size="{size}"'
    return "".join(
        f'<text x="{x}" y="{first + 1.2 * size * i:g}" {style}>{line}</text>'
        for i, line in enumerate(lines)
    )


def arrow(x1: float, y1: float, x2: float, y2: float, ink: str = INK) -> str:
    """From one point to another."""
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{ink}" stroke-width="2" '
        f'marker-end="url(#end)"/>'
    )


def sheet(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """The whole file."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" role="img" font-family="sans-serif" text-anchor="middle" '
        f'dominant-baseline="central">'
    )
    end = (
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        f'markerHeight="6" orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
    )
    paper = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([head, f"<title>{title}</title>", end, paper, *parts, "</svg>\n"])


def two_of_four() -> str:
    """Eight weights, the four that stay, their codes and their places."""
    weights = (0.02, 0.31, -0.05, -0.44, 0.07, -0.01, 0.13, 0.04)
    codes = {1: 5, 3: -7, 4: 1, 6: 2}
    parts = [label(70, 45, "weights"), label(70, 125, "two of four stay"), label(70, 205, "stored")]
    for i, weight in enumerate(weights):
        x = 150 + 60 * i + 20 * (i // 4)
        parts.append(box(x, 25, 54, 40, BLUE if i in codes else PALE, f"{weight:.2f}"))
        kept = i in codes
        parts.append(box(x, 105, 54, 40, BLUE if kept else PALE, str(codes[i]) if kept else "0"))
    for place, (i, code) in enumerate(codes.items()):
        x = 150 + 116 * place + 36 * (place // 2)
        parts.append(box(x, 185, 50, 40, BLUE, f"{code}"))
        parts.append(box(x + 54, 185, 34, 40, ORANGE, f"{i % 4:02b}"))
        parts.append(label(x + 25, 240, "4 bits", size=11) + label(x + 71, 240, "2 bits", size=11))
    title = "Eight weights, four of which are stored as a code of 4 bits and a place of 2 bits"
    return sheet(680, 260, title, parts)


def adapters() -> str:
    """W as a sparse matrix plus a product of thin ones."""
    parts = [box(20, 40, 140, 140, PALE, "W"), label(185, 110, "≈", size=22)]
    parts += [box(210, 40, 140, 140, BLUE)]
    parts += [box(214 + 34 * i, 44 + 34 * j, 14, 30, "white") for i in range(4) for j in range(4)]
    parts += [label(280, 200, "Wc: 2:4, int4, 3 bits a weight"), label(375, 110, "+", size=22)]
    parts += [box(400, 40, 30, 140, GREEN, "R"), box(440, 40, 140, 30, GREEN, "L")]
    parts += [
        label(525, 110, "r: a tenth|of the side"),
        label(490, 200, "adapters: 0.8 bits in int4"),
    ]
    parts += [label(90, 200, "float, 16 bits")]
    return sheet(620, 225, "A weight is a sparse integer weight plus a product of thin ones", parts)


def blocks() -> str:
    """Calibration tokens through compressed blocks."""
    parts = [label(50, 80, "tokens")]
    states = ((GREEN, "block 0|compressed"), (GREEN, "block 1|compressed"), (ORANGE, "block 2|now"))
    for i, (fill, text) in enumerate((*states, (PALE, "block 3|not yet"))):
        x = 110 + 140 * i
        parts += [arrow(x - 28, 80, x - 4, 80), box(x, 50, 108, 60, fill, text)]
    parts += [
        arrow(444, 112, 444, 142),
        box(300, 145, 288, 36, BLUE, "statistics of its inputs: H, ..."),
    ]
    parts += [arrow(444, 183, 444, 208), box(300, 211, 288, 36, BLUE, "solve, pack")]
    parts += [arrow(590, 229, 626, 229), label(660, 229, "replaces|block 2", size=12)]
    title = "Tokens pass compressed blocks; the next block is observed, solved and packed"
    return sheet(700, 265, title, parts)


def joint() -> str:
    """The alternation."""
    parts = [
        box(30, 40, 250, 76, BLUE, "sparse integer weight|of W - R L, column by column"),
        box(400, 40, 250, 76, GREEN, "L and R: the optimum|for W - Wc under H"),
        arrow(282, 60, 396, 60),
        arrow(398, 98, 284, 98),
        label(340, 45, "Wc", size=12),
        label(340, 114, "L, R", size=12),
        label(340, 150, "both aim at the least tr(E H E^T), E = W - Wc - R L, H = X^T X"),
        label(340, 180, "8 rounds; the best iterate is kept", size=12),
    ]
    return sheet(680, 205, "Weight and adapters are found in turn", parts)


def targets() -> str:
    """One program, five kinds of file."""
    rows = (
        ("pt2", "torch"),
        ("aoti", "torch, libtorch: machine code"),
        ("pte", "ExecuTorch"),
        ("onnx", "ONNX Runtime"),
        ("hf", "transformers, peft, vLLM"),
    )
    parts = [box(20, 105, 170, 70, BLUE, "compressed|program")]
    for i, (name, runs) in enumerate(rows):
        y = 20 + 50 * i
        parts += [arrow(192, 140, 266, y + 18), box(270, y, 90, 36, GREEN, name)]
        parts += [arrow(362, y + 18, 396, y + 18), box(400, y, 240, 36, PALE, runs)]
    return sheet(660, 270, "One compressed program is written for five places", parts)


DRAWN: dict[str, Callable[[], str]] = {
    "two_of_four": two_of_four,
    "adapters": adapters,
    "blocks": blocks,
    "joint": joint,
    "targets": targets,
}


if __name__ == "__main__":
    for name, draw in DRAWN.items():
        (PICTURES / f"{name}.svg").write_text(draw(), encoding="utf-8")
