"""Is this machine computing what it should?"""
from __future__ import annotations

import dataclasses

import torch

from minimoe.config import ModelConfig
from minimoe.device import Choice
from minimoe.experts import cannot_group
from minimoe.model import MoETransformer


def dispatch(choice: Choice) -> str:
    """How `dispatch: auto` sends tokens to experts here, and why."""
    w13_EDF, w2_EHD = (torch.empty(1, 8, n, device=choice.device, dtype=choice.dtype) for n in (16, 8))
    if reason := cannot_group(w13_EDF, w2_EHD):
        return f"dispatch loop: {reason}"
    return (f"dispatch grouped: grouped_mm runs on {choice.device.type} in {str(choice.dtype).removeprefix('torch.')}; experts "
            "whose rows are not a multiple of 16 bytes take the loop; on a CPU a few tokens the loop or batched products, and "
            "in bfloat16 many tokens products of few sizes, whose kernels are prepared once")


def parity(choice: Choice) -> list[str]:
    """One training step's loss and gradient on the device against the same step on the CPU in float32."""
    cfg = ModelConfig(vocab_size=64, dim=64, n_layers=2, n_heads=4, n_experts=4, top_k=2, expert_hidden=64)
    results = []
    for device, dtype, dispatch in ((torch.device("cpu"), torch.float32, "loop"),
                                    (choice.device, torch.float32, "auto"), (choice.device, choice.dtype, "auto")):
        torch.manual_seed(0)
        model = MoETransformer(dataclasses.replace(cfg, dispatch=dispatch)).to(device)
        tokens = torch.randint(0, 64, (32, 65), generator=torch.Generator().manual_seed(1)).to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        gradient = torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])
        results.append((loss.item(), gradient, f"{device} {str(dtype).removeprefix('torch.')}"))
    (loss0, gradient0, _), *others = results
    lines = []
    for (loss, gradient, name), bound in zip(others, (1e-4, 5e-2)):
        off = ((gradient - gradient0).norm() / gradient0.norm()).item()
        verdict = "agrees with" if abs(loss - loss0) < bound and off < bound else "DIFFERS from"
        lines.append(f"{name}: {verdict} the CPU reference (loss {loss - loss0:+.1e}, gradient {off:.1e} apart)")
    return lines
