"""The figure of a comparison as a static SVG: curves on the left, end points with intervals on the right."""
from __future__ import annotations

import math
from xml.sax.saxutils import quoteattr

from minimoe.plot import INK, LINE, MUTED, PALETTE, picture, ticks, words

WIDTH, LEFT, SPLIT, NAMES, RIGHT, TOP, ROW = 920, 56, 400, 650, 900, 56, 24      # pixels
DASHES = ("", "6 3", "2 3")                     # a second and a third round of the colors


def si(value: float) -> str:
    """Three digits and a prefix.

    >>> si(1_234_567), si(8.5e14)
    ('1.23 M', '850 T')
    """
    power = min(6, int(math.log10(max(value, 1)) / 3))
    return f"{value / 1000**power:.3g} {' kMGTPE'[power].strip()}"


def draw(rows: list[tuple[str, float, float | None, list[tuple[float, float]]]], cost: str, seeds: int) -> str:
    """`rows` are name, bits per byte at the end, half its interval (or None), and the curve as (cost, bits per byte).

    >>> draw([("a", 2.0, 0.1, [(1e6, 3.0), (2e6, 2.0)]), ("b", 2.5, None, [(2e6, 2.5)])], "bytes", 2).count("<circle")
    4
    """
    height = max(TOP + ROW * len(rows), 300) + 52
    floor, low = height - 52, TOP + ROW * len(rows)
    best = min(rows, key=lambda r: r[1])
    alt = (f"Held-out bits per byte of {len(rows)} models at equal {cost}, {seeds} seed{'s' * (seeds > 1)}: "
           f"{', '.join(f'{name} {end:.3f}' for name, end, _, _ in rows)}; lowest: {best[0]}")
    points = [p for *_, curve in rows for p in curve]
    most = max(x for x, _ in points)
    body = [words(LEFT, 24, "Held-out bits per byte on the way", INK, 14, weight=600),
            words(SPLIT + 40, 24, "At the end" + (", with 95 % intervals over the seeds" if seeds > 1 else ", one seed"), INK, 14,
                  weight=600),
            words((LEFT + SPLIT) / 2, height - 12, cost, MUTED, 12, "middle"),
            words((NAMES + RIGHT) / 2, low + 40, "bits per byte", MUTED, 12, "middle")]
    x_of = lambda x: LEFT + (SPLIT - LEFT - 20) * x / most
    y_of, marks = _scale([y for _, y in points], floor, TOP - 16)
    for y in marks:
        body += [_line(LEFT, y_of(y), SPLIT - 20, y_of(y), LINE), words(LEFT - 6, y_of(y) + 4, f"{y:g}", MUTED, 11, "end")]
    for x in ticks(0, most, 4):
        body.append(words(x_of(x), floor + 18, si(x), MUTED, 11, "middle"))
    place, marks = _scale([end + sign * (half or 0) for _, end, half, _ in rows for sign in (-1, 1)], NAMES, RIGHT - 10)
    for x in marks:
        body += [_line(place(x), TOP - 16, place(x), low, LINE), words(place(x), low + 18, f"{x:g}", MUTED, 11, "middle")]
    for i, (name, end, half, curve) in enumerate(rows):
        color, dash, y = PALETTE[i % 8], DASHES[i // 8 % 3], TOP + ROW * i
        path = "M" + "L".join(f"{x_of(x):.1f} {y_of(v):.1f}" for x, v in curve)
        body.append(f'<g data-name={quoteattr(name)} data-bpb="{end:.5f}">'
                    f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>'
                    + "".join(f'<circle cx="{x_of(x):.1f}" cy="{y_of(v):.1f}" r="2.5" fill="{color}"/>' for x, v in curve[-1:])
                    + _line(SPLIT + 10, y, SPLIT + 32, y, color, 3, dash) + words(SPLIT + 40, y + 4, name if len(name) < 31 else name[:29] + "…", INK, 12)
                    + (_line(place(end - half), y, place(end + half), y, color, 3) if half is not None else "")
                    + f'<circle cx="{place(end):.1f}" cy="{y}" r="5" fill="{color}" stroke="{INK}"/></g>')
    return picture(alt, "Curves over the cost, end points with their intervals beside them.", "\n".join(body), height, WIDTH)


def _scale(values: list[float], start: float, end: float):
    """From values to pixels, with a little room at both ends, and the round values in between."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05
    low, high = low - room, high + room
    return (lambda v: start + (end - start) * (v - low) / (high - low)), ticks(low, high)


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: float = 1, dash: str = "") -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{color}" stroke-width="{width}" stroke-dasharray="{dash}"/>'
