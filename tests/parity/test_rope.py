"""Every kind of rotary embedding against transformers: frequencies, and logits beyond the pretraining's positions."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jgrpo.checkpoints.hf import load_base, load_model_config
from jgrpo.models import Transformer
from jgrpo.models.rope import inverse_frequencies
from tests.tiny_checkpoints import make_checkpoint

from .conftest import UNQUANTIZED, assert_same_logits, load_theirs, our_logits, their_logits

ORIGINAL, LENGTH = 16, 70
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.7 * i for i in range(8)]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", dict(rope_type="linear", factor=4.0)),
    "dynamic": ("llama", dict(rope_type="dynamic", factor=2.0)),
    "llama3": (
        "llama",
        dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "yarn": ("qwen2", dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)),
    "yarn-smooth": (
        "qwen3",
        dict(
            rope_type="yarn",
            factor=8.0,
            original_max_position_embeddings=64,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
            mscale=0.7,
            mscale_all_dim=0.3,
        ),
    ),
    "longrope": ("phi3", dict(rope_type="longrope", **FACTORS)),
    "longrope-partial": (
        "phi3",
        dict(
            rope_type="longrope",
            partial_rotary_factor=0.5,
            short_factor=FACTORS["short_factor"][:4],
            long_factor=FACTORS["long_factor"][:4],
        ),
    ),
}


def make_rope_checkpoint(name: str, directory: Any) -> Any:
    family, settings = KINDS[name]
    extra: dict[str, Any] = {"original_max_position_embeddings": ORIGINAL} if family == "phi3" else {}
    limit = ORIGINAL if name == "dynamic" else 256
    settings = {"rope_theta": 500.0, **settings}
    return make_checkpoint(directory, family, rope_parameters=settings, max_position_embeddings=limit, **extra)


@pytest.mark.parametrize("name", KINDS)
def test_frequencies_and_logits_equal_transformers(name, tmp_path):
    path = make_rope_checkpoint(name, tmp_path)
    config = dataclasses.replace(load_model_config(path), context_length=LENGTH)
    theirs = AutoConfig.from_pretrained(path)
    expected, factor = ROPE_INIT_FUNCTIONS[config.rope.kind](theirs, torch.device("cpu"), seq_len=LENGTH)
    got = inverse_frequencies(config.rope, config.head_dim, LENGTH)
    np.testing.assert_allclose(got, expected, rtol=3e-7)
    np.testing.assert_allclose(config.rope.attention_factor, factor, rtol=1e-6)

    tokens = np.random.default_rng(0).integers(0, 263, (1, LENGTH), dtype=np.int32)
    lengths = np.asarray([LENGTH], np.int32)
    base = load_base(path, config, UNQUANTIZED)
    ours = our_logits(Transformer(config), base, {}, tokens, lengths)
    assert_same_logits(ours, their_logits(load_theirs(path), tokens, lengths))


def test_longrope_within_the_pretraining_uses_the_short_factors(tmp_path):
    path = make_rope_checkpoint("longrope", tmp_path)
    config = load_model_config(path)
    tokens = np.random.default_rng(0).integers(0, 263, (1, ORIGINAL), dtype=np.int32)
    lengths = np.asarray([ORIGINAL], np.int32)
    base = load_base(path, config, UNQUANTIZED)
    ours = our_logits(Transformer(config), base, {}, tokens, lengths)
    assert_same_logits(ours, their_logits(load_theirs(path), tokens, lengths))
    # The same short row in a run with longer ones: the frequencies are those of the run.
    long = Transformer(dataclasses.replace(config, context_length=LENGTH))
    assert np.abs(our_logits(long, base, {}, tokens, lengths) - ours).max() > 0.1


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_rows_beyond_the_chosen_frequencies_are_refused(name, tmp_path):
    path = make_rope_checkpoint(name, tmp_path)
    config = load_model_config(path)
    base = load_base(path, config, UNQUANTIZED)
    tokens = np.zeros((1, ORIGINAL + 1), np.int32)
    with pytest.raises(ValueError, match=r"chosen for 16; set ModelConfig\.context_length to at least 17"):
        our_logits(Transformer(config), base, {}, tokens, np.asarray([ORIGINAL + 1], np.int32))
