"""An objective: the functions and numbers that `policy_loss` composes, as one value.

`Objective` is hashable and compares by value, so it is a static argument of `jit`: two equal configurations
share one compiled program. `registry.objective_from_config` makes one from names; to try a variant of your own,
`dataclasses.replace` a field with your function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

from jgrpo.algorithms.aggregation import Aggregation
from jgrpo.algorithms.masks import drop_groups, drop_truncated
from jgrpo.algorithms.rewards import combine_rewards, zero_variance_groups


@dataclass(frozen=True)
class Bound:
    """A function with some keywords filled in, like `functools.partial`, but compared and hashed by value."""

    function: Callable[..., Any]
    keywords: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """The function on `args`, the bound keywords and `keywords`."""
        return self.function(*args, **dict(self.keywords), **keywords)


def bind(function: Callable[..., Any], **keywords: Any) -> Bound:
    """`function` with `keywords` filled in; their values must be hashable."""
    return Bound(function, tuple(sorted(keywords.items())))


class Scored(NamedTuple):
    """What an advantage estimator may look at; NaN = no reward."""

    rewards_per_function: Float[Array, "K Q G"]
    reward_weights: Float[Array, " K"]
    lengths: Int[Array, "Q G"]
    """Completion tokens."""
    shaping: Float[Array, "Q G"] | None = None
    """Added to the combined reward: the soft overlong penalty, −β times the completion's KL."""
    greedy_rewards: Float[Array, " Q"] | None = None
    """Combined reward of each question's greedy completion; ReMax needs it."""

    @property
    def rewards(self) -> Float[Array, "Q G"]:
        """The weighted sum and the shaping, NaN where no function gave a reward."""
        combined = combine_rewards(self.rewards_per_function, self.reward_weights)
        return combined if self.shaping is None else combined + self.shaping


AdvantageEstimator = Callable[[Scored], Float[Array, "Q G"]]


def of_rewards(scored: Scored, *, estimator: Callable[..., Array]) -> Float[Array, "Q G"]:
    """An estimator that looks at the combined rewards only."""
    return estimator(scored.rewards)


def of_lengths(scored: Scored, *, estimator: Callable[..., Array]) -> Float[Array, "Q G"]:
    """An estimator that looks at the combined rewards and the lengths."""
    return estimator(scored.rewards, scored.lengths)


def of_greedy(scored: Scored, *, estimator: Callable[..., Array]) -> Float[Array, "Q G"]:
    """An estimator that compares with the greedy completion. Raises ValueError if its rewards are not given."""
    if scored.greedy_rewards is None:
        raise ValueError("greedy_rewards is None: this estimator's baseline is the reward of a greedy completion")
    return estimator(scored.rewards, scored.greedy_rewards)


def of_functions(scored: Scored, *, estimator: Callable[..., Array]) -> Float[Array, "Q G"]:
    """An estimator that looks at the reward functions one by one."""
    return estimator(scored.rewards_per_function, scored.reward_weights)


@dataclass(frozen=True)
class Objective:
    """What one optimizer step minimises."""

    advantages: AdvantageEstimator
    """From rewards to one number per completion."""
    ratio_level: Callable[..., Float[Array, "*S C"]]
    """(log_ratio, mask) -> log_ratio; one of `ratios`."""
    loss: Callable[..., Float[Array, "*S C"]]
    """(logprobs, log_ratio, advantages, mask) -> per-token loss; one of `losses`."""
    clip_range: tuple[float, float]
    """Bounds of r outside which a token counts as clipped in the metrics."""
    aggregation: Aggregation
    """(mask, max_completion_length, generation_tokens) -> weights; one of `aggregation`."""
    kl_estimator: Callable[..., Float[Array, "*S C"]]
    """(logprobs, ref_logprobs) -> per-token KL; one of `kl`."""
    beta: float = 0.0
    """Weight of the KL term in the loss; 0: the loss needs no reference."""
    reward_beta: float = 0.0
    """Weight of the KL that is taken off the reward, of each completion or (PPO) each token; 0: none is."""
    kl_times_ratio: bool = False
    """Multiply the KL term by r, which makes its gradient unbiased off-policy (DeepSeek-V3.2, arXiv:2512.02556)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    sampler_correction: Callable[..., Float[Array, "*S C"]] | None = None
    """(log_rho, mask) -> weights; one of `corrections`."""
    correction_in_ratio: bool = False
    """The sampler correction enters the loss's ratio instead of multiplying the loss."""
    top_entropy: float = 1.0
    """Fraction of the batch's tokens, those of highest entropy, in the policy term; 1: all."""
    off_policy_threshold: float | None = None
    """Bound of `masks.off_policy_sequence_mask`; None: no such mask."""
    drop_truncated: bool = False
    """Truncated completions leave the loss."""
    drop_zero_variance: bool = False
    """Groups with equal rewards leave the loss and its denominators."""
    overlong_buffer: int = 0
    """Tokens before the length limit over which the soft overlong penalty grows to 1; 0: no penalty."""
    needs_greedy: bool = False
    """`advantages` needs `Scored.greedy_rewards`."""

    @property
    def needs_reference(self) -> bool:
        """Whether `policy_loss` needs ref_logprobs."""
        return self.beta != 0


def loss_mask(
    objective: Objective,
    completion_mask: Bool[Array, "Q G C"],
    terminated: Bool[Array, "Q G"],
    rewards: Float[Array, "Q G"],
) -> Bool[Array, "Q G C"]:
    """Tokens that take part in the loss: the completion mask without what the objective drops."""
    mask = completion_mask
    if objective.drop_truncated:
        mask = drop_truncated(mask, terminated)
    if objective.drop_zero_variance:
        mask = drop_groups(mask, zero_variance_groups(rewards))
    return mask
