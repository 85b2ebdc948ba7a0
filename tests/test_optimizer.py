"""Muon: what it does to one matrix, to many, to the halves of one; what it leaves to AdamW; and that it resumes exactly."""
import dataclasses

import pytest
import torch

from minimoe.checkpoint import load_state, save_state
from minimoe.config import ModelConfig, TrainConfig
from minimoe.model import MoETransformer
from minimoe.optimizer import Muon, make_optimizer, orthogonalize
from minimoe.trainer import Trainer

MODEL = ModelConfig(vocab_size=19, dim=16, n_layers=2, n_heads=2, max_seq_len=8, n_experts=4, top_k=2, expert_hidden=24,
                    n_shared_experts=1, shared_gate=True, router_noise="learned", qk_norm="head", qkv_bias=True, n_predict=2)
TRAIN = TrainConfig(steps=6, batch_size=2, warmup=2, lr=1e-2, optimizer="muon", device="cpu", dtype="float32")


def weight(*shape, seed=0):
    p = torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))
    p.grad = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1))
    return p


def update(p, pieces=1, lr=0.1, decay=0.0, steps=1):
    """How far `steps` steps on the same gradient move it."""
    before, grad = p.detach().clone(), p.grad.clone()
    optimizer = Muon([{"params": [p], "pieces": pieces}], lr=lr, weight_decay=decay)
    for _ in range(steps):
        p.grad = grad.clone()
        optimizer.step()
    return p.detach() - before


def near(a, b):
    """Equal but for the rounding of bfloat16, which batches and layouts may do otherwise."""
    return (a - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 20), (2, 16, 40)])
def test_all_directions_become_equally_long(shape):
    m = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    turned = orthogonalize(m)
    u, sizes, vh = torch.linalg.svd(m, full_matrices=False)
    new_sizes = torch.linalg.svdvals(turned)
    assert sizes.max() / sizes.min() > 2 and new_sizes.min() > 0.5 and new_sizes.max() < 1.5, new_sizes
    along = u.mT @ turned @ vh.mT                                   # the directions themselves stay
    assert (along - torch.diag_embed(along.diagonal(dim1=-2, dim2=-1))).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_equals_the_muon_of_pytorch(shape):
    a, b = weight(*shape), weight(*shape)
    theirs = torch.optim.Muon([b], lr=0.1, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    before, grads = b.detach().clone(), [torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    ours = Muon([{"params": [a], "pieces": 1}], lr=0.1, weight_decay=0.3)
    for grad in grads:
        a.grad, b.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    assert near(a - before, b - before)


def test_stacked_experts_are_turned_one_by_one():
    stacked = weight(3, 8, 20)
    alone = [torch.nn.Parameter(stacked[e].detach().clone()) for e in range(3)]
    for e in range(3):
        alone[e].grad = stacked.grad[e].clone() * 8 ** e            # the size of a gradient does not matter, expert by expert
    together = update(stacked)
    for e in range(3):
        assert near(together[e], update(alone[e]))


@pytest.mark.parametrize("shape, dim", [((3, 8, 20), -1), ((20, 8), 0)])
def test_gate_and_up_projection_are_turned_apart(shape, dim):
    both = weight(*shape)
    halves = []
    for half, grad in zip(both.detach().chunk(2, dim), both.grad.chunk(2, dim)):
        halves.append(torch.nn.Parameter(half.clone()))
        halves[-1].grad = grad.clone()
    whole, apart = update(weight(*shape)), update(both, pieces=2)
    assert near(apart, torch.cat([update(h) for h in halves], dim)) and not near(apart, whole)


def test_matrices_that_go_in_one_batch_are_as_each_alone():
    """Wide and tall, with other decays and in other groups: what one batch holds must come back to its owner."""
    shapes = [(8, 20), (20, 8), (4, 8, 20), (2, 20, 8), (8, 8)]
    many = [weight(*s, seed=i) for i, s in enumerate(shapes)]
    before = [p.detach().clone() for p in many]
    Muon([{"params": [p], "pieces": 1, "weight_decay": 0.1 * i} for i, p in enumerate(many)], lr=0.1).step()
    for i, (s, p, old) in enumerate(zip(shapes, many, before)):
        assert near(p.detach() - old, update(weight(*s, seed=i), decay=0.1 * i)), s


def test_an_update_is_as_large_as_one_of_adamw():
    """Why one learning rate serves both: each element moves by about 0.2 lr, whatever the shape."""
    for shape in [(16, 16), (16, 64), (64, 16), (4, 16, 32)]:
        assert update(weight(*shape)).square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.3), shape


def test_decay_shrinks_by_lr_times_decay():
    p, still = weight(6, 10), weight(6, 10)
    difference = update(p, decay=0.5) - update(still)
    torch.testing.assert_close(difference, -0.1 * 0.5 * weight(6, 10).detach())


def test_momentum_goes_on():
    """A second gradient, against the first, only bends the direction: 0.95 of the mean is of the past."""
    p = weight(6, 10)
    first = p.grad.clone()
    optimizer = Muon([{"params": [p], "pieces": 1}], lr=0.1, weight_decay=0.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum"], 0.05 * first)
    p.grad = -first
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum"], 0.05 * (0.95 - 1) * first)


def test_what_is_turned_and_what_is_left_to_adamw():
    model = MoETransformer(MODEL)
    optimizer = make_optimizer(model, TRAIN)
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).loss.backward()
    optimizer.step()
    parts = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    turned = {name for name, state in parts.items() if state == {"momentum"}}
    assert {name.split(".", 2)[2] for name in turned} == {
        "attention.q.weight", "attention.k.weight", "attention.v.weight", "attention.o.weight", "ffn.experts.w13_EDF",
        "ffn.experts.w2_EHD", "ffn.shared.w13.weight", "ffn.shared.w2.weight", "ffn.w13.weight", "ffn.w2.weight"}
    assert len(turned) == 8 * 2 + 6                                 # two blocks of experts, and the extra head's, dense here
    assert all(state == {"step", "exp_avg", "exp_avg_sq"} for name, state in parts.items() if name not in turned)
    pieces = {id(p): group["pieces"] for group in optimizer.param_groups for p in group["params"] if "pieces" in group}
    assert {name for name, p in model.named_parameters() if pieces.get(id(p)) == 2} == {n for n in turned if "w13" in n}
    gelu = make_optimizer(MoETransformer(dataclasses.replace(MODEL, activation="gelu")), TRAIN)
    assert not [p for group in gelu.param_groups if group.get("pieces") == 2 for p in group["params"]]


def test_adamw_is_as_ever():
    assert type(make_optimizer(MoETransformer(MODEL), TrainConfig())) is torch.optim.AdamW


def test_a_weight_without_gradient_stays():
    p = weight(4, 6)
    p.grad = None
    before = p.detach().clone()
    optimizer = Muon([{"params": [p], "pieces": 1}], lr=0.1)
    optimizer.step()
    assert torch.equal(p, before) and not optimizer.state[p]


def steps(trainer, n):
    return [trainer.train_step()[0]["ce"] for _ in range(n)]


def new_trainer():
    torch.manual_seed(0)
    text = torch.randint(19, (40, 9), generator=torch.Generator().manual_seed(1))
    data = [(row[:-1], row[1:]) for row in text]
    return Trainer(MoETransformer(MODEL), TRAIN, data, progress=False)


def test_resume_is_exact(tmp_path):
    unbroken, stopped, resumed = (new_trainer() for _ in range(3))
    losses = steps(unbroken, 6)
    assert steps(stopped, 3) == losses[:3]
    folder = save_state(tmp_path, 3, stopped.model, stopped.optimizer, {"step": 3})
    resumed.step = load_state(folder, resumed.model, resumed.optimizer)["step"]
    assert steps(resumed, 3) == losses[3:]
    for (name, p), q in zip(unbroken.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(p, q), name
        for part, value in unbroken.optimizer.state[p].items():
            assert torch.equal(value, resumed.optimizer.state[q][part]), (name, part)


def test_the_turned_matrices_learn():
    """Two letters in turn, embedding and head frozen: what falls is the work of the matrices in the blocks."""
    torch.manual_seed(0)
    line = torch.arange(9) % 2
    model = MoETransformer(dataclasses.replace(MODEL, n_predict=1, router_noise=0.0, tie_embeddings=False, init_std=0.3))
    for p in (model.embedding.weight, model.head.weight):
        p.requires_grad_(False)
    trainer = Trainer(model, dataclasses.replace(TRAIN, steps=30), [(line[:-1], line[1:])], progress=False)
    losses = steps(trainer, 30)
    assert losses[0] > 2 and losses[-1] < 0.5, losses


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_float16_step_that_overflowed_is_left_out(optimizer):
    """As torch.amp.GradScaler tells an optimizer that scales for itself, which a fused one does."""
    torch.manual_seed(0)
    model = MoETransformer(MODEL)
    step = make_optimizer(model, TrainConfig(optimizer=optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).loss * float("inf")).backward()
    scaler.unscale_(step)
    scaler.step(step)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and scaler.get_scale() == 2.0
