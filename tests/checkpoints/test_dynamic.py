"""Dynamic quantization: what is measured, what is chosen, and that it pays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch

from jgrpo.checkpoints.dynamic import Unit, choose, measure, resolve_quantization
from jgrpo.checkpoints.hf import load_base, load_model_config, load_tokenizer, resolve_checkpoint
from jgrpo.config import QuantizationConfig
from jgrpo.errors import UserError
from jgrpo.models import Transformer
from jgrpo.quantization import Int4Weight, Int8Weight, MixedWeight, take_layer
from tests.tiny_checkpoints import make_checkpoint

DYNAMIC = QuantizationConfig(quantization="dynamic", group_size=32)
UNIFORM = dataclasses.replace(DYNAMIC, quantization="int4")


def test_logit_error_of_the_demo_model_falls_by_a_quarter_for_less_than_a_tenth_more_memory():
    path = resolve_checkpoint("demo")
    config, tokenizer = load_model_config(path), load_tokenizer(path)
    dynamic = resolve_quantization(path, config, DYNAMIC, jnp.float32, tokenizer)
    model, tokens = Transformer(config), np.asarray([tokenizer.encode("Solve 12 * (7 - 3) + 5 =")])
    logits, nbytes = {}, {}
    for name, settings in {"none": QuantizationConfig("none"), "int4": UNIFORM, "dynamic": dynamic}.items():
        base = load_base(path, config, settings)
        hidden = model.apply({"params": base}, tokens, np.asarray([tokens.shape[1]]))
        logits[name] = model.apply({"params": base}, hidden, method="logits")
        nbytes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    error = {name: float(jnp.sqrt(jnp.mean((logits[name] - logits["none"]) ** 2))) for name in ("int4", "dynamic")}
    assert error["dynamic"] < 0.75 * error["int4"]
    assert 1 < nbytes["dynamic"] / nbytes["int4"] < 1.1
    # What is chosen is loaded again without choosing.
    assert resolve_quantization(path, config, dynamic, jnp.float32, None) == dynamic


def edit(path, change):
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, path / "model.safetensors")


def test_errors_see_outliers_in_weights_and_in_inputs(tmp_path):
    path = make_checkpoint(tmp_path, "llama")
    config = load_model_config(path)
    moments = {
        name: np.ones((2, width), np.float32) for name, width in dict(qkv=64, out=64, gate_up=64, down=128).items()
    }

    def scores():
        units = measure(path, config, UNIFORM, moments, 4)
        return {(unit.layer, unit.matrix): unit.score for unit in units}

    plain = scores()
    assert len(plain) == 8
    assert all(score["int4"] > 50 * score["int8"] > 0 == score["dense"] for score in plain.values())
    # One large weight in a group makes its whole grid coarse; one large input makes its column count.
    name = "model.layers.1.mlp.down_proj.weight"
    edit(path, lambda t: t[name].__setitem__((slice(None), 3), 100 * t[name][:, 3]))
    moments["out"][0, 5] = 0
    moments["down"][1, 4] = 1e6
    changed = scores()
    assert changed[1, "down"]["int4"] > 3 * plain[1, "down"]["int4"]
    moved = {key for key, score in changed.items() if score != plain[key]}
    assert moved == {(1, "down"), (0, "out")}


def unit(layer, int4, int8, size=100):
    sizes = {"int4": size, "int8": 2 * size, "dense": 4 * size}
    return Unit("out", layer, {"int4": int4, "int8": int8, "dense": 0.0}, sizes)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (99, {}),
        (100, {1: "int8"}),
        (200, {0: "int8", 1: "int8"}),
        (300, {0: "int8", 1: "int8", 2: "int8"}),
        # The step to 16 bits of layer 1 gains more for each byte than the first step of layer 3.
        (500, {0: "int8", 1: "dense", 2: "int8"}),
        (10_000, {0: "dense", 1: "dense", 2: "dense", 3: "dense"}),
    ],
)
def test_budget_goes_where_a_byte_gains_most(budget, expected):
    units = [unit(0, 0.5, 0.01), unit(1, 1.0, 0.4), unit(2, 0.3, 0.02), unit(3, 0.1, 0.01)]
    assert choose(units, budget) == {(layer, "out"): form for layer, form in expected.items()}


def test_chosen_matrices_are_loaded_wide_and_the_others_in_int4(tmp_path):
    path = make_checkpoint(tmp_path, "qwen2")
    config = load_model_config(path)
    settings = dataclasses.replace(DYNAMIC, wide_matrices=("0.qkv=int8", "1.down=dense"))
    layers = load_base(path, config, settings)["layers"]
    assert {name for name, leaf in layers.items() if isinstance(leaf, MixedWeight)} == {"qkv", "down"}
    kinds = [type(take_layer(layers[name], i)) for name in ("qkv", "down") for i in range(2)]
    assert kinds == [Int8Weight, Int4Weight, Int4Weight, type(jnp.zeros(()))]
    exact = load_base(path, config, QuantizationConfig("none"))["layers"]
    np.testing.assert_array_equal(take_layer(layers["down"], 1), exact["down"][1])


@pytest.mark.parametrize("entry", ["2.qkv=int8", "0.q_proj=int8", "0.qkv=int5", "qkv"])
def test_an_entry_that_names_nothing_is_refused(entry, tmp_path):
    path = make_checkpoint(tmp_path, "qwen2")
    settings = dataclasses.replace(DYNAMIC, wide_matrices=(entry,))
    with pytest.raises(UserError, match=r"names no matrix of this model, expected LAYER\.MATRIX=int8 or =dense"):
        load_base(path, load_model_config(path), settings)


def test_a_budget_out_of_range_is_refused(tmp_path):
    path = make_checkpoint(tmp_path, "qwen2")
    settings = dataclasses.replace(DYNAMIC, dynamic_budget=-0.1)
    with pytest.raises(UserError, match=r"dynamic_budget is -0\.1"):
        resolve_quantization(path, load_model_config(path), settings, jnp.float32, None)
