"""A model with what turns its tokens into text and back: loaded once, used by the loop and by evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jgrpo.checkpoints.dynamic import resolve_quantization
from jgrpo.checkpoints.hf import eos_ids, load_base, load_model_config, load_tokenizer, resolve_checkpoint
from jgrpo.config import LoraConfig, ModelSettings, QuantizationConfig, RolloutConfig
from jgrpo.data import Example, pad_prompts
from jgrpo.lora import WEIGHTS
from jgrpo.models import Transformer
from jgrpo.models.rope import for_positions
from jgrpo.rollout import EnvironmentFactory, Prompts, Rollout, generate, generate_turns
from jgrpo.rollout.ahead import compile_all, lower_rollout
from jgrpo.training.compilation import enable_compilation_cache


@dataclass(frozen=True)
class Policy:
    """Frozen base, model and tokenizer; the adapter, or whole weights in the base's place, are always given separately."""

    model: Transformer
    base: Mapping[str, Any]
    """`{}` where whole weights are trained and nothing is compared with those at the start."""
    tokenizer: Any
    eos_ids: tuple[int, ...]
    environment: EnvironmentFactory | None = None
    """Makes what answers the model's turns, one for each completion; None: a completion is one turn."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """How the base is stored, with the choices of `quantization: dynamic` filled in."""
    prepared: set[Any] = field(default_factory=set, compare=False)
    """Shapes and settings of rollouts all of whose programs are compiled."""

    @property
    def dtype(self) -> str:
        """Name of the compute dtype."""
        return jnp.dtype(self.model.dtype).name

    def describe(self, trained: Mapping[str, Any]) -> list[str]:
        """What the user is told before the run, with what it trains."""
        config = self.model.config
        frozen, whole = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6 for tree in (self.base, trained.get(WEIGHTS, {}))
        )
        parts = [f"{whole:,.1f} MB of weights, all trained, in float32"] if whole else []
        parts += [f"{frozen:,.1f} MB of frozen weights"] if frozen else []
        shape = f"{config.num_layers} layers x {config.hidden_size}, vocabulary {config.vocab_size}"
        return [f"model: {config.family}, {shape}, {', '.join(parts)}, computing in {self.dtype}"]

    def sample(
        self,
        lora: Mapping[str, Any],
        examples: Sequence[Example],
        key: PRNGKeyArray,
        config: RolloutConfig,
        prompt_width: int,
    ) -> Rollout:
        """Completions of every example; compiled once for each number of examples."""
        tokens, lengths = pad_prompts(examples, prompt_width, self.tokenizer.pad_token_id)
        prompts = Prompts(tokens=tokens, lengths=lengths)  # type: ignore[arg-type]
        given, pad_id = (self.model, self.base, lora, prompts, key, config), self.tokenizer.pad_token_id
        if self.environment is None:
            rollout = generate(*given, eos_ids=self.eos_ids, pad_id=pad_id)
            self._compile_rest(given, pad_id)
            return rollout
        environments = [self.environment() for _ in range(len(examples) * config.num_generations)]
        for row, environment in enumerate(environments):
            environment.reset(examples[row // config.num_generations].columns)
        return generate_turns(*given, environments, tokenizer=self.tokenizer, eos_ids=self.eos_ids, pad_id=pad_id)

    def lower_sample(
        self, lora: Mapping[str, Any], questions: int, key: PRNGKeyArray, config: RolloutConfig, prompt_width: int
    ) -> jax.stages.Lowered:
        """The first program of `sample` for so many examples, without an environment."""
        tokens, lengths = np.zeros((questions, prompt_width), np.int32), np.ones(questions, np.int32)
        given = (self.model, self.base, lora, Prompts(tokens=tokens, lengths=lengths), key, config)  # type: ignore[arg-type]
        return lower_rollout(*given, eos_ids=self.eos_ids, pad_id=self.tokenizer.pad_token_id)[0]

    def _compile_rest(self, given: tuple[Any, ...], pad_id: int) -> None:
        """The programs that other lengths would need: behind the first rollout, whose tokens come first."""
        _, _, lora, prompts, _, config = given
        shape = (prompts.tokens.shape, config, bool(lora))
        if shape not in self.prepared:
            self.prepared.add(shape)
            compile_all(lower_rollout(*given, eos_ids=self.eos_ids, pad_id=pad_id)[1]())


def load_policy(
    settings: ModelSettings,
    quantization: QuantizationConfig,
    lora: LoraConfig,
    tokenizer: Any = None,
    context_length: int | None = None,
    *,
    stored: Any = None,
    base: Mapping[str, Any] | None = None,
) -> Policy:
    """Load a checkpoint, quantizing while it streams in; `tokenizer` saves loading it again.

    `context_length` is that of the longest row to come (`with_context`), `stored` the dtype of unquantized weights (None: the
    compute dtype). A `base` that is given takes the place of the checkpoint's weights.

    Raises:
        UserError: the checkpoint is missing, damaged or of an unsupported kind.
    """
    enable_compilation_cache()
    path = resolve_checkpoint(settings.model, settings.revision)
    model = Transformer(load_model_config(path), lora, compute_dtype(settings))
    tokenizer = tokenizer or load_tokenizer(path)
    if base is None:
        quantization = resolve_quantization(path, model.config, quantization, model.dtype, tokenizer)
        base = load_base(path, model.config, quantization, stored or model.dtype)
    policy = Policy(model, base, tokenizer, eos_ids(path, tokenizer), quantization=quantization)
    return policy if context_length is None else with_context(policy, context_length)


def with_context(policy: Policy, context_length: int) -> Policy:
    """The policy for rows of up to `context_length` positions, where its rotary embedding depends on that."""
    return replace(policy, model=policy.model.clone(config=for_positions(policy.model.config, context_length)))


def compute_dtype(settings: ModelSettings) -> Any:
    """`settings.dtype`; auto: bfloat16 on an accelerator, float32 on a CPU."""
    if settings.dtype != "auto":
        return jnp.dtype(settings.dtype)
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
