"""Hugging Face decoder-only models as one Flax module."""

from jgrpo.models.cache import KVCache
from jgrpo.models.config import ModelConfig, RopeConfig, model_config_from_hf
from jgrpo.models.parameters import base_shapes, init_base
from jgrpo.models.transformer import PROPOSAL_HEAD, Transformer

__all__ = [
    "PROPOSAL_HEAD",
    "KVCache",
    "ModelConfig",
    "RopeConfig",
    "Transformer",
    "base_shapes",
    "init_base",
    "model_config_from_hf",
]
