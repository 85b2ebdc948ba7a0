"""Chapter 0: the checks of `predict_start` and of `two_contexts`, which asks the shipped model."""
from __future__ import annotations

from minimoe.course.checking import Learner, Mistake, Property, Report, Wrong, run_check

ANSWERS = ("smaller", "same", "larger")


# --- predict_start() -> {question: "smaller" | "same" | "larger"} ------------------------------------------------------
START = {"dim": 64, "layers": 4, "experts": 8, "k": 2, "hidden": 64}


def _expert_params(m: dict) -> int:
    return 3 * m["dim"] * m["hidden"]


def _stored(m: dict) -> int:
    """Parameters of all MoE layers."""
    return m["layers"] * (m["experts"] * _expert_params(m) + m["experts"] * m["dim"])


def _work(m: dict) -> int:
    """Multiplications of one token in the experts of all layers; the router's few are left out, as the card says."""
    return m["layers"] * m["k"] * _expert_params(m)


def _even(m: dict) -> float:
    return 1 / m["experts"]


QUESTIONS = {       # question: (what is asked for, what is changed, why)
    "experts_stored": (_stored, {"experts": 16}, "every expert is stored, whether a token uses it or not."),
    "experts_work": (_work, {"experts": 16}, "a token still goes to two experts of the same size, however many there are."),
    "experts_load": (_even, {"experts": 16}, "the same choices are shared out among twice as many experts."),
    "choices_stored": (_stored, {"k": 4}, "the number of choices says how many experts a token uses, not how many there are."),
    "choices_work": (_work, {"k": 4}, "a token now passes through four experts instead of two."),
    "finer_work": (_work, {"experts": 16, "hidden": 32, "k": 4}, "twice as many choices of half the size are the same work."),
}


def _truth(name: str) -> str:
    quantity, change, _ = QUESTIONS[name]
    before, after = quantity(START), quantity({**START, **change})
    return "same" if before == after else "larger" if after > before else "smaller"


def _question(name: str):
    def test(fn, rng):
        given = fn()
        if not isinstance(given, dict) or given.get(name) not in ANSWERS:
            got = repr(given.get(name)) if isinstance(given, dict) else type(given).__name__
            raise Wrong(f"a dict in which {name!r} is one of {', '.join(map(repr, ANSWERS))}", got, Mistake(
                "no answer", "give one of the three words for every question; write down a guess, then see."))
        if given[name] != _truth(name):
            raise Wrong(f"{_truth(name)!r}", f"{given[name]!r}", Mistake(f"{name}: {given[name]}", QUESTIONS[name][2]))
    return test


def check_predict_start(fn, seed: int = 0) -> Report:
    """Checks `predict_start() -> dict`: what becomes of storage, work and load, "smaller", "same" or "larger"."""
    return run_check("predict_start", fn, [Property(name, 1, _question(name)) for name in QUESTIONS], seed)


# --- two_contexts() -> (token, layer, text_a, text_b) ------------------------------------------------------------------
NOT_THERE = Mistake("not a token of the text", "the token must be written as the explorer shows it, a space in front included, "
                    "and stand in both texts as one token: \"if\" and \" if\" are two tokens with two numbers.")
SAME_EXPERT = Mistake("the same expert", "the first choice is the same in both texts: try a later layer, where more of the context "
                      "has reached the token; in the last one, put the token into a very different text, such as a sum "
                      "against a story.")
LAYER = Mistake("no such layer", "layers are counted from 0, so the last of four is 3.")
ORDER = Mistake("not the four values", "return (token, layer, text_a, text_b), in this order.")
SAME_TEXT = Mistake("the same text", "without a difference in what stands before the token there is no other context: the model sees "
                    "only what comes earlier.")


def _given(fn: Learner):
    given = fn()
    if not isinstance(given, (tuple, list)) or len(given) != 4:
        raise Wrong("four values: token, layer, text_a, text_b", type(given).__name__, ORDER)
    token, layer, *texts = given
    if not isinstance(token, str) or not all(isinstance(t, str) for t in texts) or not isinstance(layer, int):
        raise Wrong("token and texts as strings, the layer as a number", ", ".join(type(v).__name__ for v in given), ORDER)
    return token, layer, texts


def _traces(fn: Learner):
    from minimoe.checkpoint import load
    from minimoe.explore import routing_trace

    token, layer, texts = _given(fn)
    run = load("shipped")
    if layer not in run.model.cfg.moe_layers:
        raise Wrong(f"a layer of the shipped model: one of {', '.join(map(str, run.model.cfg.moe_layers))}", str(layer), LAYER)
    places = []
    for name, text in zip("ab", texts):
        try:
            trace = routing_trace(run, text)
        except ValueError as error:
            raise Wrong(f"text_{name} to be a text that can be traced", str(error)) from None
        if token not in trace.tokens:
            raise Wrong(f"the token {token!r} in text_{name}", " ".join(map(repr, trace.tokens[:9])) + " …", NOT_THERE)
        places.append((trace, len(trace.tokens) - 1 - trace.tokens[::-1].index(token)))        # where it stands last
    return layer, places


def _contexts_there(fn, rng):
    _, ((a, i), (b, j)) = _traces(fn)
    if a.ids[i] != b.ids[j]:
        raise Wrong("the same token number in both texts", f"{a.ids[i]} and {b.ids[j]}", NOT_THERE)


def _contexts_differ(fn, rng):
    _, ((a, i), (b, j)) = _traces(fn)
    if a.ids[:i] == b.ids[:j]:
        raise Wrong("different texts before the token", "the same", SAME_TEXT)


def _contexts_experts(fn, rng):
    layer, ((a, i), (b, j)) = _traces(fn)
    first, second = a.layer(layer).experts[i][0], b.layer(layer).experts[j][0]
    if first == second:
        raise Wrong(f"two different first experts in layer {layer}", f"expert {first} in both", SAME_EXPERT)


def check_two_contexts(fn, seed: int = 0) -> Report:
    """Checks `two_contexts() -> (token, layer, text_a, text_b)` on the shipped model.

    Where `token` stands last in each text, its first expert in `layer` (index in the model) must differ.
    """
    return run_check("two_contexts", fn, [
        Property("the same token stands in both texts", 1, _contexts_there),
        Property("what stands before it differs", 1, _contexts_differ),
        Property("its first expert differs", 2, _contexts_experts),
    ], seed)
