"""An objective is a composition of this package's functions; here the names of a configuration become functions.

`Objective` is hashable and compares by value, so it is a static argument of `jit`: two equal configurations
share one compiled program. To try a variant of your own, `dataclasses.replace` a field with your function.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp, inf
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

from jgrpo.algorithms import advantages as adv
from jgrpo.algorithms import losses
from jgrpo.algorithms.aggregation import AGGREGATIONS, Aggregation
from jgrpo.algorithms.corrections import SAMPLER_CORRECTIONS
from jgrpo.algorithms.kl import KL_ESTIMATORS
from jgrpo.algorithms.masks import drop_groups, drop_truncated
from jgrpo.algorithms.ratios import RATIO_LEVELS
from jgrpo.algorithms.rewards import combine_rewards, zero_variance_groups
from jgrpo.config import AlgorithmConfig
from jgrpo.errors import UserError


@dataclass(frozen=True)
class Bound:
    """A function with some keywords filled in, like `functools.partial`, but compared and hashed by value."""

    function: Callable[..., Any]
    keywords: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *args: Any) -> Any:
        """The function on `args` and the keywords."""
        return self.function(*args, **dict(self.keywords))


def bind(function: Callable[..., Any], **keywords: Any) -> Bound:
    """`function` with `keywords` filled in; their values must be hashable."""
    return Bound(function, tuple(sorted(keywords.items())))


class Scored(NamedTuple):
    """What an advantage estimator may look at; NaN = no reward."""

    rewards_per_function: Float[Array, "K Q G"]
    reward_weights: Float[Array, " K"]
    lengths: Int[Array, "Q G"]
    """Completion tokens."""

    @property
    def rewards(self) -> Float[Array, "Q G"]:
        """The weighted sum, NaN where no function gave a reward."""
        return combine_rewards(self.rewards_per_function, self.reward_weights)


@dataclass(frozen=True)
class Objective:
    """What one optimizer step minimises."""

    advantages: Callable[[Scored], Float[Array, "Q G"]]
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
    """Weight of the KL term; 0: no reference needed."""
    kl_times_ratio: bool = False
    """Multiply the KL term by r, which makes its gradient unbiased off-policy (DeepSeek-V3.2, arXiv:2512.02556)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    sampler_correction: Callable[..., Float[Array, "*S C"]] | None = None
    """(log_rho, mask) -> weights; one of `corrections`."""
    correction_in_ratio: bool = False
    """The sampler correction enters the loss's ratio instead of multiplying the loss."""
    off_policy_threshold: float | None = None
    """Bound of `masks.off_policy_sequence_mask`; None: no such mask."""
    drop_truncated: bool = False
    """Truncated completions leave the loss."""
    drop_zero_variance: bool = False
    """Groups with equal rewards leave the loss and its denominators."""

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


ADVANTAGES: dict[str, Callable[[AlgorithmConfig], Callable[[Scored], Float[Array, "Q G"]]]] = {
    "grpo": lambda config: bind(_grpo_advantages, scale=config.scale_rewards),
    "gdpo": lambda config: _gdpo_advantages,
    "rloo": lambda config: _rloo_advantages,
    "reinforce_plus_plus": lambda config: _reinforce_plus_plus_advantages,
    "reinforce_plus_plus_baseline": lambda config: _reinforce_plus_plus_baseline_advantages,
    "opo": lambda config: _opo_advantages,
    "pass_at_k": lambda config: _pass_at_k_advantages,
}
"""Advantage estimators by name. ReMax is absent: it needs a greedy completion of each prompt from the rollout."""


def _grpo_advantages(scored: Scored, *, scale: str) -> Float[Array, "Q G"]:
    return adv.group_advantages(scored.rewards, scale=scale)


def _gdpo_advantages(scored: Scored) -> Float[Array, "Q G"]:
    return adv.gdpo_advantages(scored.rewards_per_function, scored.reward_weights)


def _rloo_advantages(scored: Scored) -> Float[Array, "Q G"]:
    return adv.rloo_advantages(scored.rewards)


def _reinforce_plus_plus_advantages(scored: Scored) -> Float[Array, "Q G"]:
    return adv.reinforce_plus_plus_advantages(scored.rewards)


def _reinforce_plus_plus_baseline_advantages(scored: Scored) -> Float[Array, "Q G"]:
    return adv.reinforce_plus_plus_baseline_advantages(scored.rewards)


def _opo_advantages(scored: Scored) -> Float[Array, "Q G"]:
    return adv.opo_advantages(scored.rewards, scored.lengths)


def _pass_at_k_advantages(scored: Scored) -> Float[Array, "Q G"]:
    return adv.pass_at_k_advantages(scored.rewards)


LossChoice = tuple[Bound, tuple[float, float]]


def _clipped(config: AlgorithmConfig) -> LossChoice:
    high = _epsilon_high(config)
    loss = bind(losses.clipped_loss, epsilon_low=config.epsilon, epsilon_high=high, delta=config.delta)
    return loss, (1 - config.epsilon, 1 + high)


def _cispo(config: AlgorithmConfig) -> LossChoice:
    return bind(losses.cispo_loss, cap=config.cispo_cap), (0.0, config.cispo_cap)


def _sapo(config: AlgorithmConfig) -> LossChoice:
    temperatures = {"temperature_pos": config.sapo_temperature_pos, "temperature_neg": config.sapo_temperature_neg}
    return bind(losses.sapo_loss, **temperatures), (0.0, inf)


def _vespo(config: AlgorithmConfig) -> LossChoice:
    positive = {"k_pos": config.vespo_k_pos, "lambda_pos": config.vespo_lambda_pos}
    negative = {"k_neg": config.vespo_k_neg, "lambda_neg": config.vespo_lambda_neg}
    return bind(losses.vespo_loss, **positive, **negative), (0.0, inf)


def _gmpo(config: AlgorithmConfig) -> LossChoice:
    high = _epsilon_high(config)
    return bind(losses.gmpo_loss, epsilon_low=config.epsilon, epsilon_high=high), (exp(-config.epsilon), exp(high))


LOSSES: dict[str, Callable[[AlgorithmConfig], LossChoice]] = {
    "clipped": _clipped,
    "cispo": _cispo,
    "sapo": _sapo,
    "vespo": _vespo,
    "gmpo": _gmpo,
}
"""Losses by name, each with the range of r outside which it counts a token as clipped."""

ROW_LOSSES = ("vespo", "gmpo")
"""Losses that reduce the row's token ratios themselves, and so need them at token level."""


def _epsilon_high(config: AlgorithmConfig) -> float:
    return config.epsilon if config.epsilon_high is None else config.epsilon_high


def objective_from_config(config: AlgorithmConfig) -> Objective:
    """The objective that a configuration describes. Raises UserError for settings that contradict each other."""
    check_objective(config)
    loss, clip_range = LOSSES[config.loss_type](config)
    return Objective(
        advantages=ADVANTAGES[config.advantage_estimator](config),
        ratio_level=RATIO_LEVELS[config.importance_sampling_level],
        loss=loss,
        clip_range=clip_range,
        aggregation=AGGREGATIONS[config.aggregation],
        kl_estimator=KL_ESTIMATORS[config.kl_estimator],
        beta=config.beta,
        kl_times_ratio=config.use_bias_correction_kl,
        entropy_coef=config.entropy_coef,
        sampler_correction=_sampler_correction(config),
        correction_in_ratio=config.loss_type == "vespo",
        off_policy_threshold=config.off_policy_mask_threshold,
        drop_truncated=config.mask_truncated_completions,
        drop_zero_variance=config.filter_zero_variance,
    )


def _sampler_correction(config: AlgorithmConfig) -> Bound | None:
    if config.sampler_correction == "none":
        return None
    bounds: Mapping[str, float] = {"low": config.sampler_correction_min, "high": config.sampler_correction_max}
    return bind(SAMPLER_CORRECTIONS[config.sampler_correction], **bounds)


def check_objective(config: AlgorithmConfig) -> None:
    """Raises UserError for the first setting that cannot mean what it says."""
    for bad, message in _contradictions(config):
        if bad:
            raise UserError(message)


def _contradictions(config: AlgorithmConfig) -> list[tuple[bool, str]]:
    high, level = _epsilon_high(config), config.importance_sampling_level
    low_bound, high_bound = config.sampler_correction_min, config.sampler_correction_max
    return [
        (config.beta < 0, f"beta is {config.beta}; expected 0 or more"),
        (config.epsilon < 0 or high < 0, f"epsilon is {config.epsilon}, epsilon_high {high}; expected 0 or more"),
        (
            config.loss_type == "clipped" and config.epsilon >= 1,
            f"epsilon is {config.epsilon}; expected below 1, or the lower clip bound 1 - epsilon is never met",
        ),
        (
            config.delta is not None and (config.loss_type != "clipped" or config.delta <= 1 + high),
            f"delta is {config.delta}; it needs loss_type clipped and a value above 1 + epsilon_high = {1 + high:g}",
        ),
        (
            config.loss_type in ROW_LOSSES and level != "token",
            f"importance_sampling_level is {level}; loss_type {config.loss_type} reduces the row itself: use token",
        ),
        (
            config.cispo_cap <= 1,
            f"cispo_cap is {config.cispo_cap}; it bounds the ratio itself: expected above 1, e.g. 5",
        ),
        (
            min(config.sapo_temperature_pos, config.sapo_temperature_neg) <= 0,
            "sapo_temperature_pos and sapo_temperature_neg must be above 0",
        ),
        (
            config.kl_estimator == "k1" and config.beta > 0 and not config.use_bias_correction_kl,
            "kl_estimator is k1, whose gradient as a loss term has expectation 0: "
            "use k2 or k3, or set use_bias_correction_kl",
        ),
        (
            not 0 <= low_bound <= 1 <= high_bound,
            f"sampler_correction_min and _max are {low_bound} and {high_bound}; expected min <= 1 <= max",
        ),
    ]
