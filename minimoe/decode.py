"""One more token for every sequence, in few operations (chapter 7).

Writing one token reads each weight that it uses once. Beside that reading, what costs time is the number of operations,
each too small to be worth its start. `Decoder` is `MoETransformer.forward` of one position written for few of them: q, k
and v in one product and turned together, the residual added by the product that makes it, no sorting for a few tokens.

Shapes: B sequences, D model width, H query heads, G key/value heads, C features of one head, X = (H + 2 G) C, V vocabulary.
"""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.attention import Attention, KVCache
from minimoe.experts import Experts, MoE, activate
from minimoe.model import Block, MoETransformer
from minimoe.norm import RMSNorm
from minimoe.router import softmax_topk


class Decoder:
    """`Decoder(model)(ids_B, cache)` writes one token per sequence into the cache and gives the logits after it, (B, V): as
    `model(ids_B[:, None], cache=cache)` does, which it calls where sequences differ in length or a part is not the
    library's own. Made anew when weights have changed.

    >>> from minimoe.config import ModelConfig
    >>> cfg = ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_experts=2, top_k=1, expert_hidden=8)
    >>> Decoder(MoETransformer(cfg).eval())(torch.tensor([1, 2]), KVCache(cfg, batch_size=2)).shape
    torch.Size([2, 9])
    """

    def __init__(self, model: MoETransformer):
        self.model, self.heads, self.kv_heads, self.head_size = model, model.cfg.n_heads, model.cfg.kv_heads, model.cfg.head_size
        self.choices = model.cfg.top_k, model.cfg.norm_topk
        self.own = all(_is_own(block) for block in model.blocks)
        if not self.own:
            return
        self.joined = [_joined(block.attention) for block in model.blocks]
        self.norms = [(_norm(block.attention_norm), _norm(block.ffn_norm)) for block in model.blocks]
        self.experts = [(f.experts.w13_EDF.unbind(0), f.experts.w2_EHD.unbind(0)) if isinstance(f, MoE) else ((), ())
                        for f in (block.ffn for block in model.blocks)]
        self.final_norm = _norm(model.norm)
        if model.positions is None:         # a pair's angle stands at both of its features: x cos + swapped(x) sin
            self.cos, self.sin = torch.cat((model.cos, model.cos), -1), torch.cat((-model.sin, model.sin), -1)

    def __call__(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        model, n = self.model, cache.lengths[0]
        if not self.own or min(cache.lengths) != max(cache.lengths):
            return model(ids_B[:, None], cache=cache).logits[:, -1]
        x_BD = model.embedding(ids_B)
        if model.positions is not None:
            x_BD = x_BD + model.positions.weight[n]
        for layer in range(len(model.blocks)):
            x_BD = self._attend(x_BD, layer, cache)
            x_BD = self._feed_forward(x_BD, ids_B, layer)
        cache.advance([1] * len(ids_B))
        return model.head(self.final_norm(x_BD))

    def _attend(self, x_BD: Tensor, layer: int, cache: KVCache) -> Tensor:
        attention, (w_DX, bias_X), b = self.model.blocks[layer].attention, self.joined[layer], len(x_BD)
        h_BD = self.norms[layer][0](x_BD)
        y_BX = torch.mm(h_BD, w_DX) if bias_X is None else torch.addmm(bias_X, h_BD, w_DX)
        h, g, c, at = self.heads, self.kv_heads, self.head_size, cache.lengths[0]
        if isinstance(attention.q_norm, nn.Identity):
            turned = y_BX[:, :(h + g) * c].view(b, h + g, c)
        else:
            q_BHTC = attention.heads(y_BX[:, None, :h * c], attention.q_norm)
            k_BGTC = attention.heads(y_BX[:, None, h * c:(h + g) * c], attention.k_norm)
            turned = torch.cat((q_BHTC, k_BGTC), dim=1)[:, :, 0]
        if self.model.positions is None:
            swapped = turned.unflatten(-1, (2, c // 2)).flip(-2).flatten(-2)
            turned = torch.addcmul(turned * self.cos[at], swapped, self.sin[at]).to(y_BX.dtype)
        k_BGSC, v_BGSC = cache.write(layer, turned[:, h:, None], y_BX[:, (h + g) * c:].view(b, g, 1, c))
        y_BGC = F.scaled_dot_product_attention(turned[:, :h].reshape(b, g, h // g, c), k_BGSC, v_BGSC)
        return torch.addmm(x_BD, y_BGC.reshape(b, -1), attention.o.weight.t())

    def _feed_forward(self, x_BD: Tensor, ids_B: Tensor, layer: int) -> Tensor:
        ffn, h_BD, (w13, w2) = self.model.blocks[layer].ffn, self.norms[layer][1](x_BD), self.experts[layer]
        if not isinstance(ffn, MoE):
            return x_BD + ffn(h_BD)
        if self.model.cfg.router == "softmax" and self.model.cfg.balance != "bias":         # half the time of the module
            routing = softmax_topk(h_BD.float() @ ffn.router.weight.float().t(), *self.choices)
        else:
            routing = ffn.router(h_BD, ids_B, ids_B)      # the third says whose row a token is in: for capacity, in training
        if routing.experts.numel() >= len(w13) or x_BD.device.type != "cpu":
            y_BD = x_BD + ffn.experts(h_BD, routing)
        else:
            rows = []
            for x_1D, h_1D, experts, weights in zip(x_BD.split(1), h_BD.split(1), routing.experts.tolist(),
                                                    routing.weights.tolist()):
                for e, weight in zip(experts, weights):
                    hidden_1H = activate(torch.mm(h_1D, w13[e]), ffn.experts.activation)
                    x_1D = torch.addmm(x_1D, hidden_1H, w2[e], alpha=weight)
                rows.append(x_1D)
            y_BD = torch.cat(rows)
        return y_BD if ffn.shared is None else y_BD + ffn.shared_output(h_BD)


@torch.no_grad()
def lay_out_for_decoding(model: MoETransformer) -> MoETransformer:
    """Stores the matrices of `nn.Linear` transposed in memory, q, k and v side by side, in place; names, shapes and values
    stay. Bound by reading, one sequence on one thread is written a tenth faster (LOG.md). `load` does it; training does
    not, where it would change the rounding.

    >>> from minimoe.config import ModelConfig
    >>> cfg = ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_experts=1)
    >>> lay_out_for_decoding(MoETransformer(cfg)).head.weight.stride()
    (1, 9)
    """
    for module in model.modules():              # an attention comes before its own matrices
        if isinstance(module, nn.Linear) and module.weight.stride(0) != 1:
            module.weight.data = module.weight.data.t().contiguous().t()
        if isinstance(module, Attention):
            parts = (module.q, module.k, module.v)
            joined_DX = torch.cat([p.weight.data.t() for p in parts], dim=1)
            for part, w_DX in zip(parts, joined_DX.split([p.out_features for p in parts], dim=1)):
                part.weight.data = w_DX.t()
    return model


def _is_own(block: nn.Module) -> bool:
    """Whether nobody put another part in this block's place, an adapter for example."""
    if type(block) is not Block or type(block.attention) is not Attention:
        return False
    attention = block.attention
    return all(type(p) is nn.Linear for p in (attention.q, attention.k, attention.v, attention.o)) and (
        not isinstance(block.ffn, MoE) or type(block.ffn) is MoE and type(block.ffn.experts) is Experts)


def _joined(attention: Attention) -> tuple[Tensor, Tensor | None]:
    """The weights of q, k and v as one (D, X) matrix, and their biases: what `lay_out_for_decoding` made, else a copy."""
    parts = (attention.q, attention.k, attention.v)
    bias_X = None if attention.q.bias is None else torch.cat([p.bias for p in parts])
    q, width = attention.q.weight, sum(p.out_features for p in parts)
    if q.stride() == (1, width) and len({p.weight.untyped_storage().data_ptr() for p in parts}) == 1:
        return q.as_strided((q.shape[1], width), (width, 1)), bias_X
    return torch.cat([p.weight.t() for p in parts], dim=1), bias_X


def _norm(module: nn.Module):
    """PyTorch's function for RMSNorm: a third less time on one row, and slower than ours in training (LOG.md)."""
    if type(module) is not RMSNorm:
        return module
    return partial(F.rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=module.eps)
