"""The one place where the names of a configuration become functions: a table for each kind of choice.

Adding a variant is one entry here and one name in `AlgorithmConfig`.
"""

from collections.abc import Callable
from math import exp, inf

from jgrpo.algorithms import advantages, losses
from jgrpo.algorithms.aggregation import AGGREGATIONS
from jgrpo.algorithms.corrections import SAMPLER_CORRECTIONS
from jgrpo.algorithms.kl import KL_ESTIMATORS
from jgrpo.algorithms.objective import (
    AdvantageEstimator,
    Bound,
    Objective,
    bind,
    of_functions,
    of_greedy,
    of_lengths,
    of_rewards,
)
from jgrpo.algorithms.preference import PREFERENCE_LOSSES
from jgrpo.algorithms.ratios import RATIO_LEVELS
from jgrpo.config import AlgorithmConfig
from jgrpo.errors import UserError

ADVANTAGES: dict[str, AdvantageEstimator] = {
    "gdpo": bind(of_functions, estimator=advantages.gdpo_advantages),
    "rloo": bind(of_rewards, estimator=advantages.rloo_advantages),
    "reinforce_plus_plus": bind(of_rewards, estimator=advantages.reinforce_plus_plus_advantages),
    "reinforce_plus_plus_baseline": bind(of_rewards, estimator=advantages.reinforce_plus_plus_baseline_advantages),
    "remax": bind(of_greedy, estimator=advantages.remax_advantages),
    "opo": bind(of_lengths, estimator=advantages.opo_advantages),
    "pass_at_k": bind(of_rewards, estimator=advantages.pass_at_k_advantages),
}
"""Estimators without settings; grpo has one."""

OWN_ESTIMATOR = {"rloo": "rloo"}
"""Algorithms whose advantage estimator is part of what they are."""

KL_IN_REWARD = ("rloo", "ppo")
"""Algorithms whose KL is always in the reward, of the completion (rloo) or of each token (ppo)."""


def estimator_of(config: AlgorithmConfig) -> str:
    """The advantage estimator's name: the algorithm's own, or the configured one."""
    return OWN_ESTIMATOR.get(config.algorithm, config.advantage_estimator)


def _advantages(config: AlgorithmConfig) -> AdvantageEstimator:
    name = estimator_of(config)
    if name == "grpo":
        return bind(of_rewards, estimator=bind(advantages.group_advantages, scale=config.scale_rewards))
    return ADVANTAGES[name]


def preference_from_config(config: AlgorithmConfig) -> Bound:
    """Loss of a pair's margin, as configured."""
    return bind(PREFERENCE_LOSSES[config.preference_loss], beta=config.preference_beta)


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
    in_reward = config.kl_in_reward or config.algorithm in KL_IN_REWARD
    return Objective(
        advantages=_advantages(config),
        ratio_level=RATIO_LEVELS[config.importance_sampling_level],
        loss=loss,
        clip_range=clip_range,
        aggregation=AGGREGATIONS[config.aggregation],
        kl_estimator=KL_ESTIMATORS[config.kl_estimator],
        beta=0.0 if in_reward else config.beta,
        reward_beta=config.beta if in_reward else 0.0,
        kl_times_ratio=config.use_bias_correction_kl,
        entropy_coef=config.entropy_coef,
        sampler_correction=_sampler_correction(config),
        correction_in_ratio=config.loss_type == "vespo",
        top_entropy=config.top_entropy_quantile,
        off_policy_threshold=config.off_policy_mask_threshold,
        drop_truncated=config.mask_truncated_completions,
        drop_zero_variance=config.filter_zero_variance,
        overlong_buffer=config.overlong_buffer,
        needs_greedy=estimator_of(config) == "remax",
    )


def _sampler_correction(config: AlgorithmConfig) -> Bound | None:
    if config.sampler_correction == "none":
        return None
    correction = SAMPLER_CORRECTIONS[config.sampler_correction]
    return bind(correction, low=config.sampler_correction_min, high=config.sampler_correction_max)


def check_objective(config: AlgorithmConfig) -> None:
    """Raises UserError for the first setting that cannot mean what it says."""
    for contradicts, message in (rule for rules in RULES for rule in rules(config)):
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
    in_reward = config.kl_in_reward or config.algorithm in KL_IN_REWARD
    return [
        (config.beta < 0, f"--beta is {config.beta}: expected 0 or above."),
        (
            config.kl_estimator == "k1" and not in_reward and config.beta > 0 and not config.use_bias_correction_kl,
            "--kl-estimator is k1: as a loss term its gradient has expectation 0. "
            "Use k2 or k3, or set --use-bias-correction-kl or --kl-in-reward.",
        ),
        (
            not 0 <= low <= 1 <= high,
            f"--sampler-correction-min is {low}, -max {high}: expected bounds around 1, such as 0.5 and 2.",
        ),
    ]


def _algorithm_rules(config: AlgorithmConfig) -> Rules:
    name, estimator, own = config.algorithm, config.advantage_estimator, OWN_ESTIMATOR.get(config.algorithm)
    groups = name in ("grpo", "rloo")
    return [
        (
            own is not None and estimator not in ("grpo", own),
            f"--advantage-estimator is {estimator}: --algorithm {name} has its own. Leave it out, or use --algorithm grpo.",
        ),
        (
            not groups and estimator != "grpo",
            f"--advantage-estimator is {estimator}: --algorithm {name} has no group advantages. Leave it out.",
        ),
        (
            (own is not None or not groups) and config.scale_rewards != "group",
            f"--scale-rewards is {config.scale_rewards}: --algorithm {name} does not scale rewards. Leave it out.",
        ),
        (
            name == "online_dpo" and (config.beta > 0 or config.kl_in_reward),
            f"--beta is {config.beta}: online_dpo's loss holds the reference itself; its weight is --preference-beta.",
        ),
        (config.preference_beta <= 0, f"--preference-beta is {config.preference_beta}: expected above 0."),
        (
            min(config.gae_gamma, config.gae_lambda) < 0 or max(config.gae_gamma, config.gae_lambda) > 1,
            f"--gae-gamma is {config.gae_gamma}, --gae-lambda {config.gae_lambda}: expected 0 to 1.",
        ),
        (
            config.value_coef <= 0 or config.value_clip <= 0,
            f"--value-coef is {config.value_coef}, --value-clip {config.value_clip}: expected above 0.",
        ),
    ]


def _shaping_rules(config: AlgorithmConfig) -> Rules:
    estimator = estimator_of(config)
    shaped = config.overlong_buffer > 0 or (config.kl_in_reward and config.beta > 0)
    return [
        (
            config.overlong_buffer < 0 or config.max_generation_batches < 1,
            f"--overlong-buffer is {config.overlong_buffer}, --max-generation-batches {config.max_generation_batches}: "
            "expected at least 0 and at least 1.",
        ),
        (
            shaped and estimator == "gdpo",
            "--advantage-estimator is gdpo: it normalises each reward function, and --overlong-buffer and --kl-in-reward "
            "are none. Use the reward function soft_overlong, or a KL term in the loss.",
        ),
        (
            not 0 < config.top_entropy_quantile <= 1,
            f"--top-entropy-quantile is {config.top_entropy_quantile}: expected above 0 and at most 1.",
        ),
    ]


def _controller_rules(config: AlgorithmConfig) -> Rules:
    target, aim = config.kl_target, config.entropy_target
    return [
        (
            target is not None and (target <= 0 or config.beta <= 0 or config.kl_horizon < 1),
            f"--kl-target is {target}, --beta {config.beta}, --kl-horizon {config.kl_horizon}: expected all above 0, "
            "since beta is multiplied until the KL meets the target.",
        ),
        (
            aim is not None and not 0 <= config.entropy_coef <= config.entropy_coef_max,
            f"--entropy-coef is {config.entropy_coef}: expected 0 to --entropy-coef-max {config.entropy_coef_max}.",
        ),
        (
            config.entropy_coef_step <= 0,
            f"--entropy-coef-step is {config.entropy_coef_step}: expected above 0.",
        ),
        (
            config.reference_sync_steps < 0,
            f"--reference-sync-steps is {config.reference_sync_steps}: expected 0 or above.",
        ),
        (
            config.reference_sync_steps > 0 and config.reference_adapter is not None,
            "--reference-sync-steps and --reference-adapter: a reference is either synced or an adapter that stays. "
            "Leave one out.",
        ),
    ]


RULES = (_ratio_rules, _loss_rules, _other_rules, _algorithm_rules, _shaping_rules, _controller_rules)
