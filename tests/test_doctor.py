"""`minimoe doctor` and `minimoe info`: what they say holds, and a machine that computes wrongly is noticed."""
import pytest
import torch

from minimoe import doctor, experts
from minimoe.cli import main
from minimoe.config import ModelConfig
from minimoe.device import Choice, choose
from minimoe.model import MoETransformer, shape_table


def test_doctor_says_what_will_be_used_and_why(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:5]] == ["device", "dtype", "threads", "dispatch"]
    assert all("agrees with the CPU reference" in line for line in shown[5:]) and len(shown) == 7


def test_doctor_says_why_it_takes_these_threads_and_checks_the_dtype_asked_for(capsys):
    before = torch.get_num_threads()
    try:
        assert main(["doctor", "--device", "cpu", "--dtype", "bfloat16", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(before)
    shown = capsys.readouterr().out
    assert "threads 1: asked for, of" in shown and "dtype bfloat16: asked for" in shown and "cpu bfloat16: agrees with" in shown
    assert main(["doctor", "--dtype", "int8"]) == 2 and "dtype='int8': use auto" in capsys.readouterr().err


def test_a_machine_that_computes_wrongly_is_noticed(monkeypatch, capsys):
    right = experts.grouped
    monkeypatch.setattr(experts, "grouped", lambda *args: right(*args) * 1.2)
    assert "DIFFERS from" in doctor.parity(choose("cpu", "float32"))[0]
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--device", "cpu"])
    assert stop.value.code == 1


def test_the_products_of_training_in_bfloat16_are_compared_too(monkeypatch):
    right = experts.blocked
    assert all("agrees with" in line for line in doctor.parity(choose("cpu", "bfloat16")))
    monkeypatch.setattr(experts, "blocked", lambda *args: right(*args) * 1.2)
    assert "DIFFERS from" in doctor.parity(choose("cpu", "bfloat16"))[1]


def test_dispatch_is_explained():
    assert "dispatch grouped: grouped_mm runs on cpu in float32" in doctor.dispatch(choose("cpu", "float32"))
    odd = Choice(torch.device("cpu"), torch.float64, 1, ())
    assert doctor.dispatch(odd) == "dispatch loop: no grouped_mm for torch.float64"


def test_info_counts_every_part(capsys):
    assert main(["info", "shipped"]) == 0
    shown = capsys.readouterr().out
    total = int(shown.split()[0].replace(",", ""))
    table = [line.split() for line in shown.split("\n\n")[1].splitlines()[1:]]
    shapes = [line.split() for line in shown.split("\n\n")[2].splitlines()]
    number = lambda text: int(text.replace(",", ""))
    assert sum(number(parameters) for _, parameters, _ in table) == total == sum(number(line[-1]) for line in shapes)


def test_shape_table_names_every_tensor_once():
    cfg = ModelConfig(vocab_size=9, dim=8, n_layers=3, n_heads=2, n_experts=4, expert_hidden=8, n_dense_first=1)
    lines = shape_table(cfg).splitlines()
    assert len({line.split()[0] for line in lines}) == len(lines)
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == sum(p.numel() for p in MoETransformer(cfg).parameters())
    assert any(line.split()[:1] == ["blocks.*.ffn.experts.w13_EDF"] and " x 2 " in line for line in lines)
