"""Conversations: in Python, in the terminal through a pipe and by hand, and what the server gives to whom."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from minimoe.chat import service as rooms
from minimoe.chat.service import Busy, Limits, NotThere, OutOfTime, Question, Service, paced
from minimoe.chat.terminal import BASE, Terminal
from minimoe.checkpoint import load
from minimoe.cli import main
from minimoe.config import to_dict
from minimoe.settings import ConfigError
from tests.chat_runs import command, environment, make_talker

user = lambda text: {"role": "user", "content": text}
assistant = lambda text: {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("chat")
    make_talker(top / "runs" / "talker")
    make_talker(top / "runs" / "base", supervised=False)
    make_talker(top / "runs" / "stages" / "sft", seed=1)
    return top


@pytest.fixture(scope="module")
def run(folder):
    return load(folder / "runs" / "talker")


# --- Run.chat ----------------------------------------------------------------------------------------------------------
def test_an_answer_goes_on_from_the_whole_conversation_in_the_template(run):
    messages = [user("hi"), assistant("ho"), user("and now?")]
    ids = run.tokenizer.chat(messages, reply=True)[0]
    answer = "".join(run.chat(messages, 12))
    assert answer == "".join(run.stream(ids, 12)) and len(answer) == 12
    assert answer != "".join(run.chat(messages[-1:], 12))
    with pytest.raises(ConfigError, match="user"):
        run.chat([user("hi"), assistant("ho")])


def test_the_end_of_the_turn_ends_the_answer(folder):
    """For one of two signs the likeliest token is always <|end|>, for the other an a."""
    answers = set()
    for sign in (1, -1):
        run = load(folder / "runs" / "talker")
        with torch.no_grad():
            run.model.head.weight.zero_()
            run.model.head.weight[run.tokenizer.inner.token_to_id("<|end|>")] = sign
            run.model.head.weight[run.tokenizer.encode("a")] = -sign
        pieces = list(run.chat([user("hi")], 9))
        answers.add((len(pieces), "".join(pieces)))
    assert answers == {(1, ""), (9, "a" * 9)}


def test_a_base_model_goes_on_from_the_newest_text(folder):
    base = load(folder / "runs" / "base")
    assert "".join(base.chat([user("before"), assistant("x"), user("hi")], 9)) == base.generate("hi", 9)


def test_what_does_not_fit_is_left_out_from_the_oldest_on(run):
    system = {"role": "system", "content": "S" * 10}
    turns = [m for i in range(6) for m in (user(f"{i}" * 10), assistant(f"{i}" * 10))] + [user("newest")]
    ids, left_out = run.chat_prompt([system, *turns], max_new_tokens=20)
    text = run.tokenizer.decode(ids)
    assert 0 < left_out < len(turns) and left_out % 2 == 0 and len(ids) <= 128 - 20
    assert text == "S" * 10 + "\n\n" + "".join(m["content"] for m in turns[left_out:])
    more = run.tokenizer.chat([system, *turns[left_out - 2:]], reply=True)[0]
    assert len(more) > 128 - 20                         # one turn more would not have fitted
    assert run.chat_prompt([user("a"), assistant("b"), user("c")])[1] == 0
    long = run.chat_prompt([user("old"), assistant("b"), user("q" * 100)], max_new_tokens=60)
    assert long[1] == 2 and run.tokenizer.decode(long[0]) == "q" * 100
    with pytest.raises(ConfigError, match="context is 128"):
        run.chat([user("q" * 200)])


def test_conversations_beside_each_other_do_not_disturb_each_other(run):
    """Interleaved in one thread, and in several threads at once, as on the page; nothing leaks between the pieces."""
    asks = [[user(text)] for text in ("one", "another", "a third")]
    alone = ["".join(run.chat(m, 40, temperature=1.0, seed=3)) for m in asks]
    streams, texts = [run.chat(m, 40, temperature=1.0, seed=3) for m in asks], ["", "", ""]
    for pieces in zip(*streams, strict=False):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        texts = [t + piece for t, piece in zip(texts, pieces)]
    assert all(a.startswith(t) and t for a, t in zip(alone, texts))
    found = [None] * 3

    def work(i):
        found[i] = ["".join(run.chat(asks[i], 40, temperature=1.0, seed=3)) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[text] * 3 for text in alone] and not run.model.training


# --- the terminal ------------------------------------------------------------------------------------------------------
def test_through_a_pipe_one_answer_a_line(folder, run):
    lines = "first question\n\n  \nsecond question\nparams temperature\nclear\nfirst question\nexit\nnever asked\n"
    done = subprocess.run(command("runs/talker", "--verbose"), input=lines, capture_output=True, text=True, encoding="utf-8",
                          cwd=folder, env=environment(), timeout=120)
    first = "".join(run.chat([user("first question")]))
    second = "".join(run.chat([user("first question"), assistant(first), user("second question")]))
    assert done.returncode == 0
    assert done.stdout.splitlines() == [first, second, "temperature      0.0", first]
    assert "20 tokens" in done.stderr and "tokens/s" in done.stderr and "context of 128" in done.stderr
    assert BASE not in done.stderr and "Traceback" not in done.stderr


def test_without_a_run_the_newest_is_taken_and_a_base_model_says_so_once(folder):
    done = subprocess.run(command("--max-new-tokens", 5), input="a\nb", capture_output=True, text=True, encoding="utf-8",
                          cwd=folder, env=environment(), timeout=120)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2 and "using runs/" in done.stderr
    base = subprocess.run(command("runs/base"), input="a\nb\n", capture_output=True, text=True, encoding="utf-8", cwd=folder,
                          env=environment(), timeout=120)
    assert base.stderr.count(BASE) == 1


@pytest.mark.parametrize("words", [("--seed", "-1"), ("--temperature", "nan"), ("--web", "--temperature", "1"), ("nowhere",),
                                   ("--web", "--parallel", "0"), ("--web", "--host", "300.1.1.1")])
def test_what_cannot_be_is_one_line_and_exit_code_2(folder, words, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["chat", *words]) == 2
    assert len(capsys.readouterr().err.split("minimoe: error: ")[1].splitlines()) == 1


def test_without_gradio_the_page_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.chdir(folder)
    assert main(["chat", "runs/talker", "--web"]) == 2 and "pip install minimoe[chat]" in capsys.readouterr().err


def test_params_are_shown_and_set_and_checked(run, capsys):
    terminal = Terminal(run)
    for line in ("params temperature 0.5", "params top_k none", "params top_p 0.5", "params stop xyz", "params seed 7"):
        assert terminal.ask(line)
    g = terminal.run.config.generate
    assert (g.temperature, g.sample_top_k, g.top_p, g.stop, terminal.seed) == (0.5, None, 0.5, ("xyz",), 7)
    assert run.config.generate.temperature == 0         # the run itself is as it was
    capsys.readouterr()
    terminal.ask("params")
    assert capsys.readouterr().out.split() == ("max_new_tokens 20 temperature 0.5 top_k None top_p 0.5 stop ['xyz'] "
                                               "seed 7").split()
    for line in ("params temperature nan", "params temperature -1", "params top_k 0", "params top_p 2", "params seed -1",
                 "params max_new_tokens 1.5", "params nothing 3"):
        with pytest.raises(ConfigError):
            terminal.ask(line)
    assert terminal.run.config.generate == g


def test_verbose_tells_what_was_left_out(run, capsys):
    terminal = Terminal(run, verbose=True)
    for _ in range(4):
        terminal.ask("a question of some length")
    assert "oldest 2 messages were left out" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_at_the_prompt_the_program(folder):
    pexpect = pytest.importorskip("pexpect")
    words = command("runs/talker", "--max-new-tokens", 10**6)
    chat = pexpect.spawn(words[0], words[1:], cwd=str(folder), env=environment(), encoding="utf-8", timeout=60)
    chat.expect_exact("> ")
    chat.sendline("go on for ever")
    chat.expect(r"[!-~]{30}")                            # letters of an answer, not the echoed question
    chat.sendintr()
    chat.expect_exact("[stopped]")
    chat.expect_exact("> ")
    chat.sendline("params seed")
    chat.expect(r"seed +1\r")                           # the conversation goes on
    chat.expect_exact("> ")
    chat.sendintr()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


# --- what the page and the programs share --------------------------------------------------------------------------------
@pytest.fixture
def service(folder):
    return Service(str(folder / "runs" / "talker"), limits=Limits(parallel=1, waiting=1, max_seconds=30, runs_in_memory=2),
                   runs=folder / "runs")


def test_runs_are_found_and_nothing_else(service, folder):
    names = [m["run"] for m in service.models()]
    assert names == [str(folder / "runs" / n) for n in ("talker", "base", "stages/sft")] + ["shipped"]
    assert [m["chat"] for m in service.models()] == [True, False, True, False]
    for name in ("../..", "/etc", "", str(folder / "runs"), names[1] + "/"):
        with pytest.raises(NotThere):
            service.load(name)
    with pytest.raises(NotThere, match="step 3"):
        service.load(names[1], 3)


def test_the_kept_steps_of_a_run_can_be_asked(folder, tmp_path):
    shutil.copytree(folder / "runs" / "talker", tmp_path / "runs" / "talker")
    kept = tmp_path / "runs" / "talker" / "checkpoints" / "00000005"
    kept.mkdir(parents=True)
    shutil.copy(make_talker(tmp_path / "other", seed=2) / "model.safetensors", kept)
    name, best, at_5 = str(tmp_path / "runs" / "talker"), load(folder / "runs" / "talker"), load(tmp_path / "other")
    service = Service(name, step=5, runs=tmp_path / "runs")
    ask = lambda **o: "".join(service.answer(Question(prompt="hi", **o)))
    assert service.models()[0]["steps"] == [5] and best.generate("hi") != at_5.generate("hi")
    assert ask() == ask(run=name, step=5) == at_5.generate("hi") and ask(run=name) == best.generate("hi")


def test_many_that_ask_at_once_load_a_run_once_and_few_stay(service, monkeypatch):
    calls, names = [], list(service.runs())

    def slowly(*args):
        calls.append(args)
        time.sleep(0.2)
        return object()

    monkeypatch.setattr(rooms, "load", slowly)
    found = []
    threads = [threading.Thread(target=lambda: found.append(service.load(names[0]))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(found) == 5 and len(set(map(id, found))) == 1
    for name in names[:3]:
        service.load(name)
    assert len(service.loaded) == 2 and len(calls) == 3
    monkeypatch.setattr(rooms, "load", lambda *a: (_ for _ in ()).throw(ConfigError("damaged")))
    for _ in range(2):                                  # a failure is not kept
        with pytest.raises(ConfigError, match="damaged"):
            service.load("shipped")
    assert len(service.loaded) <= 2


def test_options_are_those_of_the_question_else_of_the_run(service, run):
    ask = lambda **o: "".join(service.answer(Question(prompt="hi", **o)))
    assert ask() == run.generate("hi") and ask(max_new_tokens=5) == run.generate("hi", 5)
    assert ask(temperature=2.0, top_k=0, seed=4) == run.generate("hi", temperature=2.0, top_k=10**6, seed=4)
    assert ask(temperature=2.0, top_k=1, seed=4) == ask(temperature=0.0)
    assert ask(stop=(run.generate("hi")[3:5],)) == run.generate("hi")[:3]


def test_places_are_few_and_given_back(service):
    first, second = (service.answer(Question(prompt="hi", max_new_tokens=900)) for _ in range(2))
    next(first)
    waiter = threading.Thread(target=lambda: next(second))
    waiter.start()
    while service.waiting < 1:
        time.sleep(0.01)
    with pytest.raises(Busy, match="1 questions wait"):
        next(service.answer(Question(prompt="hi")))
    first.close()
    waiter.join(30)
    assert (service.writing, service.waiting) == (1, 0)
    second.close()
    assert service.writing == 0


def test_an_answer_ends_when_its_time_is_over(folder):
    service = Service(str(folder / "runs" / "talker"), limits=Limits(max_seconds=0.05, max_tokens=10**6), runs=folder / "runs")
    pieces = []
    with pytest.raises(OutOfTime, match="0.05 s"):
        for piece in service.answer(Question(prompt="hi", max_new_tokens=10**6)):
            pieces.append(piece)
    assert 0 < len(pieces) < 10**5 and service.writing == 0


def test_pacing_begins_at_once_and_loses_nothing():
    made = []
    source = (made.append(i) or f"{i} " for i in range(1000))
    stream = paced(source, per_second=1e-6)
    assert next(stream) == "0 " and made == [0]
    assert "".join(stream) == "".join(f"{i} " for i in range(1, 1000))


def test_a_long_answer_is_shown_less_often(monkeypatch):
    now = iter(i * 0.001 for i in range(10**6))                 # a piece of ten letters a millisecond
    monkeypatch.setattr(rooms.time, "monotonic", lambda: next(now))
    shown = [len(text) for text in paced(("x" * 10 for _ in range(20_000)), per_second=20, per_character=1e-5)]
    assert shown[1] < 1000 and shown[-2] > 4 * shown[1] and sum(shown) == 200_000


def test_limits_are_checked(service):
    with pytest.raises(ConfigError, match="20,001 characters"):
        next(service.answer(Question(prompt="x" * 20_001)))
    with pytest.raises(ConfigError, match="max_new_tokens=1001"):
        next(service.answer(Question(prompt="x", max_new_tokens=1001)))
    assert min(to_dict(Limits()).values()) > 0
