"""Drawn tokens against float64: the jnp twin, and the kernels' own code in Triton's interpreter or on a GPU."""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.completions import unpack
from tests.pallas_kernels.oracles import draw_errors

LAST = np.nextafter(np.float32(1), np.float32(0))
OUTSIDE, ERROR = 5e-7, 5e-6
"""What rounding may do to a cumulative sum of 1, and to a log-probability of logits of a few tens."""


@pytest.fixture(params=["twin", "kernel"])
def draw(request: pytest.FixtureRequest) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    if request.param == "twin":
        return jax.jit(pallas_kernels.draw_token, static_argnames=("temperature", "implementation"))
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, whose interpreter runs on a CPU")
    from tests.pallas_kernels import launch

    return launch.draw_token


def check(draw, logits: np.ndarray, uniform: np.ndarray, temperature: float = 1.0, **how) -> np.ndarray:
    """The tokens, after the comparison with float64."""
    logits, uniform = np.ascontiguousarray(logits, np.float32), uniform.astype(np.float32)
    token, logprob = (np.asarray(part) for part in draw(logits, uniform, temperature=temperature, **how))
    assert token.dtype == np.int32
    outside, error = draw_errors(logits, uniform, temperature, token, logprob)
    assert outside < OUTSIDE
    assert error < ERROR
    return token


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("vocab", [1, 7, 1000, 4096, 4097, 50_000])
def test_tokens_and_logprobs(draw, vocab: int, rows: int, temperature: float) -> None:
    rng = np.random.default_rng(vocab + rows)
    for uniform in (rng.uniform(size=rows), np.zeros(rows), np.full(rows, LAST)):
        check(draw, rng.normal(0, 3, (rows, vocab)), uniform, temperature)


@pytest.mark.parametrize("block", [128, 512, 4096])
def test_other_blocks(block: int) -> None:
    launch = pytest.importorskip("tests.pallas_kernels.launch", exc_type=ImportError)
    rng = np.random.default_rng(block)
    check(launch.draw_token, rng.normal(0, 3, (5, 5000)), rng.uniform(size=5), block=block)


def test_boundaries_between_tokens_and_blocks(draw) -> None:
    """Equal logits have boundaries that floats hold: there, the token that begins is drawn."""
    vocab = 8192
    chosen = np.array([0, 1, 2047, 2048, 2049, 4095, 4096, 6144, 8191])
    logits = np.zeros((len(chosen), vocab))
    np.testing.assert_array_equal(check(draw, logits, chosen / vocab), chosen)
    below = np.nextafter(np.float32((chosen + 1) / vocab), np.float32(0))
    np.testing.assert_array_equal(check(draw, logits, below), chosen)


def test_no_token_without_probability_is_drawn(draw) -> None:
    """-inf in whole blocks, at both ends and between the others, and quantiles that rounding could put there."""
    vocab = 9000
    logits = np.full(vocab, -np.inf)
    possible = np.array([2100, 2101, 2200, 6200, 6300, 6301])
    logits[possible] = np.linspace(-3, 3, len(possible))
    p = np.exp(logits[possible])
    edges = np.float32(np.cumsum(p) / p.sum()).clip(0, LAST)
    around = [np.nextafter(edges, np.float32(side)) for side in (-1, 2)]
    uniform = np.concatenate([np.linspace(0, 1, 20, endpoint=False), [LAST], edges, *around]).clip(0, LAST)
    token = check(draw, np.broadcast_to(logits, (len(uniform), vocab)), uniform)
    assert set(token) == set(possible)


@pytest.mark.parametrize("place", [0, 2047, 2048, 4999])
def test_a_row_with_one_dominant_token(draw, place: int) -> None:
    """The others' weights, of which a float holds the largest only, are the tail behind it."""
    logits = np.random.default_rng(place).normal(-200, 20, (4, 5000))
    logits[:, place] = 60.0
    np.testing.assert_array_equal(check(draw, logits, np.array([0, 1e-3, 0.5, LAST])), place)


def test_large_logits(draw) -> None:
    """Sums are relative to the largest logit, so that nothing overflows; a float of that size has no finer steps than 2^-8."""
    logits = np.random.default_rng(0).integers(-8, 8, (5, 5000)) + 40_000.0
    check(draw, logits, np.linspace(0, LAST, 5))


def test_numbers_of_many_steps(draw) -> None:
    rng = np.random.default_rng(1)
    logits, numbers = np.float32(rng.normal(size=(3, 3000))), np.float32(rng.uniform(size=(4, 3)))
    for step in range(4):
        want = draw(logits, numbers[step], temperature=0.7)
        for got, part in zip(draw(logits, numbers, temperature=0.7, step=step), want, strict=True):
            np.testing.assert_array_equal(got, part)


def test_a_row_does_not_depend_on_the_others(draw) -> None:
    rng = np.random.default_rng(2)
    logits, uniform = np.float32(rng.normal(size=(5, 3000))), np.float32(rng.uniform(size=5))
    together = draw(logits, uniform, temperature=1.0)
    for row in range(5):
        alone = draw(logits[row : row + 1], uniform[row : row + 1], temperature=1.0)
        for got, part in zip(alone, together, strict=True):
            np.testing.assert_array_equal(got[0], part[row])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_rows_that_have_no_distribution(draw) -> None:
    """Token 0 with log-probability NaN, and their neighbours are not touched."""
    logits = np.random.default_rng(3).normal(size=(5, 5000)).astype(np.float32)
    logits[0, 3000] = np.nan
    logits[1, 4999] = np.inf
    logits[2] = -np.inf
    logits[3, :] = np.nan
    token, logprob = (np.asarray(part) for part in draw(logits, np.full(5, 0.7, np.float32), temperature=1.0))
    np.testing.assert_array_equal(token[:4], 0)
    np.testing.assert_array_equal(np.isnan(logprob), [True, True, True, True, False])


def test_samples_follow_the_distribution(draw) -> None:
    """Chi-square over the whole vocabulary, of blocks of 2,048 and a part of one."""
    vocab, draws, temperature = 2500, 800, 0.8
    rng = np.random.default_rng(4)
    logits = np.float32(np.where(np.arange(vocab) % 100 == 7, rng.normal(0, 1, vocab), -np.inf))
    uniform = np.float32(rng.uniform(size=draws)).clip(0, LAST)
    token, _ = draw(np.tile(logits, (draws, 1)), uniform, temperature=temperature)
    p = np.exp(logits.astype(np.float64) / temperature)
    counts = np.bincount(np.asarray(token), minlength=vocab)
    assert counts[p == 0].sum() == 0
    assert scipy.stats.chisquare(counts[p > 0], p[p > 0] / p.sum() * draws).pvalue > 1e-3


@pytest.mark.parametrize("stop_ids", [(), (3,), (5, 1, 11)])
@pytest.mark.parametrize("record", ["twin", "kernel"])
def test_record(record: str, stop_ids: tuple[int, ...]) -> None:
    """What `draw_token` draws, rows that are done masked, and every other step's entry left as it was."""
    op: Callable = pallas_kernels.draw_and_record
    if record == "kernel":
        op = pytest.importorskip("tests.pallas_kernels.launch", exc_type=ImportError).draw_and_record
    rng, rows, step, pad = np.random.default_rng(5), 40, 2, 7
    logits, uniform = np.float32(rng.normal(size=(rows, 12))), np.float32(rng.uniform(size=(4, rows)))
    before = rng.integers(-9, 9, (4, 4, rows), dtype=np.int32)
    remaining = rng.integers(0, 3, rows, dtype=np.int32)
    completions, ends = pallas_kernels.Completions(before, remaining), pallas_kernels.Ends(stop_ids, pad)
    token, got = op(logits, uniform, completions, temperature=0.9, step=step, ends=ends)
    drawn, logprob = pallas_kernels.draw_token(logits, uniform, temperature=0.9, step=step)
    live = remaining > 0
    stops = live & np.isin(drawn, stop_ids)
    want = [np.where(live, drawn, pad), np.where(live, logprob, 0), 0 * logprob, live, stops]
    *exact, got_logprob = (np.asarray(unpack(jnp.asarray(got.packed[step]))[field]) for field in (0, 2, 3, 4, 1))
    for part, expected in zip((token, *exact), (want[0], want[0], *want[2:]), strict=True):
        np.testing.assert_array_equal(part, expected)
    np.testing.assert_allclose(got_logprob, want[1], atol=ERROR)
    np.testing.assert_array_equal(got.remaining, np.where(stops | ~live, 0, remaining - 1))
    others = np.arange(4) != step
    np.testing.assert_array_equal(np.asarray(got.packed)[others], before[others])


def test_arguments_that_do_not_fit_are_refused() -> None:
    logits, uniform = jnp.ones((2, 24)), jnp.ones((2,))
    for arguments, message in [
        (dict(logits=logits[0]), "an entry at least"),
        (dict(uniform=jnp.ones((3,))), r"want uniform \[2\]"),
        (dict(step=0), r"want uniform \[T, 2\]"),
        (dict(uniform=jnp.ones((4, 2))), r"want uniform \[2\]"),
        (dict(temperature=0.0), "positive"),
        (dict(implementation="triton"), "cannot run"),
        (dict(implementation="mosaic"), "unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            pallas_kernels.draw_token(**dict(logits=logits, uniform=uniform, temperature=1.0) | arguments)
    completions = pallas_kernels.Completions(jnp.zeros((3, 4, 2), jnp.int32), jnp.ones(2, jnp.int32))
    ends = pallas_kernels.Ends((), 0)
    with pytest.raises(ValueError, match="completions must be"):
        pallas_kernels.draw_and_record(logits, jnp.ones((4, 2)), completions, temperature=1.0, step=0, ends=ends)


def test_rule() -> None:
    hopper = dispatch.Device("gpu", (9, 0), True, "NVIDIA H200")
    assert dispatch.draw_token_problem(hopper, jnp.float32) is None
    assert "bfloat16" in str(dispatch.draw_token_problem(hopper, jnp.bfloat16))
    assert "jax-triton" in str(dispatch.draw_token_problem(dispatch.Device("gpu", (9, 0)), jnp.float32))
    assert "7.5" in str(dispatch.draw_token_problem(dispatch.Device("gpu", (7, 5), True), jnp.float32))
    assert "'cpu'" in str(dispatch.draw_token_problem(dispatch.Device("cpu"), jnp.float32))
