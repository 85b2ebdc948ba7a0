"""The loss on text that was kept apart (chapters 8 and 11)."""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from minimoe.data.mixture import split_rows
from minimoe.model import MoETransformer
from minimoe.parallel import ALONE, Ranks


@torch.no_grad()
def held_out_loss(model: MoETransformer, tokens: np.ndarray, seq_len: int, batch_size: int = 16,
                  stride: int | None = None, ranks: Ranks = ALONE) -> tuple[float, int]:
    """Summed cross-entropy (nats) of every token but the first, and their number.

    The text is read in windows of `seq_len` at `stride` (default: no overlap); of each window but the first only the
    last `stride` tokens count, so that a smaller stride gives every token a longer context. Ranks share each batch.
    Of rows of conversations, (N, T + 1), only what the assistant says counts.
    """
    if tokens.ndim == 2:
        return _rows_loss(model, tokens, batch_size, ranks)
    was_training, device, stride = model.training, model.embedding.weight.device, stride or seq_len
    model.eval()
    text, total = torch.from_numpy(tokens.astype(np.int64)), 0.0
    starts = range(0, max(1, len(text) - 1 - (seq_len - stride)), stride)
    windows = [(text[i:i + seq_len + 1], seq_len - stride if i else 0) for i in starts]
    while windows:      # windows of one length and one number of tokens to skip go together
        like = [w for w in windows[:batch_size] if (len(w[0]), w[1]) == (len(windows[0][0]), windows[0][1])]
        windows, skip = windows[len(like):], like[0][1]
        batch = torch.stack([w for w, _ in like]).to(device)
        mine = batch[ranks.rank::ranks.size]
        logits = model((mine if len(mine) else batch[:1])[:, :-1]).logits[:len(mine), skip:]      # all ranks must call it
        total += F.cross_entropy(logits.flatten(0, 1).float(), mine[:, 1 + skip:].flatten(), reduction="sum").item()
    model.train(was_training)
    return ranks.sum(torch.tensor(total, dtype=torch.float64)).item(), len(text) - 1


def _rows_loss(model: MoETransformer, rows: np.ndarray, batch_size: int, ranks: Ranks) -> tuple[float, int]:
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for start in range(0, len(rows), batch_size):
        inputs, targets = (t.to(model.embedding.weight.device) for t in split_rows(torch.from_numpy(rows[start:start + batch_size])))
        mine = slice(ranks.rank, None, ranks.size)
        some = len(inputs[mine]) > 0
        logits = model(inputs[mine] if some else inputs[:1]).logits.float()         # all ranks must call it
        if some:
            total += F.cross_entropy(logits.flatten(0, 1), targets[mine].flatten(), ignore_index=-100, reduction="sum").item()
        count += int((targets != -100).sum())
    model.train(was_training)
    return ranks.sum(torch.tensor(total, dtype=torch.float64)).item(), count
