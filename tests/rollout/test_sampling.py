"""The sampling transforms against a sorting oracle in numpy, and draws against the distribution they name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jgrpo.rollout.sampling import draw, draw_and_record, keep_threshold, truncate
from pallas_kernels import inverse_cdf
from pallas_kernels.completions import Completions, Ends, unpack
from pallas_kernels.inverse_cdf import exp_sums

SETTINGS = [
    dict(),
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=10_000),
    dict(top_p=0.9),
    dict(top_p=0.3),
    dict(top_p=1e-6),
    dict(min_p=0.1),
    dict(min_p=1.0),
    dict(top_k=20, top_p=0.8, min_p=0.02),
    dict(top_k=3, top_p=0.99, min_p=0.3),
]


@pytest.fixture(autouse=True, params=[False, True], ids=["as on a CPU", "as on a GPU"])
def _form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of the reductions run anywhere."""
    monkeypatch.setattr(inverse_cdf, "on_gpu", lambda: request.param)


def oracle(logits: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Kept tokens of one row without ties, by sorting in float64."""
    order = np.argsort(-logits)
    ranked = logits[order].astype(np.float64)
    kept = np.ones(len(ranked), bool)
    if 0 < top_k < len(ranked):
        kept[top_k:] = False
    if top_p < 1.0:
        p = np.where(kept, np.exp(ranked - ranked[0]), 0.0)
        p /= p.sum()
        kept &= np.cumsum(p) - p < top_p
    if min_p > 0.0:
        kept &= np.exp(ranked - ranked[0]) >= min_p
    mask = np.empty_like(kept)
    mask[order] = kept
    return mask


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [2, 7, 100, 1009])
def test_truncate_keeps_what_a_sort_keeps(settings: dict, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal((3, 4, vocab)) * 3).astype(np.float32)
    out = np.asarray(truncate(jnp.asarray(logits), **settings))
    for row, kept in zip(logits.reshape(-1, vocab), out.reshape(-1, vocab), strict=True):
        expected = oracle(row, **settings)
        np.testing.assert_array_equal(np.isfinite(kept), expected)
        np.testing.assert_array_equal(kept[expected], row[expected])


def test_threshold_is_exact_for_extreme_and_signed_values() -> None:
    row = jnp.asarray([[3e38, 1e-30, 0.0, -0.0, -1e-30, -2.0, -3e38, -jnp.inf]])
    for k in range(1, 8):
        threshold = float(keep_threshold(row, top_k=k)[0])
        assert threshold == np.sort(np.asarray(row[0]))[::-1][k - 1]


def test_exp_sums_of_ordinary_and_empty_blocks() -> None:
    values = np.random.default_rng(0).normal(0, 30, (4, 5, 33)).astype(np.float32)
    values[0, 0], values[1, 1, 3:], values[2, 2, 0] = -np.inf, -np.inf, 3e38
    highest, sums = exp_sums(jnp.asarray(values))
    np.testing.assert_array_equal(highest, values.max(-1))
    wide = values.astype(np.float64)
    shift = np.where(np.isinf(values.max(-1)), 0, wide.max(-1))
    np.testing.assert_allclose(sums, np.exp(wide - shift[..., None]).sum(-1), rtol=1e-6)
    assert sums[0, 0] == 0


def test_ties_at_the_boundary_are_all_kept() -> None:
    logits = jnp.log(jnp.asarray([0.4, 0.2, 0.2, 0.1, 0.1]))
    np.testing.assert_array_equal(np.isfinite(truncate(logits, top_k=2)), [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(np.isfinite(truncate(logits, top_p=0.5)), [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(np.isfinite(truncate(logits, min_p=0.25)), [1, 1, 1, 1, 1])


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("k", [1, 4, 15, 16, 300])
def test_ties_in_many_blocks_of_the_vocabulary(k: int, top_p: float) -> None:
    """Up to k = 15 of 1009 only some blocks are searched; a tie with the last one kept lies in others too."""
    logits = np.random.default_rng(k).integers(-6, 3, (16, 1009)).astype(np.float32)
    logits[0] = -np.inf
    logits[0, ::97] = 1.0
    lowest = -np.sort(-logits)[:, k - 1 : k]
    kept = np.where(logits >= lowest, np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True)), 0)
    levels = np.unique(logits)[::-1]
    reached = [np.where(logits >= level, kept, 0).sum(-1) >= top_p * kept.sum(-1) * (1 - 1e-6) for level in levels]
    want = lowest[:, 0] if top_p == 1 else np.maximum(levels[np.argmax(reached, axis=0)], lowest[:, 0])
    np.testing.assert_array_equal(keep_threshold(jnp.asarray(logits), top_k=k, top_p=top_p), want)


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    """Of the top two, 0.5 and 0.25, the first alone is 2/3 of the mass."""
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.125, 0.125]))
    assert int(np.isfinite(truncate(logits, top_p=0.6)).sum()) == 2
    assert int(np.isfinite(truncate(logits, top_k=2, top_p=0.6)).sum()) == 1


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprob_is_that_of_the_truncated_distribution(settings: dict, temperature: float) -> None:
    key = jax.random.key(3)
    logits = jax.random.normal(key, (64, 211)) * 2
    uniform = jax.random.uniform(jax.random.fold_in(key, 1), (64,))
    drawn = draw(logits, uniform, temperature=temperature, **settings)
    truncated = jax.nn.log_softmax(truncate(logits / temperature, **settings))
    full = jax.nn.log_softmax(logits / temperature)
    rows = jnp.arange(64)
    np.testing.assert_allclose(drawn.logprob, truncated[rows, drawn.token], atol=1e-5)
    np.testing.assert_allclose(drawn.logprob + drawn.log_kept, full[rows, drawn.token], atol=1e-5)
    assert np.all(np.isfinite(drawn.logprob))
    assert np.all(np.asarray(drawn.log_kept) <= 1e-6)


def chi_square_p(settings: dict, temperature: float, drawn_at: float, vocab: int = 37, draws: int = 40_000) -> float:
    """p-value of draws at temperature `drawn_at` against the distribution at `temperature`."""
    logits = jax.random.normal(jax.random.key(0), (vocab,)) * 1.5
    uniform = jax.random.uniform(jax.random.key(1), (draws,))
    token = draw(jnp.broadcast_to(logits, (draws, vocab)), uniform, temperature=drawn_at, **settings).token
    probability = np.asarray(jax.nn.softmax(truncate(logits / temperature, **settings)), np.float64)
    counts = np.bincount(np.asarray(token), minlength=vocab)
    assert counts[probability == 0].sum() == 0
    kept = probability > 0
    expected = probability[kept] / probability[kept].sum() * draws
    return scipy.stats.chisquare(counts[kept], expected).pvalue


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("settings", [dict(), dict(top_k=8), dict(top_p=0.8), dict(min_p=0.05)], ids=str)
def test_samples_follow_the_distribution(settings: dict, temperature: float) -> None:
    assert chi_square_p(settings, temperature, drawn_at=temperature) > 1e-3


def test_the_chi_square_test_notices_a_wrong_temperature() -> None:
    assert chi_square_p({}, temperature=1.0, drawn_at=1.05) < 1e-3


def test_every_quantile_falls_on_a_kept_token() -> None:
    """Rounding at block borders, at 0 and just below 1 must not select a token of probability 0."""
    vocab = 150
    logits = jnp.where(jnp.arange(vocab) % 13 == 12, 0.0, -jnp.inf)
    uniform = jnp.concatenate([jnp.linspace(0, 1, 500, endpoint=False), jnp.asarray([np.nextafter(np.float32(1), 0)])])
    drawn = draw(jnp.broadcast_to(logits, (len(uniform), vocab)), uniform)
    assert set(np.asarray(drawn.token).tolist()) == set(range(12, vocab, 13))
    assert np.all(np.isfinite(drawn.logprob))


def test_temperature_zero_is_the_argmax() -> None:
    logits = jax.random.normal(jax.random.key(2), (5, 50))
    drawn = draw(logits, jnp.full((5,), 0.999), temperature=0.0, top_k=7)
    np.testing.assert_array_equal(drawn.token, jnp.argmax(logits, -1))
    np.testing.assert_array_equal(drawn.logprob, 0.0)
    np.testing.assert_allclose(drawn.log_kept, jax.nn.log_softmax(logits).max(-1), atol=1e-6)


def test_top_k_one_is_the_argmax_at_any_temperature() -> None:
    logits = jax.random.normal(jax.random.key(4), (64, 50))
    uniform = jax.random.uniform(jax.random.key(5), (64,))
    drawn = draw(logits, uniform, temperature=3.0, top_k=1)
    np.testing.assert_array_equal(drawn.token, jnp.argmax(logits, -1))
    np.testing.assert_allclose(drawn.logprob, 0.0, atol=1e-6)


@pytest.mark.parametrize("settings", [dict(), dict(top_p=0.9), dict(temperature=0.0)], ids=str)
def test_a_step_records_what_its_own_numbers_draw(settings: dict) -> None:
    logits = jax.random.normal(jax.random.key(6), (12, 50))
    numbers = jax.random.uniform(jax.random.key(7), (5, 12))
    completions = Completions(jnp.zeros((5, 4, 12), jnp.int32), jnp.ones(12, jnp.int32))
    for step in (0, 3):
        token, got = draw_and_record(logits, numbers, completions, jnp.int32(step), Ends((), 0), **settings)
        want = draw(logits, numbers[step], **settings)
        np.testing.assert_array_equal(token, want.token)
        for part, expected in zip(unpack(got.packed[step]), want, strict=False):
            np.testing.assert_array_equal(part, expected)
