"""LoRA and QLoRA: small trainable matrices beside frozen ones, on linear layers and on stacked experts (chapter 10).

A weight W stays as it is, and two narrow matrices A and B are learned beside it (Hu et al. 2021, section 4.1):

    x_ND --- W (D, F) ------------------------------ + --> y_NF           B is zero at first, so that the model
      \\---- dropout --- A (D, R) --- alpha / R --- B (R, F) ---/           begins as what it was

Experts are E such matrices in one tensor, and get an A and a B each; their rows go through the same dispatch as through
W. With `quantize` the frozen W are kept in four bits (`minimoe.nf4`).

A module that is adapted changes its class in place, as `torch.nn.utils.parametrize` and FSDP do it: names in the state
dict, and whoever holds the module, stay as they were.

Shapes: N tokens, P rows sorted by expert, D width in, F width out (of w2: H hidden in), R rank, E experts.
"""
from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.config import TrainConfig
from minimoe.experts import Experts, activate, cannot_group, grouped, looped
from minimoe.model import Dropout, MoETransformer
from minimoe.nf4 import NF4, FrozenProduct
from minimoe.settings import need

ADAPTER = ".lora_"              # in the name of every weight of an adapter, and of no other
ENDINGS = re.compile(r"(_EDF|_EHD|\.weight)$")


class LoraLinear(nn.Linear):
    """An `nn.Linear` with an adapter, or with four bits a weight, or both."""

    parts = {"weight": ("lora_A", "lora_B")}            # (R, in) and (out, R), as in PEFT
    plain = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if hasattr(self, "nf4_weight"):
            y = FrozenProduct.apply(x, self.nf4_weight, lambda x, w: F.linear(x, w, self.bias), torch.matmul)
        else:
            y = super().forward(x)
        if not (self.active and hasattr(self, "lora_A")):
            return y
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return y + F.linear(F.linear(self.dropout(x), a) * self.scale, b)

    def make(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        return torch.empty(rank, self.in_features), torch.zeros(self.out_features, rank)

    def delta(self, name: str) -> Tensor:
        return self.lora_B @ self.lora_A * self.scale


class LoraExperts(Experts):
    """`Experts` whose stacked tensors have adapters, or four bits a weight, or both."""

    parts = {"w13_EDF": ("lora_A13_EDR", "lora_B13_ERF"), "w2_EHD": ("lora_A2_EHR", "lora_B2_ERD")}
    plain = Experts

    def weights(self) -> tuple[Tensor, Tensor]:
        """The two tensors; of one in four bits its shape, dtype and device, with no memory behind."""
        return tuple(torch.empty(1, dtype=q.dtype, device=q.codes_MP.device).expand(q.shape)
                     if (q := getattr(self, f"nf4_{name}", None)) is not None else getattr(self, name) for name in self.parts)

    def compute(self, multiply, x_PD: Tensor, counts_E: Tensor, w13_EDF: Tensor, w2_EHD: Tensor) -> Tensor:
        hidden_PH = activate(self.product(multiply, x_PD, counts_E, w13_EDF, "w13_EDF"), self.activation)
        return self.product(multiply, hidden_PH, counts_E, w2_EHD, "w2_EHD")

    def product(self, multiply, x_PD: Tensor, counts_E: Tensor, w_EDF: Tensor, name: str) -> Tensor:
        a, b = self.parts[name]
        if hasattr(self, f"nf4_{name}"):
            y_PF = FrozenProduct.apply(x_PD, getattr(self, f"nf4_{name}"), lambda x, w: multiply(x, w, counts_E),
                                       lambda g, w: multiply(g, w.mT, counts_E))
        else:
            y_PF = multiply(x_PD, w_EDF, counts_E)
        if not (self.active and hasattr(self, a)):
            return y_PF
        a_EDR, b_ERF = getattr(self, a).to(x_PD.dtype), getattr(self, b).to(x_PD.dtype)
        if multiply is grouped and cannot_group(a_EDR, b_ERF):      # a rank that is not a multiple of 16 bytes
            multiply = looped
        return y_PF + multiply(multiply(self.dropout(x_PD), a_EDR, counts_E) * self.scale, b_ERF, counts_E)

    def make(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        e, d, f = dict(zip(self.parts, self.weights()))[name].shape
        return torch.empty(e, d, rank), torch.zeros(e, rank, f)

    def delta(self, name: str) -> Tensor:
        a_EDR, b_ERF = (getattr(self, x) for x in self.parts[name])
        return a_EDR @ b_ERF * self.scale


ADAPTED = (LoraLinear, LoraExperts)


def adapted(model: nn.Module) -> dict[str, LoraLinear | LoraExperts]:
    """The modules that `add_lora` has changed, by name.

    >>> adapted(nn.Linear(2, 3))
    {}
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, ADAPTED)}


def weight_names(model: MoETransformer) -> list[str]:
    """The weights that can have an adapter, as `lora_targets` names them. Routers cannot: they decide, and are left alone.

    >>> from minimoe.config import ModelConfig
    >>> weight_names(MoETransformer(ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_experts=2)))[3:]
    ['blocks.0.attention.o', 'blocks.0.ffn.experts.w13', 'blocks.0.ffn.experts.w2']
    """
    found = []
    for path, m in model.named_modules():
        if type(m) in (Experts, LoraExperts):
            found += [f"{path}.{ENDINGS.sub('', name)}" for name in LoraExperts.parts]
        elif type(m) in (nn.Linear, LoraLinear) and not (path == "head" and model.cfg.tie_embeddings):
            found.append(path)
    return found


def add_lora(model: MoETransformer, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0,
             targets: Iterable[str] = ("q", "k", "v", "o"), quantize: bool = False, seed: int = 0) -> MoETransformer:
    """Freezes the model and puts an adapter beside every weight that a target names, in place (PEFT: `get_peft_model`).

    A target is a name from `weight_names`, or how such names end: q, experts.w13, blocks.0.attention.o. `quantize` keeps all
    attention, feed-forward and expert matrices in four bits, those without an adapter too; embeddings, head, norms and
    routers stay as they are. Raises ConfigError for a target that matches nothing, naming those that there are.

    >>> from minimoe.config import ModelConfig
    >>> model = MoETransformer(ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_experts=2, expert_hidden=8))
    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> before = model(tokens).logits
    >>> torch.equal(add_lora(model, rank=4, targets=["q", "experts.w13"])(tokens).logits, before)
    True
    >>> trainable_share(model)                  # q: 4 (8 + 8); experts: 2 x 4 (8 + 16)
    (256, 1008)
    """
    need(not adapted(model), "this model has adapters already: merge or remove them first")
    need(rank >= 1 and alpha > 0 and 0 <= dropout < 1, f"rank={rank}, alpha={alpha}, dropout={dropout}: rank and alpha above 0, "
                                                       "dropout at least 0 and below 1")
    names, chosen = weight_names(model), set()
    for target in [targets] if isinstance(targets, str) else targets:
        hit = [name for name in names if f".{name}".endswith(f".{ENDINGS.sub('', target)}")]
        short = dict.fromkeys(re.sub(r"^(blocks|extra_heads)\.\d+\.", "", name) for name in names)
        need(target and hit, f"lora_targets: {target!r} is no weight of this model; there are {', '.join(short)}, or the end of "
                             f"one, or with its layer, such as {names[0]}")
        chosen.update(hit)
    random = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, Experts):
            continue
        kind = LoraExperts if isinstance(module, Experts) else LoraLinear
        wanted = {name for name in kind.parts if (path if kind is LoraLinear else f"{path}.{ENDINGS.sub('', name)}") in chosen}
        in_four_bits = quantize and re.search(r"(attention\.[qkvo]|w13|w2|experts)$", path)
        if not wanted and not in_four_bits:
            continue
        module.__class__, module.active, module.rank, module.scale = kind, True, rank, alpha / rank
        module.dropout = Dropout(dropout).train(module.training)
        for name in kind.parts:
            weight = getattr(module, name)
            if name in wanted:
                a, b = module.make(name, rank)
                a.uniform_(-1, 1, generator=random).div_(weight.shape[1] ** 0.5)        # Kaiming's, as in PEFT
                dtype = torch.promote_types(weight.dtype, torch.float32)
                for x, value in zip(kind.parts[name], (a, b)):
                    module.register_parameter(x, nn.Parameter(value.to(weight.device, dtype)))
            if in_four_bits:
                setattr(module, f"nf4_{name}", NF4(weight))
                delattr(module, name)
    return model


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """(parameters that are trained, all parameters, adapters included) (PEFT: `get_nb_trainable_parameters`).

    >>> trainable_share(nn.Linear(2, 3).requires_grad_(False))
    (0, 9)
    """
    frozen = sum(q.numel() for q in model.modules() if isinstance(q, NF4))
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, learns in numbers if learns), frozen + sum(n for n, _ in numbers)


def describe(model: nn.Module) -> str:
    """One line: how many parameters are trained, and what the weights in four bits take.

    >>> describe(nn.Linear(2, 3))
    'trainable: 9 of 9 parameters (100.0 %)'
    """
    (trained, everything), small = trainable_share(model), [q for q in model.modules() if isinstance(q, NF4)]
    line = f"trainable: {trained:,} of {everything:,} parameters ({trained / everything:.1%})".replace("%", " %")
    taken, half = sum(q.nbytes for q in small), sum(2 * q.numel() for q in small)
    return line + (f"; {len(small)} weights in 4 bits take {taken:,} bytes, {taken / half:.3f} of bfloat16" if small else "")


@contextmanager
def disabled(model: MoETransformer) -> Iterator[MoETransformer]:
    """Inside the block the adapters are off: what is computed is the base (PEFT: `disable_adapter`).

    >>> from minimoe.config import ModelConfig
    >>> with disabled(add_lora(MoETransformer(ModelConfig(vocab_size=9, dim=8, n_heads=2)))) as base:
    ...     base.blocks[0].attention.q.active
    False
    """
    modules = [(m, m.active) for m in adapted(model).values()]
    for m, _ in modules:
        m.active = False
    try:
        yield model
    finally:
        for m, was in modules:
            m.active = was


@torch.no_grad()
def _merged(module: LoraLinear | LoraExperts, name: str, with_adapter: bool = True) -> Tensor:
    small = getattr(module, f"nf4_{name}", None)
    base = getattr(module, name).data if small is None else small.dequantize()
    return (base + module.delta(name)).to(base.dtype) if with_adapter and hasattr(module, module.parts[name][0]) else base


def _take_out(model: MoETransformer, with_adapter: bool) -> MoETransformer:
    for module in adapted(model).values():
        for name, adapter in module.parts.items():
            weight = _merged(module, name, with_adapter)
            if name in module._parameters:
                getattr(module, name).data = weight         # the same parameter, wherever else it is known
            else:
                module.register_parameter(name, nn.Parameter(weight))
            for extra in (*adapter, f"nf4_{name}"):
                if hasattr(module, extra):
                    delattr(module, extra)
        del module.active, module.rank, module.scale, module.dropout
        module.__class__ = module.plain
    return model.requires_grad_(True)


def merge(model: MoETransformer) -> MoETransformer:
    """Adds every adapter to its weight, in place, and gives the plain model (PEFT: `merge_and_unload`). Four bits become
    the full tensors that they stand for.

    >>> from minimoe.config import ModelConfig
    >>> type(merge(add_lora(MoETransformer(ModelConfig(vocab_size=9, dim=8, n_heads=2)))).blocks[0].attention.q)
    <class 'torch.nn.modules.linear.Linear'>
    """
    return _take_out(model, True)


def remove(model: MoETransformer) -> MoETransformer:
    """Takes the adapters away, in place, and gives the base (PEFT: `unload`), bit for bit; of weights in four bits what
    those stand for.

    >>> from minimoe.config import ModelConfig
    >>> adapted(remove(add_lora(MoETransformer(ModelConfig(vocab_size=9, dim=8, n_heads=2)))))
    {}
    """
    return _take_out(model, False)


def merged(model: MoETransformer) -> MoETransformer:
    """A merged copy, or the model itself where nothing is adapted.

    >>> merged(model := nn.Linear(2, 3)) is model
    True
    """
    return merge(copy.deepcopy(model)) if adapted(model) else model


def merged_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the merged model's state dict, one after the other: of what is merged or was in four bits, no
    more than one exists at a time."""
    modules = adapted(model)
    own = {f"{path}.{name}" for path, m in modules.items() for name in m.parts}
    for key, value in model.state_dict().items():
        if key not in own and ADAPTER not in key and ".nf4_" not in key:
            yield key, value
    for path, m in modules.items():
        for name in m.parts:
            yield f"{path}.{name}", _merged(m, name)


def fingerprint(model: nn.Module) -> str:
    """A text that no other weights have.

    >>> fingerprint(nn.Linear(1, 1)) == fingerprint(nn.Linear(1, 1))
    False
    """
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def adapt(model: MoETransformer, train: TrainConfig) -> str:
    """What `train.method` asks for, in place; gives the fingerprint of the base, without which adapters mean nothing.

    Raises ConfigError for what cannot be trained in this way.
    """
    need(train.parallel in ("none", "ddp"), f"method={train.method} with parallel={train.parallel}: frozen weights are not spread "
                                            "over ranks; use parallel: none or ddp, or method: full")
    base = fingerprint(model)
    add_lora(model, rank=train.lora_rank, alpha=train.lora_alpha, dropout=train.lora_dropout, targets=train.lora_targets,
             quantize=train.method == "qlora", seed=train.seed)
    return base
