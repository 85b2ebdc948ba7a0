"""How likely a model finds a given answer: the one measurement under perplexity and multiple choice (chapter 11).

An answer's log-likelihood is the sum, over its tokens, of log softmax(logits) at the place before each one (Brown et al.
2020, section 2.4). Which tokens are the answer's, and what is left out of a text that is too long, is decided as in the
Language Model Evaluation Harness, so that scores can be compared.

Shapes: B sequences, T tokens each, A tokens of an answer, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from minimoe.data.tokenizer import Tokenizer
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError, need

if TYPE_CHECKING:
    from minimoe.checkpoint import Run

LOGITS = 2**23          # at most in one forward pass: 32 MB


def loglikelihoods(run: Run, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, int, bool]]:
    """Of each (context, answer): the answer's summed log-likelihood in nats after the context, its number of tokens, and
    whether it is what the model would write at temperature 0. An empty context is the beginning of a text.

    A context too long for `max_seq_len` loses its beginning. Raises ConfigError where the run has no tokenizer, and for an
    answer that is empty or alone too long.

    >>> from minimoe.checkpoint import load
    >>> a, b = loglikelihoods(load("shipped"), [("import", " sys"), ("import", " tree")])
    >>> a[0] > b[0], b[1:]
    (True, (3, False))
    """
    tokenizer = tokenizer_of(run)
    scores = token_scores(run.model, [encode_pair(tokenizer, *pair) for pair in pairs])
    return [(logprob_A.double().sum().item(), len(hit_A), bool(hit_A.all())) for logprob_A, hit_A in scores]


def rolling_loglikelihoods(run: Run, texts: Iterable[str], context: int = 1) -> list[tuple[float, int]]:
    """Of each whole text: its log-likelihood in nats, every token counted once, and its number of tokens. Where a text is
    longer than `max_seq_len`, a window begins with at least `context` tokens of what stands before it.

    >>> from minimoe.checkpoint import load
    >>> rolling_loglikelihoods(load("shipped"), ["The for statement"])[0][1]
    3
    """
    tokenizer, texts = tokenizer_of(run), list(texts)
    windows = [(i, pair) for i, text in enumerate(texts)
               for pair in rolling_windows(tokenizer.encode(text), beginning(tokenizer), run.model.cfg.max_seq_len, context)]
    sums = [(0.0, 0)] * len(texts)
    for (i, _), (logprob_A, _) in zip(windows, token_scores(run.model, [pair for _, pair in windows])):
        sums[i] = (sums[i][0] + logprob_A.double().sum().item(), sums[i][1] + len(logprob_A))
    return sums


def tokenizer_of(run: Run) -> Tokenizer:
    """The run's tokenizer; ConfigError where it has none."""
    if run.tokenizer is None:
        raise ConfigError(f"{run.folder or 'this run'}: no tokenizer.json, so texts cannot be scored; put the tokenizer of its "
                          "training beside the weights")
    return run.tokenizer


def beginning(tokenizer: Tokenizer) -> list[int]:
    """What stands before a text: end-of-text, where the vocabulary has one."""
    return [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]


def encode_pair(tokenizer: Tokenizer, context: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of context and answer. They are encoded together and then split, since that is how the model has read
    such text; spaces at the end of the context belong to the answer, as tokens begin with a space and do not end with it.

    >>> t = Tokenizer.bytes()
    >>> [t.decode(ids) for ids in encode_pair(t, "one two ", "three")]
    ['one two', ' three']
    """
    need(bool(answer), f"the answer after {context[-30:]!r} is empty: give at least one character")
    stripped = context.rstrip()
    context, answer = stripped, context[len(stripped):] + answer
    whole, start = tokenizer.encode(context + answer), beginning(tokenizer)
    cut = min(len(tokenizer.encode(context)), len(whole) - 1) if context else 0
    if cut == 0 and not start:
        raise ConfigError(f"nothing stands before {answer[:30]!r}, and this tokenizer has no end-of-text token to begin with: "
                          "give a context")
    return whole[:cut] or start, whole[cut:]


def rolling_windows(ids: Sequence[int], start: Sequence[int], max_seq_len: int, context: int = 1) -> list[tuple[list[int], list[int]]]:
    """A text as (context, answer) pairs that fit into the model, in which every token is an answer's once. Without a
    `start` the first token is context only.

    >>> rolling_windows([1, 2, 3, 4, 5], start=[0], max_seq_len=3, context=2)
    [([0], [1, 2, 3]), ([2, 3], [4, 5])]
    """
    need(1 <= context <= max_seq_len, f"context={context}: between 1 and max_seq_len={max_seq_len}")
    ids, done = list(ids), 0
    if not start:
        ids, start = ids[1:], ids[:1]
    pairs = []
    while done < len(ids):
        end = min(len(ids), done + (max_seq_len if done == 0 else max_seq_len - context + 1))
        before = ids[max(0, end - max_seq_len - 1):done] if done else list(start)
        pairs.append((before, ids[done:end]))
        done = end
    return pairs


@torch.inference_mode()
def token_scores(model: MoETransformer, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[Tensor, Tensor]]:
    """Of each (context ids, answer ids): the log-likelihood (A,) float32 of the answer's tokens, and (A,) bool whether each
    is the likeliest. Rows of like length go together, padded on the right; a row's numbers do not depend on the others.
    """
    limit, device, was_training = model.cfg.max_seq_len, model.embedding.weight.device, model.training
    long = max((len(answer) for _, answer in pairs), default=0)
    need(all(context and answer for context, answer in pairs), "a context or an answer without a token cannot be scored")
    need(long <= limit, f"an answer of {long} tokens does not fit into max_seq_len={limit}: shorten it")
    rows = [[*context, *answer][-limit - 1:] for context, answer in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))       # the longest first: memory that is short shows at once
    found: list = [None] * len(rows)
    model.eval()
    try:
        with tqdm(total=len(rows), unit="answer", disable=None, leave=False) as bar:
            while order:
                t = len(rows[order[0]]) - 1
                # expert choice sees who else is in the batch: each row alone
                b = 1 if model.cfg.router == "expert_choice" else max(1, LOGITS // (t * model.cfg.vocab_size))
                batch, order = order[:b], order[b:]
                lengths = [len(rows[i]) - 1 for i in batch]
                tokens_BT = torch.tensor([rows[i][:-1] + [0] * (t - n) for i, n in zip(batch, lengths)], device=device)
                logits_BTV = model(tokens_BT, lengths=lengths).logits
                for i, n, logits_TV in zip(batch, lengths, logits_BTV):
                    answer_A = torch.tensor(rows[i][-len(pairs[i][1]):], device=device)
                    logits_AV = logits_TV[n - len(answer_A):n].float()
                    logprob_A = -F.cross_entropy(logits_AV, answer_A, reduction="none")
                    found[i] = (logprob_A.cpu(), (logits_AV.argmax(-1) == answer_A).cpu())
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return found
