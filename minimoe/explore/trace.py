"""What the routers of a model did with one text, as plain data that any view can draw.

T tokens, K choices per token, E experts. All numbers are rounded to 4 decimals, so that a stored trace stays the same
where the last bits of a float do not.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from os.path import commonprefix

import torch

from minimoe.router import Routing

DECIMALS = 4


@dataclass(frozen=True)
class LayerTrace:
    """One MoE layer; every row is one token.

    `index` of the layer in the model; `experts` (T, K), best first; `weights` (T, K); `kept` (T, K), False where the
    expert was full (with expert choice: where the expert did not take the token); `probs` (T, E); `entropy` (T,) of
    `probs` in bits, at most log2(E); `load` (E,), share of each expert in the routed pairs of token and expert, which
    is 1 / E where all experts are used alike.
    """

    index: int
    experts: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    kept: tuple[tuple[bool, ...], ...]
    probs: tuple[tuple[float, ...], ...]
    entropy: tuple[float, ...]
    load: tuple[float, ...]

    def taken(self, token: int) -> list[tuple[int, float, bool]]:
        """(expert, weight, kept) of each choice of one token, without the fillers of expert choice (weight 0)."""
        rows = zip(self.experts[token], self.weights[token], self.kept[token])
        return [(e, w, k) for e, w, k in rows if e >= 0]


@dataclass(frozen=True)
class RoutingTrace:
    """A text and where each of its tokens was sent, layer by layer. No tensors: `to_dict` gives what JSON can hold.

    `tokens` joined give `text`: a character that is cut over several tokens stands in the first of them, and `parts`
    says which share of it a token holds ("1/3"; "" for whole characters). `left_out` is the number of tokens at the end
    of the text that were too many to trace.

    >>> layer = LayerTrace(0, ((1, 0),), ((0.75, 0.25),), ((True, True),), ((0.25, 0.75),), (0.8113,), (0.5, 0.5))
    >>> trace = RoutingTrace("hi", ("hi",), ("",), (7,), 0, 2, 2, "softmax", 1, (layer,))
    >>> RoutingTrace.from_dict(trace.to_dict()) == trace
    True
    """

    text: str
    tokens: tuple[str, ...]
    parts: tuple[str, ...]
    ids: tuple[int, ...]
    left_out: int
    n_experts: int
    top_k: int
    router: str
    n_layers: int
    layers: tuple[LayerTrace, ...]

    def layer(self, index: int | None = None) -> LayerTrace:
        """The layer with this index in the model; None is the first that was traced. Raises ValueError for others."""
        if index is None:
            return self.layers[0]
        for layer in self.layers:
            if layer.index == index:
                return layer
        raise ValueError(f"layer {index} has no router: this trace holds layers "
                         + ", ".join(str(layer.index) for layer in self.layers))

    def to_dict(self) -> dict:
        """Lists, dicts, strings and numbers only."""
        return _lists(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict) -> RoutingTrace:
        """The inverse of `to_dict`. Raises ValueError when a field is missing or unknown."""
        layers = tuple(LayerTrace(**_fields(LayerTrace, v)) for v in values.get("layers", ()))
        return cls(**{**_fields(cls, values), "layers": layers})


def routing_trace(run: object, text: str, *, max_tokens: int = 512) -> RoutingTrace:
    """Runs the model over a text and writes down every routing decision.

    `run` is anything with `.model` (a `MoETransformer`) and `.tokenizer` (`encode`, `decode`). A text of more tokens
    than `max_tokens` or the model's `max_seq_len` is cropped to its beginning; `left_out` says by how many. The model
    runs in evaluation mode, so nothing is dropped for capacity, and is left as it was. Raises ValueError for an empty
    text, a text that is not valid Unicode, a dense model, or a run without a tokenizer.

    >>> from types import SimpleNamespace
    >>> from minimoe.config import ModelConfig
    >>> from minimoe.model import MoETransformer
    >>> from minimoe.data.tokenizer import Tokenizer
    >>> cfg = ModelConfig(vocab_size=260, dim=16, n_layers=2, n_heads=2, n_experts=4, top_k=2, expert_hidden=8)
    >>> trace = routing_trace(SimpleNamespace(model=MoETransformer(cfg), tokenizer=Tokenizer.bytes()), "né")
    >>> trace.tokens, trace.parts, len(trace.layers[0].probs[0])
    (('n', 'é', ''), ('', '1/2', '2/2'), 4)
    """
    model, tokenizer = run.model, getattr(run, "tokenizer", None)
    cfg = model.cfg
    if not cfg.moe_layers:
        raise ValueError("this model is dense (no layer has a router), so there is no routing to show: "
                         "load a run with n_experts above 1")
    if tokenizer is None:
        raise ValueError("this run has no tokenizer, so a text cannot be cut into tokens: load a run that has one")
    ids = _encode(tokenizer, text)
    limit = min(max_tokens, cfg.max_seq_len)
    if limit < 1:
        raise ValueError(f"max_tokens={max_tokens}: at least one token must be traced")
    tokens, parts = split_text(tokenizer, ids, limit)
    ids_BT = torch.tensor([ids[:limit]], device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            routings = model(ids_BT).routing
    finally:
        model.train(was_training)
    width = _width(routings, cfg.router)
    layers = tuple(trace_layer(i, r, width) for i, r in zip(cfg.moe_layers, routings))
    return RoutingTrace("".join(tokens), tokens, parts, tuple(ids[:limit]), max(0, len(ids) - limit),
                        cfg.n_experts, cfg.top_k, cfg.router, cfg.n_layers, layers)


def trace_layer(index: int, routing: Routing, width: int | None = None) -> LayerTrace:
    """One layer's `Routing` of one text as plain numbers.

    With `width` (expert choice) each token's experts are put in order, those that took it first and by weight, and cut
    to `width` places; an unused place holds expert -1 with weight 0.

    >>> from minimoe.router import softmax_topk
    >>> trace_layer(3, softmax_topk(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), k=1)).load
    (1.0, 0.0)
    """
    probs_NE, experts_NK = routing.probs.double().cpu(), routing.experts.cpu()
    weights_NK, kept_NK = routing.weights.double().cpu(), routing.kept.cpu()
    if width is not None:
        order_NK = torch.where(kept_NK, weights_NK, -1.0).argsort(dim=-1, descending=True, stable=True)[:, :width]
        experts_NK, weights_NK, kept_NK = (x.gather(1, order_NK) for x in (experts_NK, weights_NK, kept_NK))
        experts_NK, weights_NK = experts_NK.where(kept_NK, -1), weights_NK.where(kept_NK, 0.0)
    counts_E = torch.bincount(experts_NK[experts_NK >= 0], minlength=probs_NE.shape[1]).double()
    entropy_N = -torch.special.xlogy(probs_NE, probs_NE).sum(-1) / torch.log(torch.tensor(2.0).double())
    return LayerTrace(index, _tuples(experts_NK), _tuples(weights_NK), _tuples(kept_NK), _tuples(probs_NE),
                      _tuples(entropy_N), _tuples(counts_E / counts_E.sum().clamp_min(1)))


def split_text(tokenizer: object, ids: list[int], limit: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The pieces of text that the first `limit` tokens stand for, and which part of a cut character each one holds.

    Only `decode` is needed: a beginning that decodes to a beginning of the whole text ends between two characters,
    any other ends inside the one that follows.

    >>> class Bytes:
    ...     def decode(self, ids): return bytes(ids).decode("utf-8", "replace")
    >>> split_text(Bytes(), list("a→b".encode()), 5)
    (('a', '→', '', '', 'b'), ('', '1/3', '2/3', '3/3', ''))
    """
    whole = tokenizer.decode(ids)
    tokens, claimed, open_at = [], 0, []          # open_at: the cut character that a token ends in, or None
    for n in range(1, len(ids) + 1):
        if n > limit and open_at[-1] is None:     # a character cut by the limit is followed to its end
            break
        begun = tokenizer.decode(ids[:n])
        same = len(commonprefix([begun, whole]))
        cut = same < len(begun)
        end = max(claimed, same + 1 if cut else same)
        tokens.append(whole[claimed:end])
        open_at.append(same if cut else None)
        claimed = end
    groups: dict[int, list[int]] = {}             # cut character -> its tokens
    for n, place in enumerate(open_at):
        before = open_at[n - 1] if n else None
        if before is not None:
            groups[before].append(n)
        if place is not None and place != before:
            groups[place] = [n]
    parts = [""] * len(tokens)
    for group in groups.values():
        for i, n in enumerate(group):
            parts[n] = f"{i + 1}/{len(group)}"
    return tuple(tokens[:limit]), tuple(parts[:limit])


def _encode(tokenizer: object, text: str) -> list[int]:
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"text is not valid Unicode at character {e.start}: remove the lone surrogate there") from None
    ids = list(tokenizer.encode(text))
    if not ids:
        raise ValueError("the text is empty: give at least one character to trace")
    return ids


def _width(routings: list[Routing], router: str) -> int | None:
    """Places per token that expert choice needs; None for routers where each token has its K choices."""
    if router != "expert_choice":
        return None
    return max(1, *(int(r.kept.sum(-1).max()) for r in routings))


def _tuples(x: torch.Tensor) -> tuple:
    nested = x.tolist()
    if x.dtype.is_floating_point:                 # + 0.0 turns -0.0 into 0.0
        cut = lambda v: tuple(map(cut, v)) if isinstance(v, list) else round(v, DECIMALS) + 0.0
    else:
        cut = lambda v: tuple(map(cut, v)) if isinstance(v, list) else v
    return cut(nested)


def _lists(x: object) -> object:
    if isinstance(x, dict):
        return {k: _lists(v) for k, v in x.items()}
    return [_lists(v) for v in x] if isinstance(x, (list, tuple)) else x


def _fields(cls: type, values: dict) -> dict:
    names = {f.name for f in dataclasses.fields(cls)}
    if set(values) != names:
        odd = sorted(names ^ set(values))
        raise ValueError(f"not a {cls.__name__}: missing or unknown {', '.join(odd)}")
    deep = lambda v: tuple(map(deep, v)) if isinstance(v, list) else v
    return {k: deep(v) for k, v in values.items() if k != "layers"} if cls is RoutingTrace else \
           {k: deep(v) for k, v in values.items()}
