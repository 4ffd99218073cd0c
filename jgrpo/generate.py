"""Completions of prompts: `jgrpo.generate(...)` from Python, `python -m jgrpo.generate` in a terminal.

`jgrpo.generate` has to be both the module that Python runs as a command and the function that a notebook calls, so
the module is callable.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgrpo.checkpoints.hf import load_model_config
from jgrpo.cli import load_config, parse_command, run_command
from jgrpo.config import LoraConfig, ModelSettings, QuantizationConfig, RolloutConfig
from jgrpo.data import Example, check_context, encode_prompts, pad_prompts
from jgrpo.errors import UserError
from jgrpo.export import load_adapter, load_run_adapter
from jgrpo.lora import WEIGHTS
from jgrpo.rollout import Prompts, stream
from jgrpo.rollout.text import TextStream
from jgrpo.rollout.weights import cast
from jgrpo.training.experience import read_completions
from jgrpo.training.policy import Policy, compute_dtype, load_policy, with_context
from jgrpo.validation import check_ranges

Prompt = str | list[dict[str, Any]]
"""Text, taken as it is, or chat messages, which go through the chat template."""

PROMPT_BUCKET = 32
"""Prompts are padded to a multiple of this, so that one compiled program serves many lengths."""


class LoadedModel(NamedTuple):
    """A model in memory."""

    policy: Policy
    """Weights, tokenizer, stop tokens."""
    lora: Mapping[str, Any]
    """The adapter; `{}` is the base model."""


def load(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    quantization: Literal["int4", "none"] = "int4",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> LoadedModel:
    """Load a checkpoint (directory, hub id or "demo") and a PEFT adapter once, for several calls of `generate`."""
    settings = ModelSettings(model=str(model), dtype=dtype)
    return _load(settings, QuantizationConfig(quantization=quantization), adapter)


def load_run(run: str | Path) -> LoadedModel:
    """The model of a training run as it was trained (quantization, dtype), with the run's newest adapter or weights."""
    if not Path(run, "config.yaml").is_file():
        raise UserError(f"run {run}: no config.yaml in it; expected the output directory of a training run")
    config = load_config(Path(run, "config.yaml"))
    return _load(config.model, config.quantization, None, str(run))


def generate(
    model: str | Path | LoadedModel,
    prompts: Sequence[Prompt],
    adapter: str | Path | None = None,
    *,
    num_generations: int = 1,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_token_ids: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[str]]:
    """`num_generations` completions of every prompt, special tokens left out: `[prompts][num_generations]`.

    Args:
        model: directory or hub id of a Hugging Face checkpoint or "demo", held in int4; or what `load` (which has other
            choices) or `load_run` returned.
        prompts: strings, taken as they are, or lists of chat messages.
        adapter: directory of a PEFT adapter, such as a run's `adapter/`; for a model given by name.
        temperature: 0 takes the most likely token every time.
        seed: the same seed gives the same completions.
        batch_size: prompts that are decoded at the same time.

    Raises:
        UserError: model, adapter, prompts or a setting cannot be used; prompt and completion exceed the model's context.
    """
    if isinstance(prompts, str):
        raise UserError("prompts is a single string; expected a list of prompts: put it in brackets")
    if not prompts:
        return []
    if isinstance(model, LoadedModel) and adapter is not None:
        raise UserError("adapter is given for a model that is loaded already; give it to jgrpo.generate.load instead")
    config = RolloutConfig(
        num_generations, max_completion_length, temperature, top_k, top_p, min_p, tuple(stop_token_ids)
    )
    _check(config)
    _check_counts(num_generations, batch_size)
    policy, lora = model if isinstance(model, LoadedModel) else load(model, adapter)
    examples, width = _prepare(policy, prompts, config)
    policy = with_context(policy, width + config.max_completion_length)
    size = min(batch_size, len(examples))
    texts: list[list[str]] = []
    for number, start in enumerate(range(0, len(examples), size)):
        chosen = examples[start : start + size]
        # The last batch is filled up to the one compiled shape.
        filled = [*chosen, *[chosen[-1]] * (size - len(chosen))]
        key = jax.random.fold_in(jax.random.key(seed), number)
        flat, _ = read_completions(policy, policy.sample(lora, filled, key, config, width))
        texts += [flat[q * num_generations : (q + 1) * num_generations] for q in range(len(chosen))]
    return texts


def stream_text(model: LoadedModel, prompt: Prompt, config: RolloutConfig, seed: int = 0) -> Iterator[str]:
    """One completion, in pieces of text as they are decoded; `config.num_generations` is ignored."""
    _check(config)
    policy, lora = model
    (example,), width = _prepare(policy, [prompt], config)
    policy = with_context(policy, width + config.max_completion_length)
    pad_id = policy.tokenizer.pad_token_id
    tokens, lengths = pad_prompts([example], width, pad_id)
    pieces = stream(
        policy.model,
        policy.base,
        lora,
        Prompts(jax.numpy.asarray(tokens), jax.numpy.asarray(lengths)),
        jax.random.key(seed),
        replace(config, num_generations=1),
        eos_ids=policy.eos_ids,
        pad_id=pad_id,
    )
    text = TextStream(policy.tokenizer)
    for piece in pieces:
        yield text.push(np.asarray(piece.token)[np.asarray(piece.live)].tolist())
    yield text.finish()


def _load(
    settings: ModelSettings, quantization: QuantizationConfig, adapter: str | Path | None, run: str | None = None
) -> LoadedModel:
    lora, lora_config = {}, LoraConfig()
    if run is not None:
        model_config = load_model_config(settings.model, settings.revision)
        lora, lora_config = load_run_adapter(Path(run), load_config(Path(run, "config.yaml")), model_config)
        if WEIGHTS in lora:  # the model itself, in the base's place
            base = cast(lora[WEIGHTS], jnp.dtype(compute_dtype(settings)).name)
            return LoadedModel(load_policy(settings, quantization, lora_config, base=base), {})
    elif adapter is not None:
        lora, lora_config = load_adapter(adapter, load_model_config(settings.model, settings.revision))
    return LoadedModel(load_policy(settings, quantization, lora_config), lora)


def _check(config: RolloutConfig) -> None:
    limits = {"max_completion_length": config.max_completion_length, "top_k": config.top_k}
    # In evaluation, as here, temperature 0 is greedy; in training it would have no gradient.
    check_ranges({**limits, "top_p": config.top_p, "min_p": config.min_p, "eval_temperature": config.temperature})


def _check_counts(num_generations: int, batch_size: int) -> None:
    for name, value in (("num_generations", num_generations), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}: expected at least 1")


def _prepare(policy: Policy, prompts: Sequence[Prompt], config: RolloutConfig) -> tuple[list[Example], int]:
    """The prompts as tokens, and the length to pad them to."""
    examples = [
        Example(prompt, ids, {}) for prompt, ids in zip(prompts, encode_prompts(prompts, policy.tokenizer), strict=True)
    ]
    longest = max(len(example.token_ids) for example in examples)
    if empty := [number for number, example in enumerate(examples) if not example.token_ids]:
        raise UserError(f"prompt {empty[0]} has no tokens; expected at least one")
    check_context(longest, config.max_completion_length, policy.model.config.max_position_embeddings)
    return examples, -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET


@dataclass(frozen=True)
class PromptSettings:
    """What stands around the prompt."""

    system_prompt: str | None = None
    """System message put before the prompt (needs a chat template)."""


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling of the completion."""

    max_completion_length: int = 512
    """New tokens at most."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token every time."""
    top_k: int = 0
    """Keep the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability; 1: all."""
    min_p: float = 0.0
    """Keep tokens with at least this fraction of the most likely token's probability; 0: all."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the completion besides the model's own."""


@dataclass(frozen=True)
class SeedSettings:
    """Randomness."""

    seed: int = 0
    """The same seed gives the same completion."""


@dataclass(frozen=True)
class GenerateConfig:
    """One completion, streamed to the terminal. Sections are parts of `TrainConfig`'s, so that a run's settings apply."""

    prompt: str
    """What to complete, as a user message if the tokenizer has a chat template; "-" reads it from standard input."""
    run: str | None = None
    """Directory of a training run: its model, settings and newest adapter or weights."""
    adapter: str | None = None
    """Directory of a PEFT adapter for the model."""
    plain: bool = False
    """Take the prompt as plain text although the tokenizer has a chat template."""
    model: ModelSettings = field(default_factory=ModelSettings)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    data: PromptSettings = field(default_factory=PromptSettings)
    rollout: SamplingSettings = field(default_factory=SamplingSettings)
    training: SeedSettings = field(default_factory=SeedSettings)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    settings = parse_command(
        GenerateConfig, argv, prog="python -m jgrpo.generate", description="Complete a prompt in the terminal."
    )
    if settings.run is not None and settings.adapter is not None:
        raise UserError("--run and --adapter name two adapters; give one of them")
    config = RolloutConfig(**vars(settings.rollout))
    loaded = _load(settings.model, settings.quantization, settings.adapter, settings.run)
    prompt = _terminal_prompt(settings, bool(loaded.policy.tokenizer.chat_template))
    for piece in stream_text(loaded, prompt, config, settings.training.seed):
        print(piece, end="", flush=True)
    print()
    return 0


def _terminal_prompt(settings: GenerateConfig, has_template: bool) -> Prompt:
    """The prompt as a user message if the tokenizer has a chat template, as `jgrpo.data` asks a built-in task."""
    text = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    instructions = settings.data.system_prompt
    system = [] if instructions is None else [{"role": "system", "content": instructions}]
    if settings.plain and system:
        raise UserError("--plain leaves no place for --system-prompt; give one of them")
    as_chat = (has_template or system) and not settings.plain
    return [*system, {"role": "user", "content": text}] if as_chat else text


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> list[list[str]]:
        return generate(*args, **kwargs)


if __name__ == "__main__":
    run_command(main)
else:
    sys.modules[__name__].__class__ = _CallableModule
