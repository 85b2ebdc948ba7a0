"""LoRA: starts as the base, merged = unmerged, off = base, gradients as of a dense delta, and exact through the trainer."""
import copy
import dataclasses

import pytest
import torch

from minimoe import lora
from minimoe.adapter import load_adapter
from minimoe.checkpoint import load
from minimoe.config import ModelConfig, TrainConfig
from minimoe.decode import lay_out_for_decoding
from minimoe.experts import Experts
from minimoe.generate import generate
from minimoe.lora import adapted, add_lora, disabled, merge, merged, remove, trainable_share
from minimoe.model import MoETransformer
from minimoe.router import softmax_topk, within_capacity
from minimoe.settings import ConfigError
from minimoe.trainer import Trainer
from tests import reference
from tests.test_resume import MODELS, STEPS, TRAIN, assert_same_run, small_data, trainer

MOE = ModelConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=32, n_experts=4, top_k=2,
                  expert_hidden=24, n_shared_experts=1, n_dense_first=1, dense_hidden=24)
DENSE = ModelConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, max_seq_len=32, n_experts=1, dense_hidden=24)
EVERYWHERE = ("q", "k", "v", "o", "w13", "w2")


def model_of(cfg, seed=0):
    torch.manual_seed(seed)
    model = MoETransformer(cfg).eval()
    for p in model.parameters():            # init_std would leave every delta and logit next to nothing
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def filled(model, seed=1):
    """B is zero at first, and then an adapter does nothing: as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def data():
    return small_data()


def tokens_of(cfg, shape=(2, 9)):
    return torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dispatch", ["loop", "grouped", "auto"])
@pytest.mark.parametrize("cfg", [MOE, DENSE], ids=["moe", "dense"])
def test_begins_as_the_base_merges_to_itself_and_comes_off(cfg, dispatch):
    base = model_of(dataclasses.replace(cfg, dispatch=dispatch))
    names, x = list(base.state_dict()), tokens_of(cfg)
    before, weights = base(x).logits, copy.deepcopy(base.state_dict())
    model = add_lora(base, rank=4, alpha=8, targets=EVERYWHERE)
    assert torch.equal(model(x).logits, before)
    assert [n for n in model.state_dict() if "lora_" not in n] == names
    on = filled(model)(x).logits
    assert (on - before).abs().max() > 0.1
    with disabled(model):
        assert torch.equal(model(x).logits, before)
    assert torch.equal(model(x).logits, on)
    flat = merged(model)
    assert torch.equal(model(x).logits, on) and {type(m) for m in flat.modules()} == {type(m) for m in model_of(cfg).modules()}
    assert (flat(x).logits - on).abs().max() < 1e-5
    assert list(flat.state_dict()) == names and all(p.requires_grad for p in flat.parameters())
    assert {k: v.tolist() for k, v in lora.merged_state(model)} == {k: v.tolist() for k, v in flat.state_dict().items()}
    remove(model)
    assert torch.equal(model(x).logits, before) and all(torch.equal(model.state_dict()[n], w) for n, w in weights.items())
    assert list(model.state_dict()) == names and not adapted(model)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_trained_stopped_and_resumed_bit_for_bit(method, data, tmp_path):
    train = dataclasses.replace(TRAIN, method=method, lora_targets=EVERYWHERE, lora_rank=4, lora_dropout=0.1)
    whole = trainer(data, tmp_path / "whole", train=train)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    run = whole.fit()
    moved = [name for name, value in whole.model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved and all("lora_" in name for name in moved)
    for stop in (1, 4):
        out = tmp_path / str(stop)
        trainer(data, out, train=train).fit(stop_after=stop)
        again = trainer(data, out, train=train)
        again.fit(resume=True)
        assert_same_run(again, whole)
    for file in (load(whole.out), load(whole.out, step=STEPS)):
        assert type(file.model.blocks[0].attention.q) is torch.nn.Linear and not adapted(file.model)
    assert not adapted(run.model) and adapted(whole.model)
    assert all(torch.equal(v, run.model.state_dict()[k]) for k, v in file.model.state_dict().items())


def experts_of(dispatch, dtype=torch.float32, dim=16, hidden=24, e=5):
    layer = Experts(ModelConfig(dim=dim, n_heads=1, head_dim=2, expert_hidden=hidden, n_experts=e, dispatch=dispatch)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    return layer


class Holder(torch.nn.Module):
    """A model with one layer of experts, for `add_lora`."""

    def __init__(self, experts):
        super().__init__()
        self.cfg, self.experts = ModelConfig(), experts


ROUTINGS = {
    "plain": lambda x: softmax_topk(x, 2),
    "an expert without tokens": lambda x: softmax_topk(torch.cat((x[:, :-1], x[:, -1:] - 100), 1), 2),
    "capacity": lambda x: within_capacity(softmax_topk(x, 2), 2, torch.zeros(len(x), dtype=torch.long)),
    "one expert has all": lambda x: softmax_topk(x + torch.tensor([100.0, 0, 0, 0, 0]), 1, normalize=False),
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("dispatch, n", [("loop", 11), ("grouped", 11), ("auto", 11), ("auto", 30)])      # auto: batched, grouped
def test_gradients_on_experts_are_those_of_a_dense_delta(dispatch, n, rank, name):
    layer, dense = experts_of(dispatch), experts_of("loop")
    filled(add_lora(Holder(layer), rank=rank, alpha=6, targets=("w13", "w2")))
    pairs = {k: p.detach().clone().requires_grad_() for k, p in layer.named_parameters() if p.requires_grad}
    weights = [w.detach() + pairs[a] @ pairs[b] * 6 / rank for w, (a, b) in zip(dense.parameters(), layer.parts.values())]
    generator = torch.Generator().manual_seed(1)
    x, logits, up = (torch.randn(n, size, generator=generator) for size in (16, 5, 16))
    results = []
    for run in (layer, lambda x, r: reference.moe(x, r, *weights)):
        ours, scores = x.clone().requires_grad_(), logits.clone().requires_grad_()
        y = run(ours, ROUTINGS[name](scores))
        (y * up).sum().backward()
        results.append([y.detach(), ours.grad, scores.grad])
    got = results[0] + [p.grad for p in layer.parameters() if p.requires_grad]
    want = results[1] + [p.grad for p in pairs.values()]
    assert len(got) == 7 and all(p.grad is None for p in (layer.w13_EDF, layer.w2_EHD))
    for g, w in zip(got, want):
        assert torch.allclose(g, w, atol=5e-5), (g - w).abs().max()


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dispatch, n", [("loop", 200), ("grouped", 200), ("auto", 200), ("auto", 1400)])     # 1,400: in blocks
def test_experts_under_autocast_are_near_float32(dispatch, n, quantize):
    results = []
    for bf16 in (False, True):
        layer = experts_of(dispatch)
        filled(add_lora(Holder(layer), rank=8, targets=("w13", "w2"), quantize=quantize))
        x = torch.randn(n, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = layer(x, softmax_topk(torch.randn(n, 5, generator=torch.Generator().manual_seed(2)), 2))
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for a, b in zip(*results):
        assert a.dtype == b.dtype == torch.float32 and 0 < (a - b).norm() / a.norm() < 0.03


def test_recomputed_experts_draw_the_same_dropout():
    grads = []
    for again in (False, True):
        layer = experts_of("grouped")
        filled(add_lora(Holder(layer), rank=4, dropout=0.5, targets=("w13", "w2"))).train()
        layer.recompute = again
        torch.manual_seed(7)
        x = torch.randn(11, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer(x, softmax_topk(torch.randn(11, 5, generator=torch.Generator().manual_seed(2)), 2)).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    model = add_lora(model_of(MOE), rank=4, dropout=0.5, targets=EVERYWHERE)
    x = tokens_of(MOE)
    plain = model(x).logits
    assert torch.equal(model.train()(x).logits, plain)          # B is zero: what is dropped is not the base's input
    filled(model)
    assert not torch.equal(model(x).logits, model(x).logits)
    assert torch.equal(model.eval()(x).logits, model(x).logits)
    late = filled(add_lora(model_of(MOE), dropout=0.5))         # a model in evaluation stays so
    assert torch.equal(late(x).logits, late(x).logits)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("targets", [("q",), ("w13", "w2"), ("shared.w13",), ("head",)])
def test_writing_with_adapters_is_writing_merged(targets, quantize):
    """Whatever is adapted, no fast path of the decoder leaves it out; laying out for decoding changes nothing."""
    cfg = dataclasses.replace(MOE, tie_embeddings=False)
    model = filled(add_lora(model_of(cfg), rank=4, alpha=40, targets=targets, quantize=quantize))
    options = {"max_new_tokens": 12, "temperature": 0}
    prompts = [[1, 2, 3], [4, 5, 6]]
    on = generate(lay_out_for_decoding(model), prompts, **options)
    with disabled(model):
        assert generate(model, prompts, **options) != on
    assert generate(lay_out_for_decoding(merged(model)), prompts, **options) == on == generate(merge(model), prompts, **options)


def test_a_target_that_is_not_there_is_named_with_those_that_are():
    model = model_of(MOE)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for bad in ("query", "uery", "", "router", "blocks.7.attention.q", "blocks.0.attention", "head"):       # head: tied here
        with pytest.raises(ConfigError, match=r"lora_targets: '.*' is no weight of this model; there are attention.q, .*experts.w13"):
            add_lora(model, targets=("q", bad))
    assert not adapted(model) and before == {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="adapters already"):
        add_lora(add_lora(model), targets="v")


def test_the_share_that_is_trained():
    model = add_lora(model_of(MOE), rank=2, targets=("attention.q", "experts.w2", "blocks.0.ffn.w13"))
    q, experts, w13 = 2 * (16 + 16), 4 * 2 * (24 + 16), 2 * (16 + 48)
    assert trainable_share(model) == (2 * q + experts + w13, MOE.num_params() + 2 * q + experts + w13)
    small = add_lora(model_of(MOE), rank=2, targets=("attention.q", "experts.w2", "blocks.0.ffn.w13"), quantize=True)
    assert trainable_share(small) == trainable_share(model)


def test_the_run_folder_says_what_is_trained_and_holds_the_adapter(data, tmp_path):
    train = dataclasses.replace(TRAIN, method="lora", lora_targets=EVERYWHERE, lora_rank=4)
    t = trainer(data, tmp_path / "run", train=train)
    base = remove(copy.deepcopy(t.model)).eval()
    run = t.fit()
    share = "trainable: {:,} of {:,} parameters".format(*trainable_share(t.model))
    assert share in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    best, x = load(tmp_path / "run"), torch.arange(10)[None]
    on = load_adapter(base, tmp_path / "run" / "adapter")
    assert (on(x).logits - best.model(x).logits).abs().max() < 1e-5 and run.generate("the", 5)
    with disabled(on):
        assert (on(x).logits - best.model(x).logits).abs().max() > 1e-4
    trainer(data, tmp_path / "run").fit(stop_after=1)           # another run in this folder leaves no adapter that is not its own
    assert not (tmp_path / "run" / "adapter").exists()


def test_going_on_beside_other_weights_is_refused(data, tmp_path):
    train = dataclasses.replace(TRAIN, method="lora")
    trainer(data, tmp_path, train=train).fit(stop_after=2)
    before = sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    torch.manual_seed(1)
    other = MoETransformer(dataclasses.replace(trainer(data, None).model.cfg))
    with pytest.raises(ConfigError, match="trained beside other weights"):
        Trainer(other, train, data, out=tmp_path, progress=False).fit(resume=True)
    with pytest.raises(ConfigError, match="method was lora, is full"):
        trainer(data, tmp_path).fit(resume=True)
    with pytest.raises(ConfigError, match="lora_rank was 8, is 4"):
        trainer(data, tmp_path, train=dataclasses.replace(train, lora_rank=4)).fit(resume=True)
    assert sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()) == before
    (tmp_path / "checkpoints" / "00000002" / "state" / "adapter.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="damaged"):
        trainer(data, tmp_path, train=train).fit(resume=True)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_frozen_router_keeps_its_bias(method, data):
    """The sign rule would move it; what is saved as merged would then be another base than the one that resuming starts from."""
    model = dataclasses.replace(MODELS["selection bias"])
    t = trainer(data, None, model, dataclasses.replace(TRAIN, method=method))
    t.fit(stop_after=2)
    assert all(not value.any() for name, value in t.model.state_dict().items() if name.endswith("bias_E"))
    full = trainer(data, None, model)
    full.fit(stop_after=2)
    assert any(value.any() for name, value in full.model.state_dict().items() if name.endswith("bias_E"))


def test_what_cannot_be_trained_with_adapters_is_refused(data, monkeypatch):
    for kind in ("fsdp", "ep"):
        with pytest.raises(ConfigError, match=f"method=qlora with parallel={kind}: .*ddp"):
            lora.adapt(model_of(MOE), TrainConfig(method="qlora", parallel=kind))
    with pytest.raises(ConfigError, match="'nowhere' is no weight of this model"):
        trainer(data, None, train=dataclasses.replace(TRAIN, method="lora", lora_targets=("nowhere",)))


def test_muon_leaves_the_matrices_of_adapters_to_adamw(data):
    t = trainer(data, None, train=dataclasses.replace(TRAIN, method="lora", optimizer="muon", lora_targets=EVERYWHERE, lora_rank=1))
    assert sum(len(g["params"]) for g in t.optimizer.param_groups if "pieces" in g) == 0
    t.fit(stop_after=2)
