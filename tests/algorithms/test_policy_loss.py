"""The composed loss: golden values and gradients, microbatch invariance, and batches with nothing in them."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms import objective_from_config, policy_loss
from jgrpo.algorithms.aggregation import AGGREGATIONS
from jgrpo.algorithms.masks import top_entropy_mask
from jgrpo.algorithms.registry import LOSSES
from jgrpo.config import AlgorithmConfig
from tests.algorithms import oracle

BASE = AlgorithmConfig(aggregation="grpo")
SETTINGS = {
    "clipped": {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None},
    "cispo": {"cap": 5.0},
    "sapo": {"temperature_pos": 1.0, "temperature_neg": 1.05},
    "vespo": {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0},
    "gmpo": {"epsilon_low": 0.2, "epsilon_high": 0.2},
}
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def make(**changes):
    return objective_from_config(dataclasses.replace(BASE, **changes))


def inputs(batch, objective, *, everything=True):
    """Positional and keyword arguments of `policy_loss` after `logprobs`, as jax arrays."""
    mask = jnp.asarray(batch.mask)
    weights = objective.aggregation(mask, batch.ell.shape[-1], None)
    positional = (jnp.asarray(batch.old), jnp.asarray(batch.advantages), mask, weights)
    keywords = {
        "ref_logprobs": jnp.asarray(batch.ref),
        "sampler_logprobs": jnp.asarray(batch.sampler),
        "entropy": jnp.asarray(batch.entropy),
    }
    return positional, keywords if everything else {}


def value_and_grad(batch, objective, **extra):
    positional, keywords = inputs(batch, objective)
    return jax.value_and_grad(lambda ell: policy_loss(ell, *positional, objective, **keywords, **extra)[0])(
        jnp.asarray(batch.ell)
    )


def check_against_oracle(batch, kind, changes, options, **extra):
    objective = make(loss_type=kind, **changes)
    loss, gradient = value_and_grad(batch, objective, **extra)
    weights = oracle.weights("grpo", batch.mask, batch.ell.shape[-1])
    formula = partial(oracle.total_loss, batch, weights, SETTINGS[kind], kind, **options)
    np.testing.assert_allclose(loss, formula(), rtol=1e-9)
    expected = oracle.finite_difference(lambda ell: formula(ell=ell), batch.ell)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_sampler_corrections(kind, correction):
    batch = oracle.random_batch(0, questions=2, generations=3, length=4)
    options = {"correction": correction, "bounds": (0.7, 1.3)}
    changes = {"sampler_correction": correction, "sampler_correction_min": 0.7, "sampler_correction_max": 1.3}
    check_against_oracle(batch, kind, changes, options)


@pytest.mark.parametrize(
    ("kl", "times_ratio"), [("k2", False), ("k3", False), ("k1", True), ("k2", True), ("k3", True)]
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_kl_term(kl, level, times_ratio):
    batch = oracle.random_batch(1, questions=2, generations=3, length=4)
    changes = {"beta": 0.3, "kl_estimator": kl, "use_bias_correction_kl": times_ratio}
    options = {"beta": 0.3, "kl": kl, "kl_times_ratio": times_ratio, "level": level}
    check_against_oracle(batch, "clipped", changes | {"importance_sampling_level": level}, options)


def test_everything_at_once():
    batch = oracle.random_batch(2, questions=2, generations=3, length=4)
    token_mask = np.random.default_rng(3).random(batch.mask.shape) < 0.5
    changes = {
        "importance_sampling_level": "sequence_token",
        "beta": 0.2,
        "entropy_coef": 0.05,
        "off_policy_mask_threshold": 0.1,
        "sampler_correction": "token_truncate",
    }
    options = {
        "level": "sequence_token",
        "beta": 0.2,
        "entropy_coef": 0.05,
        "off_policy_threshold": 0.1,
        "correction": "token_truncate",
        "bounds": (0.5, 2.0),
        "token_mask": token_mask,
    }
    check_against_oracle(batch, "clipped", changes, options, token_mask=jnp.asarray(token_mask))


def test_entropy_bonus_has_a_gradient_in_entropy_only_by_its_coefficient():
    batch = oracle.random_batch(4)
    objective = make(entropy_coef=0.1)
    positional, keywords = inputs(batch, objective)
    del keywords["entropy"]

    def function(entropy, coefficient):
        ell = jnp.asarray(batch.ell)
        return policy_loss(ell, *positional, objective, entropy=entropy, entropy_coef=coefficient, **keywords)[0]

    for coefficient in (None, 0.3):
        gradient = jax.grad(function)(jnp.asarray(batch.entropy), coefficient)
        np.testing.assert_allclose(gradient, -(coefficient or 0.1) * positional[3], rtol=1e-12)


@partial(jax.jit, static_argnames=("objective", "size"))
def accumulated(rows, named, objective, size):
    """Loss and gradient summed over microbatches of `size` rows."""

    def part(start):
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        ell, *rest = map(cut, rows)
        others = {name: cut(a) for name, a in named.items()}
        return jax.value_and_grad(lambda x: policy_loss(x, *rest, objective, **others)[0])(ell)

    losses, gradients = jax.lax.map(part, jnp.arange(0, rows[0].shape[0], size))
    return losses.sum(), gradients.reshape(rows[0].shape)


EXTRAS = {
    "beta": 0.1,
    "entropy_coef": 0.01,
    "off_policy_mask_threshold": 0.2,
    "sampler_correction": "sequence_truncate",
}


def with_extras(batch, kind, aggregation="grpo", size=None):
    """`accumulated` with every term switched on, which compiles once for each loss and size."""
    objective = make(loss_type=kind, **EXTRAS)
    positional, keywords = inputs(batch, objective)
    weights = AGGREGATIONS[aggregation](positional[2], batch.ell.shape[-1], None)
    rows = [a.reshape(-1, *a.shape[2:]) for a in (jnp.asarray(batch.ell), *positional[:3], weights)]
    named = {name: a.reshape(-1, a.shape[-1]) for name, a in keywords.items()}
    loss, gradient = accumulated(rows, named, objective, size or len(rows[0]))
    return float(loss), np.asarray(gradient).reshape(batch.ell.shape)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_split_into_microbatches_does_not_change_the_gradient(kind):
    batch = oracle.random_batch(5)
    for aggregation in AGGREGATIONS:
        whole_loss, whole = with_extras(batch, kind, aggregation)
        for size in (1, 4):
            loss, gradient = with_extras(batch, kind, aggregation, size)
            np.testing.assert_allclose(loss, whole_loss, rtol=1e-12)
            np.testing.assert_allclose(gradient, whole, rtol=1e-12, atol=1e-15)
        assert np.abs(whole).max() > 1e-4


@pytest.mark.parametrize("kind", LOSSES)
def test_masked_positions_may_hold_anything(kind):
    clean = with_extras(oracle.random_batch(6), kind)
    for garbage in (np.nan, np.inf, -np.inf, 1e30):
        dirty = oracle.random_batch(6)
        for name in ("ell", "old", "ref", "sampler", "entropy"):
            getattr(dirty, name)[~dirty.mask] = garbage
        loss, gradient = with_extras(dirty, kind)
        assert loss == clean[0]
        np.testing.assert_array_equal(gradient, clean[1])
        assert (gradient[~dirty.mask] == 0).all()


@pytest.mark.parametrize(("kind", "aggregation"), [*itertools.product(LOSSES, AGGREGATIONS)])
def test_nothing_in_the_loss_is_loss_zero_and_gradient_zero(kind, aggregation):
    batch = oracle.random_batch(7)
    batch.mask[:] = False
    loss, gradient = with_extras(batch, kind, aggregation)
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", LOSSES)
def test_random_masks_give_finite_gradients_inside_the_mask_only(kind, seed):
    rng = np.random.default_rng(seed)
    batch = oracle.random_batch(seed)
    batch.mask = rng.random(batch.mask.shape) < rng.choice([0.05, 0.3, 1.0])
    batch.old = batch.ell + rng.normal(0, 30, batch.ell.shape)
    loss, gradient = with_extras(batch, kind, "bnpo")
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert (gradient[~batch.mask] == 0).all()


def test_zero_advantages_move_nothing():
    batch = oracle.random_batch(8)
    batch.advantages[:] = 0
    for kind in LOSSES:
        loss, gradient = value_and_grad(batch, make(loss_type=kind))
        assert float(loss) == 0
        assert (np.asarray(gradient) == 0).all()


def test_first_step_has_ratio_one_exactly_and_the_terms_say_so():
    batch = oracle.random_batch(9)
    objective = make(beta=0.1)
    positional, _ = inputs(batch, objective)
    ell = jnp.asarray(batch.ell, jnp.float32)
    keywords = {"ref_logprobs": ell, "sampler_logprobs": ell, "entropy": ell}
    _, terms = policy_loss(ell, jax.lax.stop_gradient(ell), *positional[1:], objective, **keywords)
    assert (np.asarray(terms["ratio"]) == 1).all()
    assert (np.asarray(terms["kl"]) == 0).all()
    assert (np.asarray(terms["sampler_log_ratio"]) == 0).all()
    assert not terms["clipped_low"].any()
    assert not terms["clipped_high"].any()


@pytest.mark.parametrize("kind", LOSSES)
def test_the_old_policy_carries_no_gradient_even_if_it_is_the_same_array(kind):
    batch = oracle.random_batch(9)
    objective = make(loss_type=kind)
    positional, _ = inputs(batch, objective)
    ell = jnp.asarray(batch.ell)
    fixed = jax.grad(lambda x: policy_loss(x, ell, *positional[1:], objective)[0])(ell)
    same = jax.grad(lambda x: policy_loss(x, x, *positional[1:], objective)[0])(ell)
    np.testing.assert_array_equal(same, fixed)
    assert np.abs(np.asarray(fixed)).max() > 1e-3


def test_terms_carry_no_gradient_and_optional_ones_are_absent():
    batch = oracle.random_batch(10)
    objective = make()
    positional, keywords = inputs(batch, objective)
    ell = jnp.asarray(batch.ell)
    gradient = jax.grad(lambda x: policy_loss(x, *positional, objective, **keywords)[1]["kl"].sum())(ell)
    assert (np.asarray(gradient) == 0).all()
    _, terms = policy_loss(ell, *positional, objective)
    assert set(terms) == {"ratio", "clipped_low", "clipped_high"}


def test_a_reference_at_beta_zero_is_reported_and_changes_nothing():
    batch = oracle.random_batch(11)
    objective = make()
    positional, keywords = inputs(batch, objective)
    ell = jnp.asarray(batch.ell)
    with_ref, terms = policy_loss(ell, *positional, objective, **keywords)
    without, _ = policy_loss(ell, *positional, objective)
    np.testing.assert_array_equal(with_ref, without)
    assert float(terms["kl"].max()) > 0


def test_clip_terms_use_the_chosen_level_and_range():
    batch = oracle.random_batch(12)
    for level in ("token", "sequence"):
        objective = make(importance_sampling_level=level, epsilon=0.1, epsilon_high=0.15)
        positional, _ = inputs(batch, objective)
        _, terms = policy_loss(jnp.asarray(batch.ell), *positional, objective)
        for i, a in np.ndenumerate(batch.advantages):
            ratio = np.exp(oracle.log_ratios(level, batch.ell[i], batch.ell[i], batch.old[i], batch.mask[i]))
            m = batch.mask[i]
            np.testing.assert_array_equal(terms["clipped_low"][i][m], ((ratio < 0.9) & (a < 0))[m])
            np.testing.assert_array_equal(terms["clipped_high"][i][m], ((ratio > 1.15) & (a > 0))[m])


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"beta": 0.1}, "ref_logprobs"),
        ({"sampler_correction": "token_mask"}, "sampler_logprobs"),
        ({"off_policy_mask_threshold": 0.1}, "sampler_logprobs"),
        ({"entropy_coef": 0.1}, "entropy"),
    ],
)
def test_a_missing_input_is_named(changes, missing):
    batch = oracle.random_batch(13)
    objective = make(**changes)
    positional, _ = inputs(batch, objective)
    with pytest.raises(ValueError, match=missing):
        policy_loss(jnp.asarray(batch.ell), *positional, objective)


def test_arrays_of_different_shapes_are_refused():
    batch = oracle.random_batch(13)
    objective = make()
    positional, _ = inputs(batch, objective)
    with pytest.raises(AssertionError, match="different shapes"):
        policy_loss(jnp.asarray(batch.ell), *positional[:3], positional[3][..., :1], objective)


@pytest.mark.parametrize("kind", LOSSES)
def test_single_precision_is_close(kind):
    batch = oracle.random_batch(15)
    objective = make(loss_type=kind, beta=0.1)
    weights = oracle.weights("grpo", batch.mask, batch.ell.shape[-1])
    expected = oracle.total_loss(batch, weights, SETTINGS[kind], kind, beta=0.1)
    with jax.enable_x64(False):
        positional, keywords = inputs(batch, objective)
        loss, _ = policy_loss(jnp.asarray(batch.ell), *positional, objective, **keywords)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_top_entropy_mask_leaves_gradient_on_the_chosen_tokens_only():
    batch = oracle.random_batch(14)
    chosen = top_entropy_mask(jnp.asarray(batch.entropy), jnp.asarray(batch.mask), fraction=0.3)
    _, gradient = value_and_grad(batch, make(loss_type="cispo"), token_mask=chosen)
    moved = np.asarray(gradient) != 0
    nonzero = np.broadcast_to(batch.advantages[..., None] != 0, moved.shape)
    np.testing.assert_array_equal(moved, np.asarray(chosen) & nonzero)
