"""What rounding to four bits leaves of an adapter, for several ways of rounding; a JSON line for each.

    PYTHONPATH=. python scripts/measure_gptq.py --run runs/demo      # the table of docs/models.md
    PYTHONPATH=. python scripts/measure_gptq.py --random 100         # millions of parameters: time and memory

On text that nothing was calibrated on: a run's held-out problems with completions of its policy, other text, and the prompts of the export's own
check; of a random model random tokens. `share` is the part of the adapter's effect on the logits that is left, `error` the RMS difference
from base + adapter over that effect, `kl` the mean divergence from base + adapter.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_softmax

from jgrpo import calibration
from jgrpo.checkpoints.calibrated import CalibratedRounding, Chunk, Halves, chunks_of
from jgrpo.checkpoints.gptq import GPTQEncoding
from jgrpo.checkpoints.hf import eos_ids, load_base, load_model_config, load_tokenizer, resolve_checkpoint
from jgrpo.checkpoints.merged import export_merged
from jgrpo.cli import load_config
from jgrpo.config import LoraConfig, QuantizationConfig, RolloutConfig
from jgrpo.data import load_prompts
from jgrpo.export import CHECK_PROMPTS, load_run_adapter
from jgrpo.generate import load_run
from jgrpo.lora import init_lora
from jgrpo.models import ModelConfig, Transformer
from jgrpo.training.task import prompt_width
from scripts.measure_dynamic import random_checkpoint

OTHER_TEXT = (
    "Water boils at 100 degrees Celsius at sea level, and",
    "import numpy as np\n\nclass Stack:\n    def __init__(self):",
    "Dear Sir or Madam, I am writing to you because",
    "Q: What is the largest planet?\nA: Jupiter.\nQ: Who wrote Hamlet?\nA:",
    "The quick brown fox jumps over the lazy dog.",
    "1, 1, 2, 3, 5, 8, 13,",
    "Solve 12 * (7 - 3) + 5 =",
    "La vie est belle et le soleil brille",
)
PROBLEMS = 48


class PlainGPTQ(CalibratedRounding):
    """The paper's target: the matrix itself, whatever went wrong before it."""

    def _moments(self, *which: Any) -> Halves:
        first, second = (half._replace(drift=jnp.zeros_like(half.drift)) for half in super()._moments(*which))
        return first, second


@dataclass(frozen=True)
class Subject:
    """A trained policy."""

    path: Path
    config: ModelConfig
    base: Any
    lora: Any
    lora_config: LoraConfig
    held_out: dict[str, list[Chunk]]
    """Rows of tokens that nothing is calibrated on."""

    def logits(self, base: Any, lora: Any, chunks: list[Chunk]) -> np.ndarray:
        """Of every real token, in float32."""
        model = Transformer(self.config, self.lora_config)

        @jax.jit
        def forward(base: Any, lora: Any, tokens: Any, lengths: Any) -> Any:
            hidden = model.apply({"params": base, "lora": lora}, tokens, lengths)
            return model.apply({"params": base}, hidden, method="logits")

        with jax.default_matmul_precision("highest"):
            return np.concatenate(
                [np.asarray(forward(base, lora, chunk.tokens, chunk.lengths))[chunk.real] for chunk in chunks]
            )

    def measure(self, rounding: CalibratedRounding | None, group_size: int) -> Iterator[tuple[str, dict[str, float]]]:
        """(text, numbers) of one way of rounding, and what the export took."""
        with tempfile.TemporaryDirectory() as directory:
            encoding, start = GPTQEncoding(jnp.dtype("bfloat16"), group_size, rounding), time.perf_counter()
            out = Path(directory) / "out"
            export_merged(out, self.path, self.lora, self.lora_config, self.config, base=self.base, encoding=encoding)
            yield "export", memory() | {"seconds": round(time.perf_counter() - start, 1)}
            written = load_base(out, self.config, QuantizationConfig(quantization="none"), "float32")
        for name, chunks in self.held_out.items():
            yield name, self.compare(written, chunks)

    def compare(self, written: Any, chunks: list[Chunk]) -> dict[str, float]:
        """Share, error and divergence on some rows."""
        trained, plain, got = (
            self.logits(*weights, chunks) for weights in ((self.base, self.lora), (self.base, {}), (written, {}))
        )
        effect, log_p = trained - plain, log_softmax(trained)
        found = {
            "share": np.vdot(got - plain, effect) / np.vdot(effect, effect),
            "error": np.linalg.norm(got - trained) / np.linalg.norm(effect),
            "kl": (jnp.exp(log_p) * (log_p - log_softmax(got))).sum(-1).mean(),
            "kl_base": (jnp.exp(log_p) * (log_p - log_softmax(plain))).sum(-1).mean(),
        }
        return {name: round(float(value), 4) for name, value in found.items()}


def memory() -> dict[str, float]:
    """Peaks of this process so far, in MB."""
    stats = jax.devices()[0].memory_stats() or {}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"host_peak": round(host), "device_peak": round(stats.get("peak_bytes_in_use", 0) / 1e6)}


def subject_of_run(run: Path) -> Subject:
    """A run's policy; its held-out problems with completions that it draws."""
    config = load_config(run / "config.yaml")
    path = resolve_checkpoint(config.model.model, config.model.revision)
    model_config, tokenizer = load_model_config(path), load_tokenizer(path)
    lora, lora_config = load_run_adapter(run, config, model_config)
    base = load_base(path, model_config, config.quantization, jnp.bfloat16)
    loaded = load_run(run)
    examples = load_prompts(config.data, tokenizer, "test", config.training.seed).examples[:PROBLEMS]
    sampling = RolloutConfig(num_generations=1, max_completion_length=config.rollout.max_completion_length)
    rollout = loaded.policy.sample(loaded.lora, examples, jax.random.key(3), sampling, prompt_width(examples))
    drawn, lengths = np.asarray(rollout.completion_tokens[:, 0]), np.asarray(rollout.completion_lengths[:, 0])
    solved = [examples[q].token_ids + drawn[q, :n].tolist() for q, n in enumerate(lengths)]
    texts = {"other text": OTHER_TEXT, "check prompts": CHECK_PROMPTS}
    held_out = {"held-out problems": chunks_of(solved)}
    held_out |= {name: chunks_of([tokenizer.encode(text) for text in some]) for name, some in texts.items()}
    return Subject(path, model_config, base, lora, lora_config, held_out)


def random_subject(directory: Path, millions: int) -> Subject:
    """A random model in int4 with a random adapter that nearest levels lose."""
    path, lora_config = random_checkpoint(directory, millions), LoraConfig(lora_rank=16, lora_alpha=32.0)
    config = load_model_config(path)
    moved = {
        name: {"a": part["a"], "b": 0.012 * jax.random.normal(jax.random.key(i), part["b"].shape)}
        for i, (name, part) in enumerate(init_lora(jax.random.key(0), lora_config, config).items())
    }
    base = load_base(path, config, QuantizationConfig(), jnp.bfloat16)
    held_out = {"random tokens": chunks_of(random_rows(config, 2048, seed=1))}
    return Subject(path, config, base, moved, lora_config, held_out)


def random_rows(config: ModelConfig, tokens: int, seed: int) -> list[list[int]]:
    """Rows of 256 random tokens."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (tokens // 256, 256)).tolist()


def ways_of_run(run: Path, subject: Subject) -> Iterator[tuple[str, CalibratedRounding | None, int]]:
    """(name, rounding, group size) of every row of the table."""
    config, path = subject.config, subject.path
    tokenizer = load_tokenizer(path)

    def logged(count: int) -> list[list[int]]:
        return calibration.mixed(calibration.logged_rows(run, tokenizer), tokenizer, config, count)

    yield "nearest level", None, 64
    yield "nearest level, groups of 32", None, 32
    yield "plain GPTQ", PlainGPTQ(config, logged(16384)), 64
    yield "calibrated, 16,384 tokens of the run", CalibratedRounding(config, logged(16384)), 64
    yield "calibrated, 4,096 tokens", CalibratedRounding(config, logged(4096)), 64
    own = (subject.base, subject.lora, subject.lora_config, config, tokenizer, eos_ids(path, tokenizer))
    drawn = calibration.mixed(calibration.drawn_rows(*own), tokenizer, config, 16384)
    yield "calibrated, drawn completions", CalibratedRounding(config, drawn), 64
    general = [tokenizer.encode(prompt) for prompt in calibration.PROMPTS]
    alone = [row for row in logged(16384) if row not in general]
    yield "calibrated, the run's only", CalibratedRounding(config, alone), 64
    yield "calibrated, groups of 32", CalibratedRounding(config, logged(16384)), 32


def ways_of_random(tokens: int, subject: Subject) -> Iterator[tuple[str, CalibratedRounding | None, int]]:
    """Nearest levels, plain GPTQ and the export's way."""
    rows = random_rows(subject.config, tokens, seed=0)
    yield "nearest level", None, 64
    yield "plain GPTQ", PlainGPTQ(subject.config, rows), 64
    yield "calibrated", CalibratedRounding(subject.config, rows), 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="directory of a training run")
    which.add_argument("--random", type=int, help="millions of parameters of a random model")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens that the random model is calibrated on")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        subject = subject_of_run(args.run) if args.run else random_subject(Path(directory), args.random)
        ways = ways_of_run(args.run, subject) if args.run else ways_of_random(args.tokens, subject)
        for name, rounding, group_size in ways:
            print(json.dumps({"rounding": name, **dict(subject.measure(rounding, group_size))}), flush=True)


if __name__ == "__main__":
    main()
