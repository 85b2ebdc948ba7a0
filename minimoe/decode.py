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
        cfg = model.cfg
        self.model, self.heads, self.kv_heads, self.head_size = model, cfg.n_heads, cfg.kv_heads, cfg.head_size
        self.softmax = cfg.router == "softmax" and cfg.balance != "bias"
        self.choices = cfg.top_k, cfg.norm_topk
        self.own = type(model.head) is nn.Linear and all(_is_own(block) for block in model.blocks)
        self.layers = [Layer(block) for block in model.blocks] if self.own else []
        self.final_norm, self.head_DV = _norm(model.norm), model.head.weight.t()
        self.turns = model.positions is None
        if self.turns:                      # a pair's angle stands at both of its features: x cos + swapped(x) sin
            self.cos, self.sin = torch.cat((model.cos, model.cos), -1), torch.cat((-model.sin, model.sin), -1)

    @torch.no_grad()
    def __call__(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        model, n = self.model, cache.lengths[0]
        if not self.own or min(cache.lengths) != max(cache.lengths) or n == cache.k_LBGSC.shape[3]:
            return model(ids_B[:, None], cache=cache).logits[:, -1]
        x_BD = F.embedding(ids_B, model.embedding.weight)
        if not self.turns:
            x_BD = x_BD + model.positions.weight[n]
        for layer, k_BGSC, v_BGSC in zip(self.layers, cache.k_LBGSC.unbind(0), cache.v_LBGSC.unbind(0)):
            x_BD = self._attend(x_BD, layer, n, k_BGSC, v_BGSC)
            x_BD = self._feed_forward(x_BD, layer, ids_B)
        cache.advance([1] * len(ids_B))
        return torch.mm(self.final_norm(x_BD), self.head_DV)

    def _attend(self, x_BD: Tensor, layer: Layer, n: int, k_BGSC: Tensor, v_BGSC: Tensor) -> Tensor:
        b, h, g, c = len(x_BD), self.heads, self.kv_heads, self.head_size
        h_BD = layer.attention_norm(x_BD)
        y_BX = torch.mm(h_BD, layer.qkv_DX) if layer.qkv_X is None else torch.addmm(layer.qkv_X, h_BD, layer.qkv_DX)
        if layer.norms is None:
            turned = y_BX[:, :(h + g) * c].view(b, h + g, c)
        else:
            q_BHTC = layer.attention.heads(y_BX[:, None, :h * c], layer.norms[0])
            k_BGTC = layer.attention.heads(y_BX[:, None, h * c:(h + g) * c], layer.norms[1])
            turned = torch.cat((q_BHTC, k_BGTC), dim=1)[:, :, 0]
        if self.turns:
            swapped = turned.view(b, h + g, 2, c // 2).flip(2).view(b, h + g, c)
            turned = torch.addcmul(turned * self.cos[n], swapped, self.sin[n]).to(y_BX.dtype)
        k_BGSC.select(2, n).copy_(turned[:, h:])
        v_BGSC.select(2, n).copy_(y_BX[:, (h + g) * c:].view(b, g, c))
        queries = turned[:, :h].reshape(b, g, h // g, c)        # each key head's queries in the place of positions
        y_BGC = F.scaled_dot_product_attention(queries, k_BGSC[:, :, :n + 1], v_BGSC[:, :, :n + 1])
        return torch.addmm(x_BD, y_BGC.reshape(b, -1), layer.o_XD)

    def _feed_forward(self, x_BD: Tensor, layer: Layer, ids_B: Tensor) -> Tensor:
        ffn, h_BD = layer.ffn, layer.ffn_norm(x_BD)
        if layer.w13 is None:
            return x_BD + ffn(h_BD)
        if self.softmax:                                # half the time of the module
            routing = softmax_topk(h_BD.float() @ layer.router_DE, *self.choices)
        else:
            routing = ffn.router(h_BD, ids_B, ids_B)    # the third says whose row a token is in: for capacity, in training
        if routing.experts.numel() >= len(layer.w13) or x_BD.device.type != "cpu":
            y_BD = x_BD + ffn.experts(h_BD, routing)
        else:
            rows = []
            for x_1D, h_1D, experts, weights in zip(x_BD.split(1), h_BD.split(1), routing.experts.tolist(),
                                                    routing.weights.tolist()):
                for e, weight in zip(experts, weights):
                    hidden_1H = activate(torch.mm(h_1D, layer.w13[e]), layer.activation)
                    x_1D = torch.addmm(x_1D, hidden_1H, layer.w2[e], alpha=weight)
                rows.append(x_1D)
            y_BD = torch.cat(rows) if len(rows) > 1 else rows[0]
        return y_BD + ffn.shared_output(h_BD) if layer.shared else y_BD


class Layer:
    """What the decoder takes of a block, looked up once: finding a part of a module costs as much as a small product.

    >>> from minimoe.config import ModelConfig
    >>> Layer(Block(ModelConfig(dim=8, n_heads=2, n_experts=4, top_k=2), 0)).qkv_DX.shape
    torch.Size([8, 24])
    """

    def __init__(self, block: Block):
        attention, ffn = block.attention, block.ffn
        self.attention, self.ffn, self.attention_norm, self.ffn_norm = attention, ffn, _norm(block.attention_norm), _norm(block.ffn_norm)
        self.norms = None if isinstance(attention.q_norm, nn.Identity) else (attention.q_norm, attention.k_norm)
        (self.qkv_DX, self.qkv_X), self.o_XD = _joined(attention), attention.o.weight.t()
        self.w13 = self.w2 = None
        if isinstance(ffn, MoE):
            self.w13, self.w2, self.activation = ffn.experts.w13_EDF.unbind(0), ffn.experts.w2_EHD.unbind(0), ffn.experts.activation
            self.shared, router = ffn.shared is not None, getattr(ffn.router, "weight", None)
            self.router_DE = None if router is None else router.float().t()


@torch.no_grad()
def lay_out_for_decoding(model: MoETransformer) -> MoETransformer:
    """Stores the matrices of `nn.Linear` transposed in memory, q, k and v side by side, in place; names, shapes and values
    stay, and what has an adapter or four bits stays as it is. Bound by reading, one sequence on one thread is written a tenth faster (LOG.md). `load` does it; training does
    not, where it would change the rounding.

    >>> from minimoe.config import ModelConfig
    >>> cfg = ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_experts=1)
    >>> lay_out_for_decoding(MoETransformer(cfg)).head.weight.stride()
    (1, 9)
    """
    for module in model.modules():              # an attention comes before its own matrices
        if type(module) is nn.Linear and module.weight.stride(0) != 1:
            module.weight.data = module.weight.data.t().contiguous().t()
        if isinstance(module, Attention) and all(type(p) is nn.Linear for p in (module.q, module.k, module.v)):
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
