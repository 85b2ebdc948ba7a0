"""minimoe: mixture-of-experts language models, small enough to read whole.

>>> from minimoe import ModelConfig, MoETransformer, Trainer, load, generate
"""
from minimoe.checkpoint import load, save
from minimoe.config import ModelConfig, TrainConfig
from minimoe.explore import routing_trace
from minimoe.generate import generate
from minimoe.model import MoETransformer
from minimoe.router import Routing
from minimoe.trainer import Trainer  # noqa: I001  (after the submodules, so that minimoe.generate is the function)

__version__ = "0.1.0"
__all__ = ["ModelConfig", "MoETransformer", "Routing", "TrainConfig", "Trainer", "generate", "load", "routing_trace", "save"]
