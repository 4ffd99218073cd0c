"""One tiny checkpoint of every family and awkward variant, loaded once by jgrpo and by transformers."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jgrpo.checkpoints.hf import load_base, load_model_config
from jgrpo.config import LoraConfig, QuantizationConfig
from jgrpo.lora import init_lora
from jgrpo.models import ModelConfig, Transformer
from tests.tiny_checkpoints import make_checkpoint

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-mixed-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": False},
    ),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {}),
    "gemma2-biases-untied": ("gemma2", {"attention_bias": True, "tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", {}),
}
LORA = LoraConfig(lora_rank=4, lora_alpha=6.0)
UNQUANTIZED = QuantizationConfig(quantization="none")
# Longer than the window of 8 and than the 64 positions from which Llama-3 scaling starts.
LENGTHS = (70, 9, 33)


@dataclass(frozen=True)
class Case:
    """A checkpoint, jgrpo's float32 model of it and transformers'."""

    path: Path
    config: ModelConfig
    base: Any
    theirs: Any

    def model(self, lora_config: LoraConfig = LoraConfig()) -> Transformer:  # noqa: B008 (frozen)
        return Transformer(self.config, lora_config, jnp.float32)


@pytest.fixture(scope="session", params=CASES)
def case(request, tmp_path_factory) -> Case:
    """Every case in turn."""
    return build_case(request.param, tmp_path_factory)


FAMILY_CASES = ("llama-biases", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3")


@pytest.fixture(scope="session", params=FAMILY_CASES)
def family(request, tmp_path_factory) -> Case:
    """One case of every family, for checks in which the variants of a family do not differ."""
    return build_case(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Case:
    """One of them, for what does not depend on the family."""
    return build_case("llama", tmp_path_factory)


def build_case(name: str, tmp_path_factory: pytest.TempPathFactory, **more: Any) -> Case:
    family, overrides = CASES[name]
    path = make_checkpoint(tmp_path_factory.mktemp(name), family, **overrides, **more)
    config = load_model_config(path)
    return Case(path, config, load_base(path, config, UNQUANTIZED, jnp.float32), load_theirs(path))


def load_theirs(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def make_tokens(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random right-padded rows int32[3, 70] and their lengths."""
    tokens = np.random.default_rng(seed).integers(0, 263, (len(LENGTHS), max(LENGTHS)), dtype=np.int32)
    return tokens, np.asarray(LENGTHS, np.int32)


def random_adapter(config: ModelConfig, lora_config: LoraConfig, seed: int = 0) -> dict[str, Any]:
    """An adapter whose B is not zero."""
    lora = init_lora(jax.random.key(seed), lora_config, config)
    keys = jax.random.split(jax.random.key(seed + 1), len(lora))
    return {
        name: {"a": part["a"], "b": 0.1 * jax.random.normal(key, part["b"].shape)}
        for key, (name, part) in zip(keys, lora.items(), strict=True)
    }


@functools.partial(jax.jit, static_argnames="model")
def hidden_states(model: Transformer, base: Any, lora: Any, tokens: jax.Array, lengths: jax.Array) -> Any:
    return model.apply({"params": base, "lora": lora}, tokens, lengths)


def to_logits(model: Transformer, base: Any, hidden: Any) -> np.ndarray:
    return np.asarray(model.apply({"params": base}, hidden, method="logits"))


def our_logits(model: Transformer, base: Any, lora: Any, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """float32[N, V]: every real position of every row, in order."""
    return to_logits(model, base, hidden_states(model, base, lora, tokens, lengths))[real(tokens, lengths)]


@torch.no_grad()
def their_logits(theirs: Any, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The same from transformers, each row alone and without padding."""
    rows = [theirs(torch.tensor(row[None, :n])).logits[0].numpy() for row, n in zip(tokens, lengths, strict=True)]
    return np.concatenate(rows)


def real(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.arange(tokens.shape[1]) < lengths[:, None]


def assert_same_logits(ours: np.ndarray, theirs: np.ndarray, atol: float = 1e-4) -> None:
    """Both on the same positions; logits of a standard deviation near 1, or the tolerance would mean nothing."""
    assert 0.5 < theirs.std() < 5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
