"""token_logprobs against float64, its gradients against autodiff of the plain formula, and its memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import token_logprobs
from tests.pallas_kernels.oracles import logprobs, random_int4, relative_error


def random_case(n, vocabulary=37, width=16, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(n, width)), dtype)
    head = jnp.asarray(rng.normal(size=(vocabulary, width)) / width**0.5, dtype)
    return hidden, head, jnp.asarray(rng.integers(0, vocabulary, n), jnp.int32)


@pytest.mark.parametrize("n", [1, 8, 13])
@pytest.mark.parametrize("chunk", [1, 5, 8, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_matches_float64(n, chunk, temperature):
    hidden, head, targets = random_case(n)
    got = token_logprobs(hidden, head, targets, temperature=temperature, chunk=chunk)
    for value, want in zip(got, logprobs(hidden, head, targets, temperature), strict=True):
        assert value.dtype == jnp.float32
        assert value.shape == (n,)
        assert relative_error(value, want) < 5e-6


def test_bfloat16_inputs_give_float32_results():
    hidden, head, targets = random_case(9, width=64, dtype=jnp.bfloat16)
    got = token_logprobs(hidden, head, targets, temperature=0.8, chunk=4)
    for value, want in zip(got, logprobs(hidden, head, targets, 0.8), strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(
            value, want, atol=2e-4, rtol=1e-4
        )  # inputs are exact; products accumulate in float32


def plain(hidden, head, targets, temperature):
    log_p = jax.nn.log_softmax(hidden @ head.T / temperature)
    return log_p[jnp.arange(len(targets)), targets], -jnp.sum(jnp.exp(log_p) * log_p, -1)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)])
@pytest.mark.parametrize("chunk", [5, 64])
def test_gradients_match_autodiff_of_the_formula(chunk, weights):
    hidden, head, targets = random_case(13, seed=1)
    g = jnp.asarray(np.random.default_rng(2).normal(size=13), jnp.float32)

    def loss(op):
        def value(hidden, head):
            logprob, entropy = op(hidden, head)
            return jnp.sum(g * (weights[0] * logprob + weights[1] * entropy))

        return jax.jit(jax.grad(value, (0, 1)))(hidden, head)

    got = loss(lambda h, w: token_logprobs(h, w, targets, temperature=0.7, chunk=chunk))
    for value, want in zip(got, loss(lambda h, w: plain(h, w, targets, 0.7)), strict=True):
        assert relative_error(value, want) < 1e-5


def test_gradient_of_one_output_only():
    hidden, head, targets = random_case(6, seed=3)
    got = jax.grad(lambda h: token_logprobs(h, head, targets)[0].sum())(hidden)
    assert relative_error(got, jax.grad(lambda h: plain(h, head, targets, 1.0)[0].sum())(hidden)) < 1e-5


def test_int4_head_is_read_and_frozen():
    rng = np.random.default_rng(4)
    packed, scales, weight = random_int4(rng, 21, 64, 32)
    hidden = jnp.asarray(rng.normal(size=(7, 64)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 21, 7), jnp.int32)
    dense = jnp.asarray(weight, jnp.float32)
    got = token_logprobs(hidden, (packed, scales), targets, chunk=3)
    assert relative_error(got[0], logprobs(hidden, weight, targets, 1.0)[0]) < 5e-6
    d_hidden = jax.grad(lambda h: token_logprobs(h, (packed, scales), targets, chunk=3)[0].sum())(hidden)
    assert relative_error(d_hidden, jax.grad(lambda h: plain(h, dense, targets, 1.0)[0].sum())(hidden)) < 1e-5
    with pytest.raises(TypeError, match="frozen"):
        jax.grad(lambda s: token_logprobs(hidden, (packed, s), targets)[0].sum())(scales)


def test_logits_of_all_positions_never_exist():
    hidden, head, targets = random_case(64, vocabulary=53)
    gradient = jax.jit(jax.grad(lambda h: token_logprobs(h, head, targets, chunk=8)[0].sum()))
    hlo = gradient.lower(hidden).compile().as_text()
    sizes = [np.prod([int(d) for d in dims.split(",")]) for dims in re.findall(r"\w+\[([\d,]+)\]", hlo)]
    assert 8 * 53 in sizes
    assert max(sizes) < 64 * 53


def test_frozen_head_gets_no_gradient_buffer():
    hidden, head, targets = random_case(16, vocabulary=71)
    jaxpr = jax.make_jaxpr(jax.grad(lambda h: token_logprobs(h, head, targets, chunk=4)[0].sum()))(hidden)
    assert not re.search(r"f32\[71,16\] = dot_general", str(jaxpr))
    trained = jax.make_jaxpr(jax.grad(lambda w: token_logprobs(hidden, w, targets, chunk=4)[0].sum()))(head)
    assert re.search(r"f32\[71,16\] = dot_general", str(trained))


def test_bad_arguments_raise():
    hidden, head, targets = random_case(4)
    with pytest.raises(ValueError, match="do not fit"):
        token_logprobs(hidden, head, targets[:2])
    with pytest.raises(ValueError, match="must be positive"):
        token_logprobs(hidden, head, targets, temperature=0.0)
    with pytest.raises(ValueError, match="must be positive"):
        token_logprobs(hidden, head, targets, vocabulary_chunk=0)
    with pytest.raises(ValueError, match="only the reference exists"):
        token_logprobs(hidden, head, targets, implementation="triton")


def test_softcap_bends_the_logits_before_the_temperature():
    hidden, head, targets = random_case(11)
    hidden, cap = 3 * hidden, 1.5

    def capped(h, w):
        z = cap * jnp.tanh(h @ w.T / cap) / 0.7
        log_p = jax.nn.log_softmax(z)
        return jnp.take_along_axis(log_p, targets[:, None], 1)[:, 0], -(jnp.exp(log_p) * log_p).sum(-1)

    def loss(function, h, w):
        logprobs, entropy = function(h, w)
        return (logprobs * jnp.arange(11)).sum() + 0.3 * entropy.sum()

    def ours(h, w):
        return token_logprobs(h, w, targets, temperature=0.7, softcap=cap, chunk=4)

    for got, want in zip(ours(hidden, head), capped(hidden, head), strict=True):
        assert relative_error(got, want) < 5e-6
    gradients = [jax.grad(loss, argnums=(1, 2))(function, hidden, head) for function in (ours, capped)]
    assert all(relative_error(got, want) < 1e-5 for got, want in zip(*gradients, strict=True))


@pytest.mark.parametrize("vocabulary", [21, 64, 97])
@pytest.mark.parametrize("entries", [1, 8, 32, 96])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_slices_of_an_int4_head_are_the_whole(vocabulary, entries, softcap):
    """Odd vocabularies, of which the last slice repeats a part; against float64 and autodiff of the whole head."""
    rng = np.random.default_rng(vocabulary + entries)
    packed, scales, weight = random_int4(rng, vocabulary, 64, 32)
    hidden, g = jnp.asarray(rng.normal(size=(13, 64)), jnp.float32), jnp.asarray(rng.normal(size=(2, 13)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocabulary, 13), jnp.int32).at[:2].set(jnp.array([0, vocabulary - 1]))
    how = dict(temperature=0.7, softcap=softcap)

    def ours(hidden):
        return token_logprobs(hidden, (packed, scales), targets, chunk=5, vocabulary_chunk=entries, **how)

    def whole(hidden):
        return token_logprobs(hidden, jnp.asarray(weight, jnp.float32), targets, **how)

    z = np.asarray(hidden, np.float64) @ weight.T
    want = logprobs(z if softcap is None else softcap * np.tanh(z / softcap), np.eye(vocabulary), targets, 0.7)
    for got, expected in zip(jax.jit(ours)(hidden), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)

    def gradient(function):
        return jax.jit(jax.grad(lambda h: jnp.vdot(g, jnp.stack(function(h)))))(hidden)

    assert relative_error(gradient(ours), gradient(whole)) < 1e-5


def test_slices_take_logits_of_any_size():
    """Logits of ±10^4, and a first slice far below the last: nothing overflows, and nothing is lost."""
    rng = np.random.default_rng(8)
    packed, scales, weight = random_int4(rng, 50, 32, 32)
    scales, weight = (
        scales * np.linspace(1, 200, 50)[:, None].astype(np.float32),
        weight * np.linspace(1, 200, 50)[:, None],
    )
    hidden, targets = jnp.asarray(rng.normal(size=(9, 32)), jnp.float32), jnp.asarray(rng.integers(0, 50, 9), jnp.int32)
    for order in (slice(None), slice(None, None, -1)):
        got = token_logprobs(hidden, (packed[order], scales[order]), targets, vocabulary_chunk=16)
        for value, want in zip(got, logprobs(hidden, weight[order], targets, 1.0), strict=True):
            np.testing.assert_allclose(value, want, atol=2e-4, rtol=1e-5)


def test_an_int4_head_is_never_whole():
    """Of 64 positions, 96 entries and width 32: slices of 16 entries, chunks of 8 positions."""
    rng = np.random.default_rng(9)
    packed, scales, _ = random_int4(rng, 96, 32, 32)
    hidden, targets = (
        jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
        jnp.asarray(rng.integers(0, 96, 64), jnp.int32),
    )

    def floats(entries):
        loss = lambda h, *head: token_logprobs(h, head, targets, chunk=8, vocabulary_chunk=entries)[0].sum()  # noqa: E731
        hlo = jax.jit(jax.grad(loss)).lower(hidden, packed, scales).compile().as_text()
        return {np.prod([int(d) for d in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", hlo)}

    assert {8 * 96, 96 * 32} <= floats(None)
    sliced = floats(16)
    assert {8 * 16, 16 * 32} <= sliced
    assert max(sliced) == 64 * 32, "hidden states and their gradient"
