"""Makes minimoe/assets/pydocs/ from a finished run of configs/pydocs.yaml.

usage: minimoe train --config configs/pydocs.yaml && python benchmarks/ship.py runs/pydocs

Beside the run folder's own files it puts the text that the model was trained and measured on (the interpreter's text
differs between Python versions) and a README with the figures, all computed here.
"""
import json
import lzma
import platform
import shutil
import sys

import torch

from minimoe.checkpoint import SHIPPED, load
from minimoe.data.loader import load_data, xz_bits_per_byte
from minimoe.device import choose

run = load(sys.argv[1])
data = load_data(run.config.data, run.tokenizer)
SHIPPED.mkdir(parents=True, exist_ok=True)
for name in ("config.yaml", "tokenizer.json", "model.safetensors", "metrics.jsonl"):
    shutil.copyfile(run.folder / name, SHIPPED / name)
rows = [{"corpus": c.name, "held_out": part == "held_out", "name": d.name, "domain": d.domain, "text": d.text}
        for c in data.corpora for part in ("train", "held_out") for d in getattr(c, part)]
lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
(SHIPPED / "text.jsonl.xz").write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))

metrics = run.metrics()
best = min((r for r in metrics if "val_ce" in r), key=lambda r: r["val_ce"])
table = "\n".join(f"| {c.name} | {best['val'][c.name]:.3f} | {xz_bits_per_byte(data, c):.3f} |" for c in data.corpora)
m, choice = run.config.model, choose(run.config.train.device, run.config.train.dtype)
(SHIPPED / "README.md").write_text(f"""# The model that ships with minimoe

    minimoe train --config configs/pydocs.yaml        (seed {run.config.train.seed})
    python benchmarks/ship.py runs/pydocs

{m.num_params():,} parameters, {m.active_params():,} of them active per token: {m.n_layers} layers of {m.n_experts} experts,
top-{m.top_k}. Trained for {metrics[-1]['step']:,} steps, {metrics[-1]['tokens']:,} tokens, in {metrics[-1]['seconds']:.0f} seconds
of training on a CPU ({str(choice.dtype).removeprefix('torch.')}, PyTorch {torch.__version__.split('+')[0]}, Python {platform.python_version()}).
The weights are those of step {best['step']:,}, where the loss on all held-out text was lowest.

| held-out text of | bits per byte | `xz -9e`, given all training text |
|---|---|---|
{table}

`text.jsonl.xz` holds all documents that it was trained on and measured on, one JSON object a line with the keys corpus,
held_out, name, domain and text: text of the Python {platform.python_version()} interpreter (see NOTICE), and generated worlds.
It is a small model of a small text: it has learned how such text looks, and knows nothing.
""", encoding="utf-8")
print((SHIPPED / "README.md").read_text(encoding="utf-8"))
