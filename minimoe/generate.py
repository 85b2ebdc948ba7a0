"""Writing text: sampling, batched and streaming, on the key/value cache (chapter 7).

Shapes: B sequences, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minimoe.attention import KVCache
from minimoe.decode import Decoder
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError


def generate(model: MoETransformer, prompt_ids: list[int] | list[list[int]] | Tensor, max_new_tokens: int = 200, *,
             temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0,
             stop_ids: tuple[int, ...] = ()) -> list[int] | list[list[int]] | Tensor:
    """The new ids, in the nesting of the prompt: a list of ids, a list of lists (of any lengths), or a (B, T) tensor.

    Temperature 0 takes the likeliest token. A sequence that writes one of `stop_ids` ends there, without it. Past
    `max_seq_len` the newest half of the text is kept. Raises ConfigError for an empty prompt or impossible options.

    >>> from minimoe.config import ModelConfig
    >>> cfg = ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_experts=2, top_k=1, expert_hidden=8)
    >>> len(generate(MoETransformer(cfg), [1, 2], max_new_tokens=3)), len(generate(MoETransformer(cfg), [[1], [2, 3]], 3))
    (3, 2)
    """
    as_tensor, nested = isinstance(prompt_ids, Tensor), True
    prompts = prompt_ids.tolist() if as_tensor else list(prompt_ids)
    if prompts and not isinstance(prompts[0], list):
        prompts, nested = [prompts], False
    new: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                       stop_ids=stop_ids):
        for row, token in zip(new, step):
            if token is not None:
                row.append(token)
    if as_tensor:
        return torch.tensor([row + [0] * (max_new_tokens - len(row)) for row in new])
    return new if nested else new[0]


@torch.inference_mode()
def stream(model: MoETransformer, prompts: list[list[int]], max_new_tokens: int = 200, *, temperature: float = 1.0,
           top_k: int | None = None, top_p: float | None = None, seed: int = 0,
           stop_ids: tuple[int, ...] = ()) -> Iterator[list[int | None]]:
    """Yields one new id per sequence as soon as it is computed; None for a sequence that has ended.

    Raises ConfigError for an empty prompt or impossible options, when the first token is asked for.

    >>> from minimoe.config import ModelConfig
    >>> cfg = ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_experts=2, top_k=1, expert_hidden=8)
    >>> [len(step) for step in stream(MoETransformer(cfg), [[1], [2, 3]], max_new_tokens=3)]
    [2, 2, 2]
    """
    if not prompts or not all(prompts):
        raise ConfigError("the prompt is empty: give at least one token, for text at least one character")
    if temperature < 0 or max_new_tokens < 1 or (top_k is not None and top_k < 1) or \
            (top_p is not None and not 0 < top_p <= 1):
        raise ConfigError(f"temperature={temperature}, max_new_tokens={max_new_tokens}, top_k={top_k}, top_p={top_p}: "
                          "temperature must be 0 or more, max_new_tokens and top_k at least 1, top_p in (0, 1]")
    device, limit = model.embedding.weight.device, model.cfg.max_seq_len
    generator = torch.Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        rows, ended = [list(p) for p in prompts], [False] * len(prompts)
        decode, (cache, logits_BV) = Decoder(model), _prefill(model, rows, limit, device)
        for i in range(max_new_tokens):
            ids_B = sample(logits_BV, temperature, top_k, top_p, generator)
            ids = ids_B.tolist()
            ended = [e or t in stop_ids for e, t in zip(ended, ids)]
            yield [None if e else t for e, t in zip(ended, ids)]
            if all(ended) or i == max_new_tokens - 1:
                return
            for row, token in zip(rows, ids):
                row.append(token)
            if max(cache.lengths) >= limit:
                rows = [row[-(limit // 2):] if n >= limit else row for row, n in zip(rows, cache.lengths)]
                cache, logits_BV = _prefill(model, rows, limit, device)
            else:
                logits_BV = decode(ids_B, cache)
    finally:
        model.train(was_training)


def sample(logits_BV: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None) -> Tensor:
    """(B,) ids drawn from softmax(logits / temperature), among the `top_k` likeliest, among the fewest that together
    hold `top_p` (Holtzman et al. 2020, section 3.1). Temperature 0 is the argmax.

    >>> sample(torch.tensor([[0.0, 5.0, 1.0]]), temperature=0).tolist()
    [1]
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        sorted_BV, ids_BV = logits_BV.sort(descending=True)
        probs_BV = sorted_BV.softmax(-1)
        beyond_BV = probs_BV.cumsum(-1) - probs_BV >= top_p          # what comes before already holds top_p
        logits_BV = logits_BV.masked_fill(beyond_BV.gather(1, ids_BV.argsort(-1)), -torch.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(1)


def _prefill(model: MoETransformer, rows: list[list[int]], limit: int,
             device: torch.device) -> tuple[KVCache, Tensor]:
    kept = [row if len(row) < limit else row[-(limit // 2):] for row in rows]
    for row, k in zip(rows, kept):
        row[:] = k
    lengths = [len(row) for row in rows]
    tokens_BT = torch.tensor([row + [0] * (max(lengths) - len(row)) for row in rows], device=device)
    cache = KVCache(model.cfg, len(rows), device=device, dtype=model.embedding.weight.dtype)
    logits_BTV = model(tokens_BT, cache=cache, lengths=lengths).logits
    return cache, logits_BTV[torch.arange(len(rows)), torch.tensor(lengths) - 1]
