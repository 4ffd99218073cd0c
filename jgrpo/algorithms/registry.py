"""The one place where the names of a configuration become functions: a table for each kind of choice.

Adding a variant is one entry here and one name in `AlgorithmConfig`.
"""

from collections.abc import Callable
from math import exp, inf

from jgrpo.algorithms import advantages, losses
from jgrpo.algorithms.aggregation import AGGREGATIONS
from jgrpo.algorithms.corrections import SAMPLER_CORRECTIONS
from jgrpo.algorithms.kl import KL_ESTIMATORS
from jgrpo.algorithms.objective import AdvantageEstimator, Bound, Objective, bind, of_functions, of_lengths, of_rewards
from jgrpo.algorithms.ratios import RATIO_LEVELS
from jgrpo.config import AlgorithmConfig
from jgrpo.errors import UserError

ADVANTAGES: dict[str, AdvantageEstimator] = {
    "gdpo": bind(of_functions, estimator=advantages.gdpo_advantages),
    "rloo": bind(of_rewards, estimator=advantages.rloo_advantages),
    "reinforce_plus_plus": bind(of_rewards, estimator=advantages.reinforce_plus_plus_advantages),
    "reinforce_plus_plus_baseline": bind(of_rewards, estimator=advantages.reinforce_plus_plus_baseline_advantages),
    "opo": bind(of_lengths, estimator=advantages.opo_advantages),
    "pass_at_k": bind(of_rewards, estimator=advantages.pass_at_k_advantages),
}
"""Estimators without settings; grpo has one. ReMax is absent: it needs a greedy completion of each prompt."""


def _advantages(config: AlgorithmConfig) -> AdvantageEstimator:
    if config.advantage_estimator == "grpo":
        return bind(of_rewards, estimator=bind(advantages.group_advantages, scale=config.scale_rewards))
    return ADVANTAGES[config.advantage_estimator]


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
        advantages=_advantages(config),
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
    correction = SAMPLER_CORRECTIONS[config.sampler_correction]
    return bind(correction, low=config.sampler_correction_min, high=config.sampler_correction_max)


def check_objective(config: AlgorithmConfig) -> None:
    """Raises UserError for the first setting that cannot mean what it says."""
    for contradicts, message in (*_ratio_rules(config), *_loss_rules(config), *_other_rules(config)):
        if contradicts:
            raise UserError(message)


Rules = list[tuple[bool, str]]


def _ratio_rules(config: AlgorithmConfig) -> Rules:
    high, delta, level = _epsilon_high(config), config.delta, config.importance_sampling_level
    return [
        (min(config.epsilon, high) < 0, f"--epsilon is {config.epsilon}, --epsilon-high {high}: expected 0 or above."),
        (
            config.loss_type == "clipped" and config.epsilon >= 1,
            f"--epsilon is {config.epsilon}: expected below 1, the ratio's lower bound is 1 - epsilon.",
        ),
        (
            delta is not None and config.loss_type != "clipped",
            f"--delta is {delta}: only --loss-type clipped has it, not {config.loss_type}. Leave it out.",
        ),
        (
            delta is not None and delta <= 1 + high,
            f"--delta is {delta}: expected above 1 + epsilon_high = {1 + high:g}, or it would replace that bound.",
        ),
        (
            config.loss_type in ROW_LOSSES and level != "token",
            f"--importance-sampling-level is {level}: --loss-type {config.loss_type} reduces the row itself. Use token.",
        ),
    ]


def _loss_rules(config: AlgorithmConfig) -> Rules:
    tau = min(config.sapo_temperature_pos, config.sapo_temperature_neg)
    k, lam = min(config.vespo_k_pos, config.vespo_k_neg), min(config.vespo_lambda_pos, config.vespo_lambda_neg)
    cap, scale, estimator = config.cispo_cap, config.scale_rewards, config.advantage_estimator
    return [
        (cap <= 1, f"--cispo-cap is {cap}: expected above 1, it bounds the ratio itself (5 in ScaleRL)."),
        (tau <= 0, f"--sapo-temperature-pos or -neg is {tau}: expected above 0."),
        (k < 0 or lam <= 0, f"--vespo-k is {k}, --vespo-lambda {lam}: expected k of 0 or above and lambda above 0."),
        (
            scale != "group" and estimator != "grpo",
            f"--scale-rewards is {scale}: only --advantage-estimator grpo has it, not {estimator}. Leave it out.",
        ),
    ]


def _other_rules(config: AlgorithmConfig) -> Rules:
    low, high = config.sampler_correction_min, config.sampler_correction_max
    return [
        (config.beta < 0, f"--beta is {config.beta}: expected 0 or above."),
        (
            config.kl_estimator == "k1" and config.beta > 0 and not config.use_bias_correction_kl,
            "--kl-estimator is k1: as a loss term its gradient has expectation 0. "
            "Use k2 or k3, or set --use-bias-correction-kl.",
        ),
        (
            not 0 <= low <= 1 <= high,
            f"--sampler-correction-min is {low}, -max {high}: expected bounds around 1, such as 0.5 and 2.",
        ),
    ]
