"""minimoe explore."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from minimoe.cli.parse import open_run, parse
from minimoe.settings import need


@dataclasses.dataclass(frozen=True)
class ExploreArgs:
    """Shows where the routers of a model send each token of a text."""

    run: Annotated[str | None, tyro.conf.Positional] = None
    """Run folder, or "shipped"; default the newest under runs/, else the shipped one."""
    text: tuple[str, ...] = ("The for statement is used to iterate over the elements of a sequence.",)
    """The text; more than one can be chosen from on the page."""
    text_file: Path | None = None
    """File whose text is taken instead."""
    html: Path | None = None
    """Page to write: the routing explorer, which needs neither a kernel nor a network."""
    svg: Path | None = None
    """Static figure to write, of one layer."""
    json: Path | None = None
    """File to write the plain numbers to."""
    layer: int | None = None
    """Index of the layer to print, to draw and to begin with; default the first that has a router."""
    device: str = "cpu"
    """cpu, cuda, cuda:N or mps."""
    step: int | None = None
    """The kept checkpoint of this step; default the weights with the lowest held-out loss."""


def explore(argv: list[str]) -> None:
    """Show where the routers send each token: minimoe explore runs/pydocs --text "for x in xs:" --html out.html"""
    args = parse(ExploreArgs, argv, "explore")
    from minimoe.data.sources import read_text
    from minimoe.explore import labels, routing_trace, view

    need(bool(args.text), "--text: give at least one text")
    run = open_run(args.run, args.device, args.step)
    texts = args.text if args.text_file is None else (read_text(args.text_file),)
    traces = [routing_trace(run, text) for text in texts]
    shown = view(traces[0], {(t.text if len(t.text) < 40 else t.text[:39] + "…"): t for t in traces}, layer=args.layer)
    layer = traces[0].layer(args.layer)
    print(f"layer {layer.index}, {traces[0].router} router, top-{traces[0].top_k} of {traces[0].n_experts} experts\n"
          f"{'token':<16}expert and weight")
    for i, label in enumerate(labels(traces[0])):
        taken = "   ".join(f"{expert} {weight:.2f}{'' if kept else ' dropped'}" for expert, weight, kept in layer.taken(i))
        print(f"{label:<16}{taken or 'none'}")
    print("share of the pairs per expert: " + " ".join(f"{share:.0%}" for share in layer.load))
    if traces[0].left_out:
        print(f"the last {traces[0].left_out} tokens are more than this model reads at once, and left out")
    if args.html:
        print(f"saved {shown.save_html(args.html)}")
    for path, content in ((args.svg, shown.svg), (args.json, lambda: json.dumps([t.to_dict() for t in traces]))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content(), encoding="utf-8")
            print(f"saved {path}")
