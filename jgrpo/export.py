"""`python -m jgrpo.export`: turn a run into a PEFT adapter, a merged Hugging Face checkpoint or a GGUF file.

The run's newest checkpoint is exported; its base model is found and quantized again from the run's `config.yaml`. Whatever
is merged is read back and compared with base + adapter before it takes its name: on a few prompts, computed in
float32, the root mean square difference of the logits has to stay below `BOUNDS` of their standard deviation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jgrpo import calibration
from jgrpo.checkpoints import train_state
from jgrpo.checkpoints.adapter import export_adapter, load_adapter
from jgrpo.checkpoints.atomic import atomic_directory, check_free
from jgrpo.checkpoints.calibrated import CalibratedRounding
from jgrpo.checkpoints.gguf_file import TYPES as GGUF_TYPES
from jgrpo.checkpoints.gguf_file import read_gguf, write_gguf
from jgrpo.checkpoints.gguf_metadata import gguf_note
from jgrpo.checkpoints.gptq import GPTQEncoding
from jgrpo.checkpoints.hf import eos_ids, load_base, load_model_config, load_tokenizer, resolve_checkpoint
from jgrpo.checkpoints.merged import export_merged, merged_rows
from jgrpo.checkpoints.source import read_config, stored_dtype
from jgrpo.cli import load_config, parse_command, run_command
from jgrpo.config import LoraConfig, QuantizationConfig, TrainConfig
from jgrpo.errors import UserError
from jgrpo.lora import WEIGHTS, Params
from jgrpo.models import ModelConfig, Transformer
from jgrpo.reporting.files import logged_steps

__all__ = ["check_merged", "export_adapter", "export_merged", "export_run", "load_adapter", "load_run_adapter"]

BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1, "gptq": 0.7, "F16": 1e-2, "Q8_0": 0.1, "Q4_0": 0.7}
"""Largest allowed RMS(Δ logit) between a merged model and base + adapter, in standard deviations of the logits. Rounding
moves a weight by up to 2⁻²⁴, 2⁻¹¹ or 2⁻⁸ of itself; a random 28-layer model showed 2e-6, 3e-3 and 2e-2. Four bits move a
weight by a tenth of a standard deviation (random weights showed 0.3 to 0.4): there `MergeCheck.share` is what catches a
wrong adapter."""

GGUF_FILE = "model.gguf"
CHECK_PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "What is 17 + 25? Let's think step by step.")


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and where to."""

    run: str
    """Directory of a training run."""
    output: str
    """Directory to write; must not exist yet."""
    format: Literal["adapter", "merged", "gptq", "gguf"] = "adapter"
    """adapter: PEFT format, loaded on top of the base model; merged: a complete Hugging Face checkpoint of 16 or 32 bits;
    gptq: the same in 4 bits, for vLLM and transformers; gguf: one file for llama.cpp and Ollama."""
    merge_into: Literal["quantized", "original"] = "quantized"
    """quantized: the dequantized base that the adapter was trained on; original: the base's own full-precision weights,
    which the adapter has never seen."""
    merged_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Weights of the merged checkpoint; with gptq, of what stays in 16 bits."""
    gguf_type: Literal["F16", "Q8_0", "Q4_0"] = "Q8_0"
    """Matrices of the GGUF file."""
    max_shard_gb: float = 5.0
    """Largest safetensors file of the merged checkpoint, in GB."""
    calibration: str | None = None
    """Text that four bits (gptq, Q4_0) are rounded against: a .jsonl, .json, .parquet or .csv file or hub id with a column prompt and, if
    there is one, completion; null: the completions that the run logged, and where it has none, ones that the model draws."""
    calibration_tokens: int = 16384
    """Tokens of it that are used: fewer are faster, more keep more of the adapter; 0: no text, every weight at its nearest level."""
    check: bool = True
    """Read the merged checkpoint back and compare its logits with base + adapter (needs memory for both)."""


@dataclass(frozen=True)
class MergeCheck:
    """How far a merged model is from base + adapter: RMS over the logits of all prompts, positions and tokens."""

    difference: float
    """RMS(merged - (base + adapter))."""
    effect: float
    """RMS((base + adapter) - base): what the adapter itself does."""
    deviation: float
    """Standard deviation of the logits."""
    bound: float
    """Largest allowed `difference`."""
    share: float
    """Least-squares factor of the adapter's effect in what merged - base is: 1 if it was merged right, 0 if not at all.
    Rounding errors, which have no direction, leave it alone even where they outweigh the effect."""

    @property
    def rounded_away(self) -> bool:
        """Whether rounding moves the logits more than the adapter does."""
        return self.difference > 0.5 * self.effect > 0

    def __str__(self) -> str:
        if not self.effect:
            return (
                f"written vs trained model: logits differ by {self.difference:.2g} (RMS; bound {self.bound:.2g}), their "
                f"standard deviation is {self.deviation:.2g}"
            )
        return (
            f"merged vs base + adapter: logits differ by {self.difference:.2g} (RMS; bound {self.bound:.2g}), the adapter "
            f"moves them by {self.effect:.2g}, their standard deviation is {self.deviation:.2g}; the "
            f"merged model has {self.share:.2f} times the adapter's effect"
        )


def check_merged(
    merged: Path,
    base: Params,
    lora: Params,
    lora_config: LoraConfig,
    model_config: ModelConfig,
    dtype: str,
    tokenizer: Any = None,
) -> MergeCheck:
    """Compare the checkpoint in `merged` with base + adapter on `CHECK_PROMPTS` (random tokens without a tokenizer).

    `dtype` (of the merged weights; "gptq" or a type of GGUF for those) chooses the bound and how the weights are read
    back. Raises UserError where the difference exceeds the bound.
    """
    if dtype in GGUF_TYPES:
        merged_base = read_gguf(merged / GGUF_FILE, model_config, jax.device_put)
    else:
        stored = dtype if dtype in ("float32", "float16", "bfloat16") else "float32"
        merged_base = load_base(merged, model_config, QuantizationConfig(quantization="none"), stored)
    tokens, lengths = _check_tokens(tokenizer, model_config)
    model = Transformer(model_config, lora_config, jnp.float32)
    expected = _logits(model, base, lora, tokens, lengths)
    without = _logits(model, base, {}, tokens, lengths)
    got = _logits(model, merged_base, {}, tokens, lengths)
    deviation = float(expected.std())
    effect = expected - without
    share = float(np.vdot(got - without, effect) / np.vdot(effect, effect)) if effect.any() else 1.0
    check = MergeCheck(_rms(got - expected), _rms(effect), deviation, BOUNDS[dtype] * deviation, share)
    # An effect far below the rounding says nothing about its share. Written so that NaN is refused too.
    measurable = check.effect > 0.05 * check.difference
    if not check.difference <= check.bound or (measurable and not abs(share - 1) < 0.5):
        why = "; rounding to this dtype takes the adapter away" if check.rounded_away else ""
        raise UserError(f"merged checkpoint refused, {check}{why}; export in a wider dtype, or the adapter alone")
    return check


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _check_tokens(tokenizer: Any, model_config: ModelConfig) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    rows = [np.random.default_rng(i).integers(0, model_config.vocab_size, 8 + i) for i in range(3)]
    if tokenizer is not None:
        rows = [np.asarray(tokenizer.encode(prompt)) for prompt in CHECK_PROMPTS]
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), max(lengths)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, lengths


def _logits(
    model: Transformer, base: Params, lora: Params, tokens: np.ndarray, lengths: np.ndarray
) -> Float[np.ndarray, "N V"]:
    """Logits of every real position of a few short rows."""

    @jax.jit
    def forward(base: Params, lora: Params, tokens: Array, lengths: Array) -> Any:
        hidden = model.apply({"params": base, "lora": lora}, tokens, lengths)
        return model.apply({"params": base}, hidden, method="logits")

    # Rounded products (TF32 on a GPU) would hide what is compared here.
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(forward(base, lora, tokens, lengths))
    return logits[np.arange(tokens.shape[1]) < lengths[:, None]]


def load_run_adapter(run: Path, config: TrainConfig, model_config: ModelConfig) -> tuple[Params, LoraConfig]:
    """Adapter of the run's newest checkpoint; of `adapter/` where the run holds no checkpoints.

    Of a run that trained the whole model, `{"weights": …}` likewise, from `model/` in its own dtype.
    """
    if (run / "checkpoints").is_dir():
        _, lora = train_state.load_adapter(run / "checkpoints")
        return lora, config.lora
    if config.lora.is_full:
        stored = stored_dtype(run / "model")
        return {WEIGHTS: load_base(run / "model", model_config, config.quantization, stored)}, config.lora
    return load_adapter(run / "adapter", model_config)


def export_run(settings: ExportConfig) -> Path:
    """Export a training run; returns the directory written."""
    run = Path(settings.run).expanduser()
    check_free(settings.output)
    if settings.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb is {settings.max_shard_gb}: expected a number above 0")
    if settings.calibration_tokens < 0:
        raise UserError(f"--calibration-tokens is {settings.calibration_tokens}: expected 0 or more")
    if settings.calibration is not None and not (_is_four_bits(settings) and settings.calibration_tokens):
        raise UserError(
            "--calibration is for four bits: --format gptq, or gguf with --gguf-type Q4_0, and tokens to use of it"
        )
    if not (run / "config.yaml").is_file():
        raise UserError(f"run {run}: no config.yaml, so not the directory of a run")
    config = load_config(run / "config.yaml")
    checkpoint = resolve_checkpoint(config.model.model, config.model.revision)
    model_config = load_model_config(checkpoint)
    lora, lora_config = load_run_adapter(run, config, model_config)
    if WEIGHTS in lora and settings.format == "adapter":
        raise UserError(
            f"run {run} trained the whole model (lora: null), so there is no adapter to export: take --format merged, gptq or gguf"
        )
    if WEIGHTS in lora and settings.merge_into == "original":
        raise UserError(
            f"run {run} trained the whole model (lora: null): there is nothing to merge into; leave --merge-into out"
        )
    if settings.format == "adapter":
        return export_adapter(settings.output, lora, lora_config, model_config, config.model.model)
    return _export_merged_run(settings, config, checkpoint, model_config, lora, lora_config)


def _is_four_bits(settings: ExportConfig) -> bool:
    return settings.format == "gptq" or (settings.format == "gguf" and settings.gguf_type == "Q4_0")


def _draws(settings: ExportConfig) -> bool:
    """Whether the model has to draw the text that four bits are rounded against."""
    logged = logged_steps(Path(settings.run).expanduser())
    return _is_four_bits(settings) and settings.calibration_tokens > 0 and settings.calibration is None and not logged


def _rounding(
    settings: ExportConfig,
    checkpoint: Path,
    model_config: ModelConfig,
    base: Params | None,
    lora: Params,
    lora_config: LoraConfig,
) -> CalibratedRounding | None:
    """What chooses the levels of a four-bit format; None: the nearest."""
    if not (_is_four_bits(settings) and settings.calibration_tokens):
        return None
    tokenizer = load_tokenizer(checkpoint)
    if _draws(settings):
        assert base is not None
        ends = eos_ids(checkpoint, tokenizer)
        rows = calibration.drawn_rows(base, lora, lora_config, model_config, tokenizer, ends)
        what = "completions that the model drew (the run logged none)"
    elif settings.calibration is not None:
        rows, what = calibration.rows_of_file(settings.calibration, tokenizer), settings.calibration
    else:
        rows, what = calibration.logged_rows(Path(settings.run).expanduser(), tokenizer), "completions of the run"
    kept = calibration.mixed(rows, tokenizer, model_config, settings.calibration_tokens)
    print(f"rounding against {sum(map(len, kept)):,} tokens: {what}, and a few general prompts")
    return CalibratedRounding(model_config, kept)


def _merge_base(settings: ExportConfig, config: TrainConfig, checkpoint: Path) -> tuple[bool, Params | None]:
    """Whether the checkpoint's own weights are merged into, and the base that the export needs, if it needs one."""
    # The weights of an already quantized checkpoint are the base that the adapter was trained on.
    original = settings.merge_into == "original" and not read_config(checkpoint).get("quantization_config")
    quantization = QuantizationConfig(quantization="none") if original else config.quantization
    needs_base = settings.check or not original or _draws(settings)
    if not needs_base:
        return original, None
    return original, load_base(checkpoint, load_model_config(checkpoint), quantization, stored_dtype(checkpoint))


def _export_merged_run(
    settings: ExportConfig,
    config: TrainConfig,
    checkpoint: Path,
    model_config: ModelConfig,
    lora: Params,
    lora_config: LoraConfig,
) -> Path:
    if WEIGHTS in lora:
        base, lora, original = lora[WEIGHTS], {}, False
    else:
        original, base = _merge_base(settings, config, checkpoint)
    kind = {"gptq": "gptq", "gguf": settings.gguf_type}.get(settings.format, settings.merged_dtype)

    def verify(merged: Path) -> None:
        if settings.check:
            assert base is not None
            tokenizer = load_tokenizer(checkpoint)
            found = check_merged(merged, base, lora, lora_config, model_config, kind, tokenizer)
            print(f"{found}{'; rounding outweighs the adapter: export in a wider dtype' if found.rounded_away else ''}")

    rounding = _rounding(settings, checkpoint, model_config, base, lora, lora_config)
    into = None if original else base
    if settings.format == "gguf":
        if note := gguf_note(model_config):
            print(note)
        rows = merged_rows(checkpoint, into, lora, lora_config)
        with atomic_directory(settings.output) as directory:
            write_gguf(directory / GGUF_FILE, checkpoint, rows, model_config, settings.gguf_type, rounding)
            verify(directory)
        return Path(settings.output)
    dtype = jnp.dtype(settings.merged_dtype)
    return export_merged(
        settings.output,
        checkpoint,
        lora,
        lora_config,
        model_config,
        base=into,
        dtype=dtype,
        encoding=GPTQEncoding(dtype, config.quantization.group_size, rounding) if settings.format == "gptq" else None,
        max_shard_bytes=int(settings.max_shard_gb * 1e9),
        verify=verify,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    settings = parse_command(
        ExportConfig,
        argv,
        prog="python -m jgrpo.export",
        description="Export a run as a PEFT adapter, a merged Hugging Face checkpoint or a GGUF file.",
    )
    print(f"wrote {export_run(settings)}")
    return 0


if __name__ == "__main__":
    run_command(main)
