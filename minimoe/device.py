"""Where and in which precision to compute, and why (chapter 8)."""
from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

import torch

from minimoe.settings import ConfigError, need


@dataclass(frozen=True)
class Choice:
    """A device, a dtype for the matrix products, a number of CPU threads, and a line of reason for each.

    >>> choose("cpu", "float32", threads=1).reasons[2]
    'threads 1: asked for, of ... cores'
    """

    device: torch.device
    dtype: torch.dtype
    threads: int
    reasons: tuple[str, ...]

    def autocast(self) -> torch.autocast:
        """The context in which the model runs; it does nothing in float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def choose(device: str = "auto", dtype: str = "auto", threads: int = 0) -> Choice:
    """Resolves "auto", and says why. A device that is not there is an error, never another device.

    >>> choose("cpu", "float32").dtype
    torch.float32
    """
    chosen, why_device = _device(device)
    need(dtype in ("auto", "float32", "bfloat16", "float16"), f"dtype={dtype!r}: use auto, float32, bfloat16 or float16")
    why_threads = {0: "PyTorch's own choice", -1: "all cores but two"}.get(threads, "asked for")
    if threads == -1:
        threads = max(1, (os.cpu_count() or 1) - 2)
    threads = threads or torch.get_num_threads()
    chosen_dtype, why_dtype = _dtype(chosen, dtype)
    return Choice(chosen, chosen_dtype, threads, (
        f"device {chosen}: {why_device}", f"dtype {str(chosen_dtype).removeprefix('torch.')}: {why_dtype}",
        f"threads {threads}: {why_threads}, of {os.cpu_count()} cores"))


def _device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), torch.cuda.get_device_name()
        if torch.backends.mps.is_available():
            return torch.device("mps"), "an Apple GPU is here"
        return torch.device("cpu"), "no GPU that PyTorch can use is here"
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name!r}: use auto, cpu, cuda, cuda:N or mps") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count(),
             "mps": torch.backends.mps.is_available()}
    if not there.get(chosen.type, False):
        raise ConfigError(f"device={name!r} is not available on this machine; use device: auto or cpu")
    return chosen, "asked for"


def _dtype(device: torch.device, name: str) -> tuple[torch.dtype, str]:
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            raise ConfigError("dtype=float16 on a CPU overflows and is slow; use bfloat16 or float32")
        return getattr(torch, name), "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "this GPU has bfloat16 matrix units"
        return torch.float32, "this GPU has no bfloat16 matrix units"
    if device.type == "mps":
        return torch.float32, "bfloat16 has not been measured on this device"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu.get_capabilities().get("amx_bf16", False)
    if not has_bf16:
        return torch.float32, "this CPU has no bfloat16 products (avx512_bf16 or amx_bf16)"
    return torch.bfloat16, "this CPU has bfloat16 products (avx512_bf16 or amx_bf16)"


def tune_cpu(threads: int = 0) -> None:
    """Sets the thread count, and tells glibc to keep freed memory rather than hand it back at every step.

    Returning and re-faulting large blocks costs up to a third of a training step. In bfloat16 every new shape of a product
    leaves a prepared kernel behind, of some 2 MB: PyTorch keeps 1,024, here 128 stay (LOG.md).
    Does nothing where it does not apply. Called by the command line and the Trainer, never on import.

    >>> tune_cpu()
    """
    if threads > 0:
        torch.set_num_threads(threads)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")         # read at the first product in bfloat16
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (AttributeError, OSError):       # another C library
            return
        mallopt(-4, 0)                          # M_MMAP_MAX: no block of its own mapping
        mallopt(-1, 2**31 - 1)                  # M_TRIM_THRESHOLD: never shrink the heap
