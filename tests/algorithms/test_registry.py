"""From a configuration to an objective: every name, every refusal, and value semantics for jit."""

from dataclasses import replace
from typing import get_args, get_type_hints

import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms import Scored, loss_mask, objective_from_config
from jgrpo.algorithms.advantages import REWARD_SCALES, group_advantages
from jgrpo.algorithms.aggregation import AGGREGATIONS
from jgrpo.algorithms.corrections import SAMPLER_CORRECTIONS
from jgrpo.algorithms.kl import KL_ESTIMATORS
from jgrpo.algorithms.losses import clipped_loss
from jgrpo.algorithms.ratios import RATIO_LEVELS, token_level
from jgrpo.algorithms.registry import ADVANTAGES, LOSSES
from jgrpo.config import AlgorithmConfig
from jgrpo.errors import UserError
from tests.algorithms import oracle

DEFAULT = AlgorithmConfig()
TABLES = {
    "advantage_estimator": {"grpo", *ADVANTAGES},
    "scale_rewards": REWARD_SCALES,
    "loss_type": LOSSES,
    "importance_sampling_level": RATIO_LEVELS,
    "aggregation": AGGREGATIONS,
    "kl_estimator": KL_ESTIMATORS,
    "sampler_correction": {"none", *SAMPLER_CORRECTIONS},
}
CHOICES = {name: get_args(get_type_hints(AlgorithmConfig)[name]) for name in TABLES}


@pytest.mark.parametrize("field", TABLES)
def test_the_choices_of_a_field_are_the_entries_of_its_table(field):
    assert set(CHOICES[field]) == set(TABLES[field])


def test_the_default_is_plain_grpo():
    objective = objective_from_config(DEFAULT)
    assert objective.ratio_level is token_level
    assert objective.loss.function is clipped_loss
    assert dict(objective.loss.keywords) == {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None}
    assert objective.clip_range == (0.8, 1.2)
    assert not objective.needs_reference
    assert objective.sampler_correction is None
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    advantages = objective.advantages(Scored(rewards[None], jnp.ones(1), jnp.ones((2, 3), int)))
    np.testing.assert_array_equal(advantages, group_advantages(rewards, scale="group"))


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in CHOICES.items() for v in values])
def test_equal_configurations_are_one_static_argument(field, value):
    config = replace(DEFAULT, **{field: value})
    one, other = objective_from_config(config), objective_from_config(replace(config))
    assert one == other
    assert hash(one) == hash(other)
    assert (one == objective_from_config(DEFAULT)) == (config == DEFAULT)


NAN = float("nan")
PER_FUNCTION = np.array([[[1.0, 0.0, 2.0], [NAN, 1.0, 0.0]], [[0.0, 1.0, NAN], [NAN, 3.0, 5.0]]])
LENGTHS = np.array([[1, 2, 3], [4, 5, 6]])
COMBINED = np.array([[1.0, 0.5, 2.0], [NAN, 2.5, 2.5]])
ESTIMATES = {
    "grpo": oracle.group_advantages(COMBINED, "group"),
    "gdpo": oracle.gdpo(PER_FUNCTION, [1.0, 0.5]),
    "rloo": oracle.rloo(COMBINED),
    "reinforce_plus_plus": oracle.whiten(COMBINED),
    "reinforce_plus_plus_baseline": oracle.reinforce_plus_plus_baseline(COMBINED),
    "remax": np.nan_to_num(COMBINED - np.array([[0.25], [2.0]])),
    "opo": oracle.opo(COMBINED, LENGTHS),
    "pass_at_k": oracle.pass_at_k(COMBINED),
}


@pytest.mark.parametrize("name", CHOICES["advantage_estimator"])
def test_estimators_see_combined_rewards_functions_and_lengths(name):
    greedy = jnp.asarray([0.25, 2.0])
    scored = Scored(jnp.asarray(PER_FUNCTION), jnp.asarray([1.0, 0.5]), jnp.asarray(LENGTHS), greedy_rewards=greedy)
    actual = objective_from_config(replace(DEFAULT, advantage_estimator=name)).advantages(scored)
    np.testing.assert_allclose(actual, ESTIMATES[name], atol=1e-12)


def test_loss_mask_drops_what_the_configuration_says():
    mask = jnp.ones((2, 2, 3), bool)
    terminated, rewards = jnp.asarray([[True, False], [True, True]]), jnp.asarray([[0.0, 1.0], [1.0, 1.0]])

    def rows(**changes):
        objective = objective_from_config(replace(DEFAULT, **changes))
        return loss_mask(objective, mask, terminated, rewards).any(-1).tolist()

    assert rows() == [[True, True], [True, True]]
    assert rows(mask_truncated_completions=True) == [[True, False], [True, True]]
    assert rows(filter_zero_variance=True) == [[True, True], [False, False]]
    assert rows(mask_truncated_completions=True, filter_zero_variance=True) == [[True, False], [False, False]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": -0.1}, "--beta is -0.1"),
        ({"epsilon": -0.1}, "--epsilon is -0.1"),
        ({"epsilon_high": -0.1}, "--epsilon-high -0.1"),
        ({"epsilon": 1.5}, "--epsilon is 1.5"),
        ({"delta": 1.1}, "above 1 \\+ epsilon_high = 1.2"),
        ({"delta": 3.0, "loss_type": "cispo"}, "only --loss-type clipped has it, not cispo"),
        ({"loss_type": "gmpo", "importance_sampling_level": "sequence"}, "gmpo reduces the row itself"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence_token"}, "vespo reduces the row itself"),
        ({"cispo_cap": 0.2}, "it bounds the ratio itself"),
        ({"sapo_temperature_neg": 0.0}, "is 0.0: expected above 0"),
        ({"vespo_lambda_pos": 0.0}, "lambda above 0"),
        ({"vespo_k_neg": -1.0}, "k of 0 or above"),
        ({"scale_rewards": "none", "advantage_estimator": "rloo"}, "only --advantage-estimator grpo has it, not rloo"),
        ({"kl_estimator": "k1", "beta": 0.1}, "k1: as a loss term its gradient has expectation 0"),
        ({"sampler_correction_min": 1.5}, "expected bounds around 1"),
        ({"sampler_correction_max": 0.9}, "expected bounds around 1"),
        ({"algorithm": "rloo", "advantage_estimator": "opo"}, "opo: --algorithm rloo has its own"),
        ({"algorithm": "ppo", "advantage_estimator": "rloo"}, "ppo has no group advantages"),
        ({"algorithm": "rloo", "scale_rewards": "none"}, "rloo does not scale rewards"),
        ({"algorithm": "online_dpo", "beta": 0.1}, "its weight is --preference-beta"),
        ({"preference_beta": 0.0}, "--preference-beta is 0.0"),
        ({"gae_lambda": 1.5}, "--gae-lambda 1.5"),
        ({"value_clip": 0.0}, "--value-clip 0.0"),
        ({"max_generation_batches": 0}, "--max-generation-batches 0"),
        ({"overlong_buffer": 4, "advantage_estimator": "gdpo"}, "gdpo: it normalises each reward function"),
        ({"top_entropy_quantile": 0.0}, "--top-entropy-quantile is 0.0"),
        ({"kl_target": 0.1}, "--kl-target is 0.1, --beta 0.0"),
        ({"entropy_target": 0.5, "entropy_coef": 0.1}, "--entropy-coef is 0.1: expected 0 to --entropy-coef-max 0.05"),
        ({"reference_sync_steps": 5, "reference_adapter": "a"}, "Leave one out"),
    ],
)
def test_contradictions_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        objective_from_config(replace(DEFAULT, **changes))


def test_the_kl_is_in_the_loss_or_in_the_reward():
    places = {"loss": ("grpo", False), "grpo": ("grpo", True), "rloo": ("rloo", False), "ppo": ("ppo", False)}
    for place, (algorithm, in_reward) in places.items():
        config = replace(DEFAULT, algorithm=algorithm, kl_in_reward=in_reward, beta=0.3, kl_estimator="k3")
        objective = objective_from_config(config)
        assert (objective.beta, objective.reward_beta) == ((0.3, 0.0) if place == "loss" else (0.0, 0.3))
    assert objective_from_config(replace(DEFAULT, kl_estimator="k1", kl_in_reward=True, beta=0.3)).beta == 0


def test_shaping_is_added_to_the_reward_and_missing_rewards_stay_missing():
    shaping = jnp.asarray([[-0.5, 0.0, 0.0], [0.0, 0.0, -1.0]])
    scored = Scored(jnp.asarray(PER_FUNCTION), jnp.asarray([1.0, 0.5]), jnp.asarray(LENGTHS), shaping)
    np.testing.assert_allclose(scored.rewards, COMBINED + np.asarray(shaping))


def test_remax_without_a_greedy_completion_is_refused():
    objective = objective_from_config(replace(DEFAULT, advantage_estimator="remax"))
    assert objective.needs_greedy
    with pytest.raises(ValueError, match="greedy_rewards is None"):
        objective.advantages(Scored(jnp.asarray(PER_FUNCTION), jnp.ones(2), jnp.asarray(LENGTHS)))


def test_gmpo_may_have_an_epsilon_above_one():
    objective = objective_from_config(replace(DEFAULT, loss_type="gmpo", epsilon=1.5))
    np.testing.assert_allclose(objective.clip_range, (np.exp(-1.5), np.exp(1.5)))
