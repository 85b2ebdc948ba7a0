"""The routing of one layer as a static SVG figure: for files, reports, and wherever no script runs."""
from __future__ import annotations

from xml.sax.saxutils import quoteattr

from minimoe.explore.text import display_width, labels
from minimoe.explore.trace import LayerTrace, RoutingTrace
from minimoe.plot import INK, MARGIN, MUTED, PALETTE, PAPER, WIDTH, mix, picture, words

MONO = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
CHIP, LINE_HEIGHT, CHAR = 34, 40, 7.83       # pixels; CHAR is one column of 13 px monospace


def tint(expert: int, strength: float) -> str:
    """Background of an expert's token: stronger with more weight, and always light enough for dark text.

    >>> tint(0, 0.0), tint(0, 1.0)
    ('#ebf4f9', '#70b0d4')
    """
    return mix(PALETTE[expert % 8], 0.08 + 0.48 * strength)


def alt_text(trace: RoutingTrace, index: int | None = None) -> str:
    """What a picture of this layer shows, in words: sizes, the fullest and the emptiest expert, how the text begins.

    >>> layer = LayerTrace(0, ((1,),), ((0.75,),), ((True,),), ((0.25, 0.75),), (0.8113,), (0.0, 1.0))
    >>> alt_text(RoutingTrace("hi", ("hi",), ("",), (7,), 0, 2, 1, "softmax", 1, (layer,)))[:57]
    'Routing of 1 token in layer 0, 2 experts, 1 per token: ex'
    """
    layer = trace.layer(index)
    most, least = (pick(range(trace.n_experts), key=lambda e: layer.load[e]) for pick in (max, min))
    start = " ".join(trace.text.split())
    start = start[:40] + ("…" if len(start) > 40 else "")
    how = "each expert choosing its tokens" if trace.router == "expert_choice" else f"{trace.top_k} per token"
    size, even = _count(len(trace.tokens), "token"), f"an even share is {1 / trace.n_experts:.1%}."
    return (f"Routing of {size} in layer {layer.index}, {trace.n_experts} experts, {how}: "
            f"expert {most} takes the most, {layer.load[most]:.1%} of the load, "
            f"expert {least} the least, {layer.load[least]:.1%}; {even}"
            + (f" The text begins: {start}" if start else ""))


def routing_svg(trace: RoutingTrace, index: int | None = None, max_shown: int = 200) -> str:
    """The text with the first and second expert of each token, and the load of every expert below.

    `index` is the layer's index in the model (default: the first with a router; ValueError for one without).
    """
    layer, shown = trace.layer(index), labels(trace)[:max_shown]
    heaviest = max(w for other in trace.layers for row in other.weights for w in row) or 1.0      # the deepest color
    body, x, y = [], MARGIN, 58
    for t, label in enumerate(shown):
        room = sum(_digits(e) for e, _, _ in layer.taken(t)[:2])
        width = min(max(display_width(label) * CHAR + 8, room, 24.0), WIDTH - 2 * MARGIN)
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + LINE_HEIGHT
        body.append(_chip(t, label, layer, heaviest, x, y, width))
        x += width + 2
        breaks = trace.tokens[t].count("\n")
        if breaks and t + 1 < len(shown):
            indent = trace.tokens[t].rpartition("\n")[2]
            x = MARGIN + (0 if indent.strip() else len(indent.expandtabs(4)) * CHAR)
            y += LINE_HEIGHT + (12 if breaks > 1 else 0)
    y += LINE_HEIGHT
    rest = len(trace.tokens) - len(shown) + trace.left_out
    if rest:
        body.append(words(MARGIN, y + 8, f"… and {_count(rest, 'more token')}", MUTED, 12))
        y += 20
    load, height = _load(layer, y + 16)
    how = "experts choose their tokens" if trace.router == "expert_choice" else f"{trace.top_k} per token"
    head = [words(MARGIN, 28, f"Layer {layer.index}", INK, 15, weight=600),
            words(MARGIN + 72, 28, f"{_count(len(trace.tokens), 'token')}, {trace.n_experts} experts, {how}", MUTED,
                  13)]
    note = ("Under each token stand the numbers of its first and second expert; the stronger the color, the more "
            "weight. The bars give each expert's share of the load, the dashed line an even share.")
    return picture(alt_text(trace, layer.index), note, "\n".join([*head, *body, load]), y + 16 + height)


def _digits(expert: int) -> float:
    """Width that the number of an expert needs under a token."""
    return 5.0 + 6.5 * len(str(expert))


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _chip(t: int, label: str, layer: LayerTrace, heaviest: float, x: float, y: float, width: float) -> str:
    taken = layer.taken(t)
    data = {"data-token": t, "data-experts": ",".join(str(e) for e, _, _ in taken),
            "data-weights": ",".join(f"{w:g}" for _, w, _ in taken)}
    tints = [tint(e, w / heaviest if kept else 0.0) for e, w, kept in taken] or [PAPER]     # a dropped one stays pale
    columns = int((width - 8) / CHAR)
    label = label if display_width(label) <= columns + 1 else label[:columns - 1] + "…"
    out = [f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{CHIP}" rx="4" fill="{tints[0]}"/>',
           words(x + width / 2, y + 15, label, INK, 13, "middle", font=MONO)]
    shown = taken[:2]
    total = sum(w for _, w, _ in shown) or 1.0
    left = x
    for i, (expert, weight, kept) in enumerate(shown):
        other = 0.0 if len(shown) == 1 else _digits(shown[1 - i][0])
        part = width if not other else min(max(width * weight / total, _digits(expert)), width - other)
        if i:
            out.append(f'<rect x="{left + 1:.1f}" y="{y + 20}" width="{part - 1:.1f}" height="{CHIP - 20}" rx="2" '
                       f'fill="{tints[i]}" stroke="{PAPER}"/>')
        out.append(words(left + part / 2, y + 30, str(expert) if kept else f"{expert} full", INK, 10, "middle"))
        left += part
    if not shown:
        out.append(words(x + width / 2, y + 30, "–", INK, 10, "middle"))
    return f'<g {" ".join(f"{k}={quoteattr(str(v))}" for k, v in data.items())}>{"".join(out)}</g>'


def _load(layer: LayerTrace, y: float) -> tuple[str, float]:
    n, tall = len(layer.load), 72
    step = min(56.0, (WIDTH - 2 * MARGIN) / n)
    top, base, many = max(2 / n, *layer.load), y + 20 + tall, n > 32
    out = [words(MARGIN, y + 6, f"Load of the experts; dashed: an even share, {1 / n:.1%}", MUTED, 12)]
    for e, share in enumerate(layer.load):
        x, high, color = MARGIN + e * step, max(tall * share / top, 0.5), PALETTE[e % 8]
        out.append(f'<g data-expert="{e}" data-load="{share:g}">'
                   f'<rect x="{x + step * 0.16:.1f}" y="{base - high:.1f}" width="{step * 0.68:.1f}" '
                   f'height="{high:.1f}" fill="{mix(color, 0.75)}" stroke="{mix(color, 0.55, INK)}"/>'
                   + words(x + step / 2, base + 14, str(e), INK, 8.5 if many else 11, "middle", 400 if many else 600)
                   + (words(x + step / 2, base + 28, f"{share:.0%}", MUTED, 10, "middle") if n <= 16 else "") + "</g>")
    even = base - tall / n / top
    out.append(f'<path d="M{MARGIN} {base:.1f}H{MARGIN + n * step:.1f}" stroke="{MUTED}"/>'
               f'<path d="M{MARGIN} {even:.1f}H{MARGIN + n * step:.1f}" stroke="{INK}" stroke-dasharray="3 3"/>')
    return "\n".join(out), 20 + tall + 44
