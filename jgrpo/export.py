"""`python -m jgrpo.export`: turn a run into a PEFT adapter or a merged Hugging Face checkpoint.

The run's newest checkpoint is exported; its base model is found and quantized again from the run's `config.yaml`. A merged
checkpoint is read back and compared with base + adapter before it takes its name: on a few prompts, computed in
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

from jgrpo.checkpoints import train_state
from jgrpo.checkpoints.adapter import export_adapter, load_adapter
from jgrpo.checkpoints.atomic import check_free
from jgrpo.checkpoints.hf import load_base, load_model_config, load_tokenizer, resolve_checkpoint
from jgrpo.checkpoints.merged import export_merged
from jgrpo.checkpoints.source import stored_dtype
from jgrpo.cli import load_config, parse_command, run_command
from jgrpo.config import LoraConfig, QuantizationConfig, TrainConfig
from jgrpo.errors import UserError
from jgrpo.lora import Params
from jgrpo.models import ModelConfig, Transformer

__all__ = ["check_merged", "export_adapter", "export_merged", "export_run", "load_adapter", "load_run_adapter"]

BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}
"""Largest allowed RMS(Δ logit) between a merged model and base + adapter, in standard deviations of the logits. Rounding
moves a weight by up to 2⁻²⁴, 2⁻¹¹ or 2⁻⁸ of itself; a random 28-layer model showed 2e-6, 3e-3 and 2e-2."""

CHECK_PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "What is 17 + 25? Let's think step by step.")


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and where to."""

    run: str
    """Directory of a training run."""
    output: str
    """Directory to write; must not exist yet."""
    format: Literal["adapter", "merged"] = "adapter"
    """adapter: PEFT format, loaded on top of the base model; merged: a complete Hugging Face checkpoint."""
    merge_into: Literal["quantized", "original"] = "quantized"
    """quantized: the dequantized base that the adapter was trained on; original: the base's own full-precision weights,
    which the adapter has never seen."""
    merged_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Weights of the merged checkpoint."""
    max_shard_gb: float = 5.0
    """Largest safetensors file of the merged checkpoint, in GB."""
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

    def __str__(self) -> str:
        text = (
            f"merged vs base + adapter: logits differ by {self.difference:.2g} (RMS; bound {self.bound:.2g}), the adapter "
            f"moves them by {self.effect:.2g}, their standard deviation is {self.deviation:.2g}"
        )
        drowned = self.difference > 0.5 * self.effect > 0
        return text + ("; rounding outweighs the adapter: export in a wider dtype" if drowned else "")


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

    `dtype` (of the merged weights) chooses the bound. Raises UserError where the difference exceeds it.
    """
    tokens, lengths = _check_tokens(tokenizer, model_config)
    model = Transformer(model_config, lora_config, jnp.float32)
    expected = _logits(model, base, lora, tokens, lengths)
    without = _logits(model, base, {}, tokens, lengths)
    merged_base = load_base(merged, model_config, QuantizationConfig(quantization="none"), dtype)
    got = _logits(model, merged_base, {}, tokens, lengths)
    deviation = float(expected.std())
    check = MergeCheck(_rms(got - expected), _rms(expected - without), deviation, BOUNDS[dtype] * deviation)
    # Written so that NaN is refused too.
    if not check.difference <= check.bound:
        raise UserError(f"merged checkpoint refused, {check}; export in a wider dtype, or the adapter alone")
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
    """Adapter of the run's newest checkpoint; of `adapter/` where the run holds no checkpoints."""
    if (run / "checkpoints").is_dir():
        _, lora = train_state.load_adapter(run / "checkpoints")
        return lora, config.lora
    return load_adapter(run / "adapter", model_config)


def export_run(settings: ExportConfig) -> Path:
    """Export a training run; returns the directory written."""
    run = Path(settings.run).expanduser()
    check_free(settings.output)
    if settings.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb is {settings.max_shard_gb}: expected a number above 0")
    if not (run / "config.yaml").is_file():
        raise UserError(f"run {run}: no config.yaml, so not the directory of a run")
    config = load_config(run / "config.yaml")
    checkpoint = resolve_checkpoint(config.model.model, config.model.revision)
    model_config = load_model_config(checkpoint)
    lora, lora_config = load_run_adapter(run, config, model_config)
    if settings.format == "adapter":
        return export_adapter(settings.output, lora, lora_config, model_config, config.model.model)
    return _export_merged_run(settings, config, checkpoint, model_config, lora, lora_config)


def _export_merged_run(
    settings: ExportConfig,
    config: TrainConfig,
    checkpoint: Path,
    model_config: ModelConfig,
    lora: Params,
    lora_config: LoraConfig,
) -> Path:
    original = settings.merge_into == "original"
    quantization = QuantizationConfig(quantization="none") if original else config.quantization
    needs_base = settings.check or not original
    base = load_base(checkpoint, model_config, quantization, stored_dtype(checkpoint)) if needs_base else None

    def verify(merged: Path) -> None:
        assert base is not None
        tokenizer = load_tokenizer(checkpoint)
        print(check_merged(merged, base, lora, lora_config, model_config, settings.merged_dtype, tokenizer))

    return export_merged(
        settings.output,
        checkpoint,
        lora,
        lora_config,
        model_config,
        base=None if original else base,
        dtype=jnp.dtype(settings.merged_dtype),
        max_shard_bytes=int(settings.max_shard_gb * 1e9),
        verify=verify if settings.check else None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    settings = parse_command(
        ExportConfig,
        argv,
        prog="python -m jgrpo.export",
        description="Export a run as a PEFT adapter or as a merged Hugging Face checkpoint.",
    )
    print(f"wrote {export_run(settings)}")
    return 0


if __name__ == "__main__":
    run_command(main)
