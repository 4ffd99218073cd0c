"""Four bits rounded against a model's inputs, for every family: what is computed on the way, and what is left of an adapter."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jgrpo.checkpoints.calibrated import CalibratedRounding
from jgrpo.checkpoints.gguf_file import read_gguf, write_gguf
from jgrpo.checkpoints.gptq import GPTQEncoding
from jgrpo.checkpoints.hf import load_base
from jgrpo.checkpoints.merged import export_merged, merged_rows
from jgrpo.config import QuantizationConfig
from jgrpo.models import Transformer

from .conftest import LORA, UNQUANTIZED, Case, build_case, our_logits, random_adapter, to_logits

GROUP = 32
INT4 = QuantizationConfig(group_size=GROUP)
HELD_OUT = np.random.default_rng(9).integers(0, 263, (3, 60)).astype(np.int32), np.full(3, 60, np.int32)


def calibrated(case: Case, count: int = 100, longest: int = 100) -> CalibratedRounding:
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 263, n).tolist() for n in rng.integers(1, longest, count)]
    return CalibratedRounding(case.config, rows)


def small_adapter(case: Case) -> Any:
    """One that moves weights by less than half a step of their grid."""
    return jax.tree.map(lambda part: 0.6 * part, random_adapter(case.config, LORA))


def export(case: Case, base: Any, lora: Any, rounding: CalibratedRounding | None, out: Path) -> Any:
    """What is read back of a GPTQ checkpoint, in float32."""
    encoding = GPTQEncoding(np.dtype(np.float32), GROUP, rounding)
    export_merged(out, case.path, lora, LORA, case.config, base=base, encoding=encoding)
    return load_base(out, case.config, UNQUANTIZED)


def logits_of(case: Case, base: Any, xs: list[Any], rounding: CalibratedRounding) -> np.ndarray:
    """Logits of every real token, from what the last layer gave."""
    model = case.model()
    normed = jax.jit(lambda x: model.apply({}, x, base["final_norm"], method="_norm"))
    parts = zip(xs, rounding.chunks, strict=True)
    return np.concatenate([to_logits(model, base, normed(x))[chunk.real] for x, chunk in parts])


def whole_logits(model: Transformer, base: Any, lora: Any, rounding: CalibratedRounding) -> np.ndarray:
    return np.concatenate([our_logits(model, base, lora, chunk.tokens, chunk.lengths) for chunk in rounding.chunks])


def effect_left(case: Case, base: Any, lora: Any, written: Any) -> tuple[float, float]:
    """On tokens not calibrated on: (share of the adapter's effect, its part that is wrong)."""
    model = case.model(LORA)
    trained, plain, got = (
        our_logits(model, *weights, *HELD_OUT) for weights in ((base, lora), (base, {}), (written, {}))
    )
    effect = trained - plain
    return np.vdot(got - plain, effect) / np.vdot(effect, effect), np.linalg.norm(got - trained) / np.linalg.norm(
        effect
    )


def test_layers_one_by_one_are_the_model_and_a_small_adapter_survives(case, tmp_path):
    base, lora, rounding = load_base(case.path, case.config, INT4), small_adapter(case), calibrated(case)
    written = export(case, base, lora, rounding, tmp_path / "calibrated")
    # What came out of the last layer is what the trained and the written model compute.
    for weights, adapter, xs in ((base, lora, rounding.exact), (written, {}, rounding.rounded)):
        whole = whole_logits(case.model(LORA), weights, adapter, rounding)
        np.testing.assert_allclose(logits_of(case, weights, xs, rounding), whole, rtol=0, atol=1e-4)
    share, wrong = effect_left(case, base, lora, written)
    nearest_share, nearest_wrong = effect_left(case, base, lora, export(case, base, lora, None, tmp_path / "nearest"))
    # Random inputs are the hardest ones: no direction of them is free to take the errors.
    assert nearest_share < 0.55
    assert 0.65 < share < 1.2
    assert wrong < nearest_wrong


def test_chunks_of_several_lengths(llama, tmp_path):
    rounding = calibrated(llama, count=70, longest=250)
    assert {chunk.tokens.shape for chunk in rounding.chunks} == {(32, 128), (16, 256)}
    assert sum((chunk.lengths > 0).sum() for chunk in rounding.chunks) == 70
    written = export(llama, llama.base, {}, rounding, tmp_path / "out")
    expected = whole_logits(llama.model(), written, {}, rounding)
    np.testing.assert_allclose(logits_of(llama, written, rounding.rounded, rounding), expected, rtol=0, atol=1e-4)


def test_without_an_adapter_an_int4_base_keeps_every_level(llama, tmp_path):
    base = load_base(llama.path, llama.config, INT4)
    encoding = GPTQEncoding(np.dtype(np.float32), GROUP, calibrated(llama, count=8))
    out = export_merged(tmp_path / "out", llama.path, {}, LORA, llama.config, base=base, encoding=encoding)
    again = load_base(out, llama.config, QuantizationConfig())
    for name in ("qkv", "out", "gate_up", "down"):
        np.testing.assert_array_equal(again["layers"][name].packed, base["layers"][name].packed)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_q4_0_blocks_hold_what_was_rounded(name, tmp_path, tmp_path_factory):
    case = build_case(name, tmp_path_factory)
    base, lora, rounding = load_base(case.path, case.config, INT4), small_adapter(case), calibrated(case)
    file = tmp_path / "model.gguf"
    rows = merged_rows(case.path, base, lora, LORA)
    write_gguf(file, case.path, rows, case.config, "Q4_0", rounding)
    written = read_gguf(file, case.config, jax.device_put)
    # Embedding and head are Q8_0 in the file; the layers are exactly what the rounding computed with.
    layers = {**base, "layers": written["layers"]}
    whole = whole_logits(case.model(), layers, {}, rounding)
    np.testing.assert_allclose(logits_of(case, base, rounding.rounded, rounding), whole, rtol=0, atol=1e-4)
    write_gguf(file, case.path, rows, case.config, "Q4_0")
    nearest = read_gguf(file, case.config, jax.device_put)
    share, wrong = effect_left(case, base, lora, layers)
    nearest_share, nearest_wrong = effect_left(case, base, lora, {**base, "layers": nearest["layers"]})
    assert abs(share - 1) < abs(nearest_share - 1)
    assert wrong < nearest_wrong


def test_a_width_that_is_no_multiple_of_32_stays_wide(tmp_path, tmp_path_factory):
    case = build_case("llama", tmp_path_factory, intermediate_size=112)
    rounding, file = calibrated(case), tmp_path / "model.gguf"
    write_gguf(file, case.path, merged_rows(case.path, case.base, {}, LORA), case.config, "Q4_0", rounding)
    written = read_gguf(file, case.config, jax.device_put)
    np.testing.assert_allclose(written["layers"]["down"], case.base["layers"]["down"], rtol=2**-11, atol=1e-7)
    assert set(rounding.weights) == {"qkv", "out", "gate_up"}
