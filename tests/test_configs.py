"""The configs of the systems that the course reproduces: published sizes, runnable commands, and the small ones train."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from minimoe.cli import COMMANDS, main
from minimoe.cli.parse import parse
from minimoe.cli.training import TrainArgs
from minimoe.config import load_config
from minimoe.data.corpora import load_corpus

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if p.stem != "stages")      # that one is in test_stages.py
SYSTEMS = ("moellama", "blues", "switch", "optimal")

# what the systems' documents and code come to: total and active parameters in millions, as printed there, biases included
PUBLISHED = {"moellama": (21.3, 8.65), "blues": (551, 296), "switch": (38.0, 19.1), "optimal": (207.2, 75.1)}
# ours, counted by hand from the sizes, without biases (the tokenizer's vocabulary for switch: 65 characters and 4 specials)
OURS = {"moellama": (21_214_464, 8_631_552), "blues": (551_212_800, 296_408_832), "switch": (37_963_264, 19_088_896),
        "optimal": (207_177_728, 75_057_152)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_it_loads_and_its_first_line_is_a_command(path):
    config = load_config(path)
    words = shlex.split(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
    assert words[0] == "minimoe" and words[1] in COMMANDS and f"configs/{path.name}" in words
    args = parse(TrainArgs, words[2:], "train", default=TrainArgs(settings=config))
    assert args.config == Path("configs") / path.name
    assert dataclasses.replace(args.settings.model) == config.model     # flags of the command are about the run, not the size


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_published_sizes(name):
    cfg = load_config(ROOT / "configs" / f"{name}.yaml").model
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 69)
    assert (cfg.num_params(), cfg.active_params()) == OURS[name]
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    assert all(f"{n:,}" in " ".join(text.replace("#", "").split()) for n in OURS[name]), "its comment says another number"


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_difference_to_the_published_counts_is_the_biases(name):
    """Each expert of two matrices has hidden + width biases there, a router one per expert, attention four times the width
    (moellama); optimal and blues have none, and the digits that are printed agree."""
    cfg = load_config(ROOT / "configs" / f"{name}.yaml").model
    total, active = OURS[name]
    moe = len(cfg.moe_layers)
    if name == "moellama":
        expert, always = cfg.expert_hidden + cfg.dim, cfg.n_layers * 4 * cfg.dim + moe * (cfg.n_experts + 1)
        biases = always + moe * (cfg.n_experts + 1) * expert
        assert total + biases == 21_264_676
        active += always + moe * (cfg.top_k + 1) * expert
        assert f"{active / 1e6:.2f}" == "8.65"
        total += biases
    if name == "switch":
        total, active = total - 4 * 2 * cfg.dim, active - 4 * 2 * cfg.dim           # 65 characters, without our specials
        dense = cfg.n_layers - moe
        per_ffn = cfg.expert_hidden + cfg.dim
        assert f"{(total + (moe * cfg.n_experts + dense) * per_ffn + moe * cfg.n_experts) / 1e6:.1f}" == "38.0"
        assert f"{(active + (moe + dense) * per_ffn + moe * cfg.n_experts) / 1e6:.1f}" == "19.1"
    assert [round(total / 1e6, 1), active / 1e6] == pytest.approx(PUBLISHED[name], rel=1.5e-3)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_small_one_has_the_same_idea(name):
    big, small = (load_config(ROOT / "configs" / f"{name}{kind}.yaml").model for kind in ("", "-small"))
    same = ("n_experts", "top_k", "norm_topk", "activation", "moe_every", "positions", "qk_norm", "tie_embeddings", "init_std",
            "router", "router_noise", "n_shared_experts", "shared_gate", "capacity_factor", "balance", "aux_coef", "z_coef")
    assert {key: getattr(big, key) for key in same} == {key: getattr(small, key) for key in same}
    group = lambda cfg: cfg.n_heads // cfg.kv_heads
    assert group(small) == min(group(big), small.n_heads)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_small_one_trains(name, tmp_path, monkeypatch, capsys):
    text = "\n\n".join(d.text for d in load_corpus("worlds").train[:200])
    (tmp_path / "tinyshakespeare.txt").write_text(text, encoding="utf-8")
    monkeypatch.setenv("MINIMOE_DATA", str(tmp_path))
    small = str(ROOT / "configs" / f"{name}-small.yaml")
    assert main(["train", "--config", small, "--out", str(tmp_path / "run"), "--steps", "2", "--batch-size", "2",
                 "--mixture", "tiny_shakespeare"]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file() and "held-out" in capsys.readouterr().out


def test_the_ends_of_the_ladder_share_their_text():
    low, high = (load_config(ROOT / "configs" / f"{name}-small.yaml") for name in ("switch", "optimal"))
    assert low.data.mixture == high.data.mixture and low.train == high.train
