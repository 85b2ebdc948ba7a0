"""benchmarks/ladder.py: the rungs lead from one end to the other, each by its own keys alone, and the verdicts are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minimoe.compare import Comparison, Entry
from minimoe.config import load_config
from minimoe.settings import ConfigError, to_dict

ROOT = Path(__file__).parents[1]


@pytest.fixture
def ladder(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ladder

    return ladder


@pytest.fixture
def ends():
    return [load_config(ROOT / "configs" / f"{name}.yaml") for name in ("switch-small", "optimal-small")]


def flat(config):
    return {k: v for section, values in to_dict(config).items() if section != "generate" for k, v in values.items()}


@pytest.mark.parametrize("backwards", [False, True])
def test_each_rung_changes_its_keys_and_nothing_else(ladder, ends, backwards):
    ends, rungs = (ends[::-1], ladder.RUNGS[::-1]) if backwards else (ends, ladder.RUNGS)
    climb = list(ladder.ladder(*ends, rungs).values())
    assert len(climb) == len(rungs) + 1 and flat(climb[0]) == flat(ends[0]) and flat(climb[-1]) == flat(ends[1])
    for below, above, keys in zip(climb, climb[1:], rungs):
        changed = {k for k in flat(above) if flat(above)[k] != flat(below)[k]}
        assert changed and changed <= set(keys)
    assert sum(len(keys) > 1 for keys in rungs) == 2            # the groups that make no sense apart


def test_rungs_that_do_not_lead_there_are_refused(ladder, ends):
    with pytest.raises(ConfigError, match="the rungs leave out positions: name them in RUNGS"):
        ladder.ladder(*ends, ladder.RUNGS[1:])
    with pytest.raises(ConfigError, match="rung positions: both ends have the same"):
        ladder.ladder(ends[0], ladder.with_keys(ends[1], ends[0], ("positions",)))


@pytest.mark.parametrize("backwards", [False, True])
def test_record_and_verdicts(ladder, ends, backwards, tmp_path, monkeypatch, capsys):
    """The whole script with made-up measurements in place of training."""
    monkeypatch.setenv("MINIMOE_DATA", str(tmp_path))
    text = "".join(f"Line {i} of a play, with a few words in it.\n" for i in range(400))
    (tmp_path / "tinyshakespeare.txt").write_text(text, encoding="utf-8")
    asked = {}

    def measured(configs, **options):
        asked.update(options, configs=configs)
        bpb = [(3.0, 3.1), (3.2, 3.3), (3.0, 3.5), (2.0, 2.1)]            # worse, cannot be told, better
        return Comparison(tuple(Entry(
            name=name, config=config, cost=1e5, total=9, active=5, bpb=bpb[min(i, 3)] if i < 4 else (2.0, 2.2), memory=(10**9, 2 * 10**9),
            max_vio=(0.25, 0.75), tokens_per_s=(10.0, 20.0), curves=(((1.0, 3.0),),) * 2)
            for i, (name, config) in enumerate(configs.items())), "bytes", (0, 1))

    monkeypatch.setattr(ladder, "compare", measured)
    monkeypatch.setattr(ladder, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ladder.main(["--seeds", "2", "--steps", "40", *(["--backwards"] if backwards else [])])
    name = "ladder-backwards" if backwards else "ladder"
    assert asked["equal"] == "bytes" and asked["seeds"] == 2 and asked["out"] == Path("runs") / name
    first, last = list(asked["configs"].values())[:: len(asked["configs"]) - 1]
    assert (first.model.positions, last.model.positions) == (("rope", "learned") if backwards else ("learned", "rope"))
    assert (first.train.steps < 40) == backwards and first.train == last.train
    record = json.loads((tmp_path / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert {"machine", "versions", "command", "date", "seeds"} <= set(record) and "--steps 40" in record["command"]
    verdicts = [r["verdict"] for r in record["rungs"][:4]]
    assert verdicts == ["", "worse", "buys nothing that these seeds can tell", "buys nothing that these seeds can tell"]
    assert record["rungs"][1]["change"] == pytest.approx(0.2) and record["rungs"][3]["interval"] > 1
    table = (tmp_path / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out and "+0.200 ± 0.000 | worse | 0.50 | 15 | 2 GB |" in table
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == len(ladder.RUNGS) + 3


def test_one_seed_judges_nothing(ladder, ends):
    entries = tuple(Entry(name=n, config=ends[0], cost=1.0, total=1, active=1, bpb=(b,), max_vio=(0.0,), tokens_per_s=(1.0,),
                          memory=(None,), curves=()) for n, b in (("a", 2.0), ("b", 1.0)))
    rows, table = ladder.steps_table(Comparison(entries, "bytes", (0,)))
    assert rows[1]["verdict"] == "one seed: not judged" and rows[1]["change"] == -1.0 and "-1.000 | one seed" in table
