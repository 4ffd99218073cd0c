"""8-bit moments: the table and the codes against their definition, Adam against optax's, and what a run makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgrpo.checkpoints.train_state import Checkpoints
from jgrpo.config import OptimizerConfig
from jgrpo.training import adam8bit, grpo_step, make_optimizer
from jgrpo.training.adam8bit import (
    BLOCK,
    SMALL,
    Moment,
    as_blocks,
    dequantize_blocks,
    levels,
    quantize_blocks,
    scale_by_adam_8bit,
    state_bytes,
)
from tests.training.setup import MODEL, assert_trees_equal, batch, settings, state, tiny_base, trained_lora


def dynamic_map(signed):
    """The definition, exponent by exponent: midpoints of equal parts of [0.1, 1], times a power of ten; and 0 and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1.0, (2**exponent if signed else 2 ** (exponent + 1)) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)
        values += [*middles, *(-middles if signed else [])]
    return np.sort(values)


@pytest.mark.parametrize("signed", [True, False])
def test_levels(signed):
    assert levels(signed).shape == (256,)
    np.testing.assert_allclose(levels(signed), dynamic_map(signed), rtol=1e-6)


def moments(size, signed, seed=0):
    # Cubes of normal numbers: many orders of magnitude in a block, as squared gradients have.
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32) ** 3 * 1e-4
    return values if signed else np.abs(values)


@pytest.mark.parametrize("size", [BLOCK, 20 * BLOCK, 5000])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_levels_of_their_block(size, signed):
    values, table = moments(size, signed), dynamic_map(signed)
    got = quantize_blocks(as_blocks(jnp.asarray(values)), signed)
    assert got.codes.dtype == jnp.uint8
    padded = np.pad(values, (0, -size % BLOCK)).reshape(-1, BLOCK).astype(np.float64)
    for block, codes, absmax in zip(padded, np.asarray(got.codes).astype(int), np.asarray(got.absmax), strict=True):
        largest = np.abs(block).max()
        assert absmax == np.float32(largest)
        distances = np.abs(block[:, None] / largest - table)
        chosen, nearest = distances[np.arange(BLOCK), codes], distances.argmin(axis=1)
        kept_above_0 = (nearest == 0) & (block > 0) & (not signed)
        assert (codes[kept_above_0] == 1).all()
        assert (chosen[~kept_above_0] <= distances.min(axis=1)[~kept_above_0] + 1e-7).all()
    np.testing.assert_array_equal(dequantize_blocks(got, signed).reshape(-1)[size:], 0)


def rounded(values, signed):
    return dequantize_blocks(quantize_blocks(as_blocks(values), signed), signed).reshape(-1)[: values.size]


def test_zeros_stay_zero():
    for signed in (True, False):
        assert (rounded(jnp.zeros(300), signed) == 0).all()
        spike = jnp.zeros(600).at[5].set(-2.0 if signed else 2.0)
        np.testing.assert_allclose(rounded(spike, signed), spike, rtol=8e-3)


def test_error_of_a_second_moment_is_a_few_percent():
    values = moments(64 * BLOCK, signed=False)
    assert np.median(np.abs(rounded(jnp.asarray(values), False) - values) / values) < 0.02


PARAMS = {"matrix": jnp.ones((3, 50, 40)), "vector": jnp.ones(100)}


def gradients(step):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 2)
    return {name: jax.random.normal(key, PARAMS[name].shape) for name, key in zip(PARAMS, keys, strict=True)}


def test_first_step_is_adams_and_small_leaves_always_are():
    ours, theirs = scale_by_adam_8bit(0.9, 0.99), optax.scale_by_adam(0.9, 0.99)
    mine, other = ours.init(PARAMS), theirs.init(PARAMS)
    assert isinstance(mine.mu["matrix"], Moment)
    for step in range(20):
        got, mine = ours.update(gradients(step), mine)
        want, other = theirs.update(gradients(step), other)
        np.testing.assert_allclose(got["vector"], want["vector"], rtol=2e-6)
        if step == 0:
            np.testing.assert_allclose(got["matrix"], want["matrix"], rtol=2e-6)
    difference = got["matrix"] - want["matrix"]
    assert 0 < float(jnp.sqrt(jnp.mean(difference**2) / jnp.mean(want["matrix"] ** 2))) < 0.03


def test_chunks_do_not_matter(monkeypatch):
    results = []
    for chunk in (adam8bit.CHUNK, 4):
        monkeypatch.setattr(adam8bit, "CHUNK", chunk)
        optimizer = scale_by_adam_8bit(0.9, 0.99)
        carry = optimizer.init(PARAMS)
        for step in range(3):
            directions, carry = optimizer.update(gradients(step), carry)
        results.append((directions, carry))
    (one, first), (other, second) = results
    # Equal up to the order of rounding, which may move an element over to the next code.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, other)
    for name in ("mu", "nu"):
        codes = [np.asarray(getattr(carry, name)["matrix"].codes) for carry in (first, second)]
        assert (codes[0] == codes[1]).mean() > 0.999


def test_a_gradient_that_vanishes_makes_no_giant_step():
    """Elements whose second moment is below the smallest level: rounded to 0 they would be divided by epsilon."""
    optimizer = scale_by_adam_8bit(0.9, 0.99)
    params = jnp.zeros(SMALL)
    carry = optimizer.init(params)
    gradient = jnp.full(SMALL, 1e-5).at[::BLOCK].set(1.0)
    _, carry = optimizer.update(gradient, carry)
    directions, _ = optimizer.update(jnp.zeros(SMALL), carry)
    assert float(jnp.abs(directions).max()) < 10


def test_quadratic_converges_as_with_32_bits():
    # ½ Σ c (x − 1)² with curvatures c over four orders of magnitude.
    curvature = jnp.logspace(-2, 2, 2 * SMALL)
    losses = {}
    for bits in (32, 8):
        optimizer = make_optimizer(
            OptimizerConfig(learning_rate=0.05, lr_schedule="linear", max_grad_norm=1e9, optimizer_bits=bits), 300
        )

        def step(carry, _, optimizer=optimizer):
            x, opt_state = carry
            changes, opt_state = optimizer.update(curvature * (x - 1), opt_state, x)
            x = optax.apply_updates(x, changes)
            return (x, opt_state), 0.5 * jnp.mean(curvature * (x - 1) ** 2)

        x = jnp.zeros(2 * SMALL)
        losses[bits] = jax.jit(lambda c, step=step: jax.lax.scan(step, c, length=300))((x, optimizer.init(x)))[1]
    assert float(losses[8][0]) == pytest.approx(float(losses[32][0]), rel=1e-5)
    assert float(losses[8][-1]) < 1e-4 * float(losses[8][0])


@pytest.mark.parametrize("size", [SMALL, SMALL + 1, 100_000])
def test_state_takes_two_bytes_a_parameter(size):
    optimizer = make_optimizer(OptimizerConfig(optimizer_bits=8), 10)
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, {"w": jnp.zeros(size), "b": jnp.zeros(7)}))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.size > 1)
    assert total == state_bytes([size, 7], 8) == 2 * (BLOCK + 4) * -(-size // BLOCK) + 8 * 7
    assert state_bytes([size, 7], 32) == 8 * (size + 7)


def large_lora():
    """An adapter most of whose leaves are stored in 8 bits."""
    wide = {
        name: {**m, "a": jnp.tile(m["a"], (1, 16, 1)), "b": jnp.tile(m["b"], (1, 1, 16))}
        for name, m in trained_lora().items()
    }
    return jax.tree.map(lambda leaf: leaf / 16, wide)


@pytest.fixture(scope="module")
def stepped():
    """(settings, optimizer, state after one step), the state to be copied before it is used."""
    config = settings(optimizer_bits=8)
    start, optimizer = state(large_lora(), config)
    assert any(
        isinstance(leaf, Moment) for leaf in jax.tree.leaves(start.opt_state, is_leaf=lambda x: isinstance(x, Moment))
    )
    how = dict(model=MODEL, optimizer=optimizer, config=config)
    return how, grpo_step(start, tiny_base(), batch(), **how)[0]


def test_skipped_update_keeps_the_state(stepped):
    how, before = stepped
    data = batch().replace(advantages=jnp.full_like(batch().advantages, jnp.nan))
    after, metrics = grpo_step(jax.tree.map(jnp.copy, before), tiny_base(), data, **how)
    assert int(metrics["updates/skipped"]) == 1
    assert_trees_equal((before.lora, before.opt_state), (after.lora, after.opt_state))


def test_resumed_run_goes_on_bit_for_bit(stepped, tmp_path):
    how, before = stepped
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, before.lora, before.replace(lora={}), {})
    shapes = jax.eval_shape(lambda: before)
    lora, rest, _ = Checkpoints(tmp_path, keep_last=1).restore(shapes.lora, shapes.replace(lora={}))
    following = [
        grpo_step(start, tiny_base(), batch(4), **how)[0]
        for start in (jax.tree.map(jnp.copy, before), rest.replace(lora=lora))
    ]
    assert_trees_equal(*(s.replace(key=jax.random.key_data(s.key)) for s in following))
