"""Curves of the result as an SVG file: what a call takes, by the size of what it works on; both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

from .rows import Row

_PANELS = {
    "turns": "A turn, by the length of the conversation",
    "entries": "Search in 100 entries of a user, by the entries of all users",
    "entries of one user": "Search in all that one user has",
}
_AXES = {"turns": "turns", "entries": "entries of all users", "entries of one user": "entries of this user"}
_COLOURS = ("#0b6e99", "#c4432b", "#3f7d20", "#8a4fbe", "#b07d00", "#2b6cb0", "#6b7280", "#d6336c")
_WIDTH, _HEIGHT, _LEFT, _TOP = 520, 300, 64, 44
_LINE = 18
_BETWEEN = 40
_FONT = 'font-family="system-ui, sans-serif" font-size="12"'

Curves = Mapping[str, Sequence[tuple[int, float]]]


def svg(rows: Sequence[Row]) -> str:
    """A drawing of one panel for each kind of size that has a curve; empty of panels if none has."""
    panels = [(size, found) for size in _PANELS if (found := curves(rows, size))]
    parts: list[str] = []
    top = 0
    for size, found in panels:
        parts += _panel(found, title=_PANELS[size], axis=_AXES[size], top=top)
        top += _TOP + _HEIGHT + 48 + _LINE * len(found) + _BETWEEN
    width, height = _LEFT + _WIDTH + 24, max(top, 1)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {_FONT}>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def curves(rows: Sequence[Row], size: str) -> Curves:
    """Milliseconds by size, of ours and of each peer; those measured at one size only are points."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.size != size or row.at is None or row.unit != "ms" or row.section not in ("turn", "search"):
            continue
        ours = row.what.partition(",")[0]
        for name, value in ((f"ours: {ours}", row.ours), (row.against, row.peer)):
            if value and name and not name.startswith("the same"):
                found.setdefault(name, {}).setdefault(row.at, value)
    return {name: sorted(points.items()) for name, points in found.items()}


def _panel(found: Curves, *, title: str, axis: str, top: int) -> Iterator[str]:
    across = _decades([x for points in found.values() for x, _ in points])
    up = _decades([y for points in found.values() for _, y in points])
    left, upper, bottom = _LEFT, top + _TOP, top + _TOP + _HEIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + _WIDTH * (math.log10(x) - across[0]) / (across[1] - across[0]),
            bottom - _HEIGHT * (math.log10(y) - up[0]) / (up[1] - up[0]),
        )

    yield f'<text x="{left}" y="{top + 24}" font-size="14" font-weight="600">{escape(title)}</text>'
    for power in range(up[0], up[1] + 1):
        _, y = place(10 ** across[0], 10.0**power)
        yield f'<line x1="{left}" y1="{y:.1f}" x2="{left + _WIDTH}" y2="{y:.1f}" stroke="#e5e7eb"/>'
        yield f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#4b5563">{10.0**power:g} ms</text>'
    for power in range(across[0], across[1] + 1):
        x, _ = place(10**power, 10.0 ** up[0])
        yield f'<line x1="{x:.1f}" y1="{upper}" x2="{x:.1f}" y2="{bottom}" stroke="#e5e7eb"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#4b5563">{10**power:,}</text>'
    yield f'<text x="{left + _WIDTH / 2}" y="{bottom + 34}" text-anchor="middle" fill="#4b5563">{escape(axis)}</text>'
    for number, (name, points) in enumerate(found.items()):
        colour, ours = _COLOURS[number % len(_COLOURS)], name.startswith("ours")
        places = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        style = f'stroke="{colour}" stroke-width="2"' + ("" if ours else ' stroke-dasharray="5 3"')
        yield f'<polyline points="{path}" fill="none" {style}/>'
        for x, y in places:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        y = bottom + 54 + _LINE * number
        yield f'<line x1="{left}" y1="{y}" x2="{left + 28}" y2="{y}" {style}/>'
        yield f'<text x="{left + 36}" y="{y + 4}">{escape(name)}</text>'


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten around *values*."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


__all__ = ["curves", "svg"]
