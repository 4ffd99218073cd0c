"""The text model of a checkpoint that also sees images: Gemma 3 from 4B on."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from jgrpo.checkpoints.adapter import export_adapter, load_adapter
from jgrpo.checkpoints.hf import eos_ids, load_base, load_model_config
from jgrpo.checkpoints.merged import export_merged
from jgrpo.errors import UserError
from tests.tiny_checkpoints import FAMILIES, _randomize, make_tokenizer

from .conftest import LORA, UNQUANTIZED, Case, assert_same_logits, make_tokens, our_logits, random_adapter, their_logits

TEXT = FAMILIES["gemma3_text"] | dict(vocab_size=263, hidden_size=64, intermediate_size=128, num_attention_heads=4)
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)


@pytest.fixture(scope="module", params=["language_model.model.", "model.language_model."])
def case(request, tmp_path_factory) -> Case:
    """Saved by transformers, and with the names of its modules in memory, which other tools save."""
    path = tmp_path_factory.mktemp("gemma3")
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, eos_token_id=[256, 258])
    )
    _randomize(model, 0)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    renamed = {name.replace("language_model.model.", request.param, 1): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, path / "model.safetensors", {"format": "pt"})
    config = load_model_config(path)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    return Case(path, config, load_base(path, config, UNQUANTIZED, jnp.float32), theirs)


def test_logits_of_texts(case):
    tokens, lengths = make_tokens()
    assert (case.config.family, case.config.multimodal) == ("gemma3_text", True)
    assert_same_logits(
        our_logits(case.model(), case.base, {}, tokens, lengths), their_logits(case.theirs, tokens, lengths)
    )
    assert eos_ids(case.path) == (256, 258)


def test_adapter_in_peft_and_back(case, tmp_path):
    lora, (tokens, lengths) = random_adapter(case.config, LORA), make_tokens()
    export_adapter(tmp_path / "adapter", lora, LORA, case.config, str(case.path))
    ours = our_logits(case.model(LORA), case.base, lora, tokens, lengths)
    loaded, settings = load_adapter(tmp_path / "adapter", case.config)
    assert settings.lora_rank == LORA.lora_rank
    for module, parts in lora.items():
        np.testing.assert_array_equal(loaded[module]["b"], parts["b"])
    with_adapter = PeftModel.from_pretrained(case.theirs, tmp_path / "adapter").eval()
    names = [name for name, _ in with_adapter.named_parameters() if "lora_" in name]
    assert names
    assert not any("vision_tower" in name for name in names)
    assert_same_logits(ours, their_logits(with_adapter, tokens, lengths))
    with_adapter.unload()


def test_merged_is_the_text_model_alone(case, tmp_path):
    lora, (tokens, lengths) = random_adapter(case.config, LORA), make_tokens()
    for base in (case.base, None):
        out = tmp_path / f"merged{base is None}"
        export_merged(out, case.path, lora, LORA, case.config, base=base, dtype=jnp.float32)
        assert json.loads((out / "config.json").read_text())["model_type"] == "gemma3_text"
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
        assert isinstance(theirs, Gemma3ForCausalLM)
        full = our_logits(case.model(LORA), case.base, lora, tokens, lengths)
        assert_same_logits(full, their_logits(theirs, tokens, lengths))


def test_a_tensor_without_a_place_is_still_named(case, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(case.path).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    safetensors.torch.save_file(tensors | {"audio_tower.weight": torch.zeros(2)}, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor audio_tower\.weight"):
        load_base(copy, load_model_config(copy), UNQUANTIZED)
