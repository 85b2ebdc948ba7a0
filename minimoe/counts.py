"""What a model holds and computes, counted from the numbers of its config (chapter 7).

A feed-forward layer of hidden size H has 3 D H weights when it is gated (gate, up, down), else 2 D H. A test holds all
of this equal to what is counted on the built model.
"""
from minimoe.settings import need


def params_by_part(cfg) -> dict[str, int]:
    """Parameters of each part of a `ModelConfig`'s model, all layers together.

    >>> from minimoe.config import ModelConfig
    >>> params_by_part(ModelConfig(vocab_size=10, dim=8, n_layers=2, n_heads=2, n_experts=4, top_k=1, expert_hidden=3))
    {'embedding': 80, 'positions': 0, 'attention': 512, 'norms': 40, 'router': 64, 'experts': 576, 'shared': 0,
     'dense': 0, 'head': 0}
    """
    need(cfg.vocab_size is not None, "vocab_size is null: it is filled in from the tokenizer before counting")
    d, n_moe, extra = cfg.dim, len(cfg.moe_layers), cfg.n_predict - 1
    q, kv = cfg.n_heads * cfg.head_size, cfg.kv_heads * cfg.head_size
    blocks, matrices = cfg.n_layers + extra, 3 if cfg.gated else 2
    qk_norms = {"none": 0, "head": 2 * cfg.head_size, "full": q + kv}[cfg.qk_norm]
    routers = (min(n_moe, 1) if cfg.share_router else n_moe) * (2 if cfg.router_noise == "learned" else 1)
    return {
        "embedding": cfg.vocab_size * d,
        "positions": cfg.max_seq_len * d if cfg.positions == "learned" else 0,
        "attention": blocks * (d * 2 * (q + kv) + qk_norms + (q + 2 * kv if cfg.qkv_bias else 0)),
        "norms": (2 * blocks + 1) * d if cfg.norm != "none" else 0,
        "router": routers * cfg.n_experts * d if cfg.has_router else 0,
        "experts": n_moe * cfg.n_experts * matrices * d * cfg.expert_hidden,
        "shared": n_moe * (matrices * d * cfg.shared_size + (d if cfg.shared_gate else 0)),
        "dense": (blocks - n_moe) * matrices * d * cfg.dense_size,
        "head": 0 if cfg.tie_embeddings else cfg.vocab_size * d,
    }


def flops_by_part(cfg, seq_len: int) -> dict[str, int]:
    """Forward FLOPs per token of each part of a `ModelConfig`'s model, averaged over a causal sequence of `seq_len` tokens: a
    token at position t looks at t + 1 keys, (seq_len + 1) / 2 on average.

    >>> from minimoe.config import ModelConfig
    >>> flops_by_part(ModelConfig(vocab_size=10, dim=8, n_layers=2, n_heads=2, n_experts=4, top_k=1, expert_hidden=3), 5)
    {'attention': 1024, 'scores': 192, 'router': 128, 'experts': 288, 'shared': 0, 'dense': 0, 'head': 160}
    """
    need(cfg.vocab_size is not None, "vocab_size is null: it is filled in from the tokenizer before counting")
    d, n_moe, matrices = cfg.dim, len(cfg.moe_layers), 3 if cfg.gated else 2
    q, kv = cfg.n_heads * cfg.head_size, cfg.kv_heads * cfg.head_size
    return {
        "attention": 2 * cfg.n_layers * d * 2 * (q + kv),
        "scores": 2 * cfg.n_layers * q * (seq_len + 1),             # q.k and p.v
        "router": 2 * n_moe * cfg.n_experts * d if cfg.has_router else 0,
        "experts": 2 * n_moe * cfg.top_k * matrices * d * cfg.expert_hidden,
        "shared": 2 * n_moe * (matrices * d * cfg.shared_size + (d if cfg.shared_gate else 0)),
        "dense": 2 * (cfg.n_layers - n_moe) * matrices * d * cfg.dense_size,
        "head": 2 * cfg.vocab_size * d,
    }
