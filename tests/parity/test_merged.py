"""Merged checkpoints in transformers against base + adapter in jgrpo."""

import jax.numpy as jnp

from jgrpo.checkpoints.hf import load_base
from jgrpo.config import QuantizationConfig
from jgrpo.export import check_merged, export_merged
from tests.tiny_checkpoints import make_tokenizer

from .conftest import LORA, assert_same_logits, load_theirs, make_tokens, our_logits, random_adapter, their_logits

INT4 = QuantizationConfig(group_size=32)


def test_merged_int4_base_equals_base_plus_adapter(family, tmp_path):
    lora, (tokens, lengths) = random_adapter(family.config, LORA), make_tokens()
    base = load_base(family.path, family.config, INT4, jnp.float32)
    out = tmp_path / "merged"
    export_merged(out, family.path, lora, LORA, family.config, base=base, dtype=jnp.float32, max_shard_bytes=150_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    ours = our_logits(family.model(LORA), base, lora, tokens, lengths)
    assert_same_logits(ours, their_logits(load_theirs(out), tokens, lengths))


def test_merging_an_unquantized_base_or_the_original_weights_is_the_same(family, tmp_path):
    lora, (tokens, lengths) = random_adapter(family.config, LORA), make_tokens()
    ours = our_logits(family.model(LORA), family.base, lora, tokens, lengths)
    for name, base in {"base": family.base, "original": None}.items():
        out = export_merged(tmp_path / name, family.path, lora, LORA, family.config, base=base, dtype=jnp.float32)
        assert_same_logits(ours, their_logits(load_theirs(out), tokens, lengths))


def test_the_check_of_a_merge_measures_what_it_says(llama, tmp_path):
    lora = random_adapter(llama.config, LORA)
    base = load_base(llama.path, llama.config, INT4, jnp.float32)
    out = export_merged(tmp_path / "merged", llama.path, lora, LORA, llama.config, base=base, dtype=jnp.float16)
    check = check_merged(out, base, lora, LORA, llama.config, "float16", make_tokenizer())
    assert 1e-5 < check.difference < check.bound < check.effect
