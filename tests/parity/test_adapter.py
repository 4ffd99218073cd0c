"""The adapter against PEFT: files in both directions and gradients."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

from jgrpo.config import LoraConfig
from jgrpo.export import export_adapter, load_adapter
from jgrpo.lora import module_shapes

from .conftest import (
    LORA,
    Case,
    assert_same_logits,
    hidden_states,
    load_theirs,
    make_tokens,
    our_logits,
    random_adapter,
    real,
    their_logits,
)

RSLORA = dataclasses.replace(LORA, use_rslora=True, target_modules=("q_proj", "v_proj", "up_proj"))


def in_peft(case: Case, lora: Any, lora_config: LoraConfig, directory: Path, trainable: bool = False) -> PeftModel:
    export_adapter(directory, lora, lora_config, case.config, str(case.path))
    return PeftModel.from_pretrained(load_theirs(case.path), directory, is_trainable=trainable).eval()


def assert_exported_equals_peft(case: Case, lora_config: LoraConfig, directory: Path) -> None:
    lora, (tokens, lengths) = random_adapter(case.config, lora_config), make_tokens()
    ours = our_logits(case.model(lora_config), case.base, lora, tokens, lengths)
    assert_same_logits(ours, their_logits(in_peft(case, lora, lora_config, directory), tokens, lengths))
    # The adapter does something, so that equal logits mean an equal adapter.
    assert np.abs(ours - their_logits(case.theirs, tokens, lengths)).max() > 0.1


def test_exported_adapter_gives_the_same_logits_in_peft(family, tmp_path):
    assert_exported_equals_peft(family, LORA, tmp_path / "adapter")


def test_exported_rslora_on_some_modules_gives_the_same_logits_in_peft(llama, tmp_path):
    assert_exported_equals_peft(llama, RSLORA, tmp_path / "adapter")


def test_adapter_made_by_peft_loads(llama, tmp_path):
    settings = PeftConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        lora_dropout=0.25,
        target_modules=list(RSLORA.target_modules),
        init_lora_weights=False,  # random B
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    peft_model = get_peft_model(load_theirs(llama.path), settings).eval()
    peft_model.save_pretrained(tmp_path)
    lora, loaded = load_adapter(tmp_path, llama.config)
    assert loaded == dataclasses.replace(RSLORA, lora_dropout=0.25)
    tokens, lengths = make_tokens()
    ours = our_logits(llama.model(RSLORA), llama.base, lora, tokens, lengths)
    assert_same_logits(ours, their_logits(peft_model, tokens, lengths))


def test_exported_adapter_loads_back_bit_for_bit(llama, tmp_path):
    lora = random_adapter(llama.config, RSLORA)
    export_adapter(tmp_path / "adapter", lora, RSLORA, llama.config, str(llama.path))
    loaded, lora_config = load_adapter(tmp_path / "adapter", llama.config)
    assert lora_config == RSLORA
    jax.tree.map(np.testing.assert_array_equal, loaded, lora)


def test_gradients_equal_pefts(family, tmp_path):
    lora, (tokens, lengths) = random_adapter(family.config, LORA), make_tokens()
    # A random linear function of the final hidden states: every position and feature has a gradient of its own.
    weights = np.random.default_rng(3).normal(size=(*tokens.shape, family.config.hidden_size)).astype(np.float32)
    weights *= real(tokens, lengths)[..., None]
    model = family.model(LORA)
    loss = lambda lora: jnp.sum(weights * hidden_states(model, family.base, lora, tokens, lengths))  # noqa: E731
    ours = jax.jit(jax.grad(loss))(lora)

    peft_model = in_peft(family, lora, LORA, tmp_path / "adapter", trainable=True)
    for row, n, weight in zip(tokens, lengths, weights, strict=True):
        hidden = peft_model.base_model.model.model(torch.tensor(row[None, :n])).last_hidden_state[0]
        (hidden * torch.tensor(weight[:n])).sum().backward()
    theirs = {name: p.grad.numpy() for name, p in peft_model.named_parameters() if p.requires_grad}
    modules = module_shapes(family.config)
    assert len(theirs) == 2 * family.config.num_layers * len(modules)
    for name, expected in theirs.items():
        layer, module = int(name.split("layers.")[1].split(".")[0]), next(m for m in modules if f".{m}." in name)
        got = ours[module]["a" if "lora_A" in name else "b"][layer]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)
