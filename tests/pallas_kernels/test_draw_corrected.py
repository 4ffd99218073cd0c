"""Draws by a proposal against float64 and the exact distribution: the jnp twin, and the kernels' own code in Triton's interpreter or on a GPU."""

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
from tests.pallas_kernels.oracles import corrected_draw

LAST = np.nextafter(np.float32(1), np.float32(0))
ERROR = 1e-5
"""Of a log-probability, by rounding: a dot product of a few tens and the sums of a vocabulary."""


@pytest.fixture(params=["twin", "kernel"])
def draw(request: pytest.FixtureRequest) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    if request.param == "twin":
        return jax.jit(pallas_kernels.draw_corrected, static_argnames=("temperature", "implementation"))
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, whose interpreter runs on a CPU")
    from tests.pallas_kernels import launch

    return launch.draw_corrected


def problem(
    rows: int, vocab: int, width: int, spread: float, error: float, candidates: int = 4, seed: int = 0
) -> list[np.ndarray]:
    """(proposal, hidden, head, numbers), exact logits of that spread and a proposal with errors.

    Elements are sixteenths, which every 16-bit type holds.
    """
    rng = np.random.default_rng(seed)
    hidden, head = (np.round(16 * rng.normal(size=shape)) / 16 for shape in [(rows, width), (vocab, width)])
    head = np.round(16 * spread / width**0.5 * head) / 16
    proposal = hidden @ head.T + rng.normal(0, error, (rows, vocab))
    numbers = rng.uniform(size=(rows, pallas_kernels.numbers_a_token(candidates)))
    return [part.astype(np.float32) for part in (proposal, hidden, head, numbers.clip(0, LAST))]


def exact_logprobs(hidden: np.ndarray, head: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    z = hidden.astype(np.float64) @ head.astype(np.float64).T / temperature
    return z - np.logaddexp.reduce(z, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("rows", "vocab", "width", "candidates", "temperature"),
    [(1, 1, 16, 4, 1.0), (5, 7, 64, 2, 0.6), (3, 4097, 96, 8, 1.5), (4, 5000, 1100, 4, 1.0), (3, 2048, 48, 1, 0.8)],
)
def test_tokens_and_logprobs(draw, rows: int, vocab: int, width: int, candidates: int, temperature: float) -> None:
    for spread in (1.0, 8.0):
        given = problem(rows, vocab, width, spread, 0.3, candidates, seed=vocab)
        token, logprob = (np.asarray(part) for part in draw(*given, temperature=temperature))
        assert token.dtype == np.int32
        want, want_logprob, clear = corrected_draw(*given, temperature)
        np.testing.assert_array_equal(token[clear], want[clear])
        np.testing.assert_allclose(logprob[clear], want_logprob[clear], atol=ERROR, rtol=ERROR)
        assert clear.mean() >= 0.6


def test_samples_follow_the_exact_distribution() -> None:
    """Though the proposal is so far from it that its own samples would fail. Of the twin only: the interpreter would take minutes."""
    draw = jax.jit(pallas_kernels.draw_corrected, static_argnames=("temperature",))
    vocab, draws, temperature = 40, 4000, 0.8
    one = problem(1, vocab, 32, 1.0, 0.4, seed=3)
    numbers = np.random.default_rng(4).uniform(size=(draws, 7)).astype(np.float32).clip(0, LAST)
    p = np.exp(exact_logprobs(one[1], one[2], temperature)[0])
    wide = [np.tile(part, (draws, 1)) for part in one[:2]]

    def pvalue(token) -> float:
        return scipy.stats.chisquare(np.bincount(np.asarray(token), minlength=vocab), p * draws).pvalue

    token, _ = draw(*wide, one[2], numbers, temperature=temperature)
    assert pvalue(token) > 1e-3
    proposed, _ = draw(*wide, one[2], numbers[:, :1], temperature=temperature)
    assert pvalue(proposed) < 1e-6


@pytest.mark.parametrize(("spread", "mean", "largest"), [(0.5, 4e-4, 1e-3), (3.0, 1.2e-3, 8e-3), (24.0, 5e-4, 8e-3)])
def test_logprobs_are_close_to_the_exact_ones(draw, spread: float, mean: float, largest: float) -> None:
    """Of flat and of peaked distributions. Uncorrected, errors of 0.0075 would be 0.006, 0.006 and 0.001 on average, at most 0.03."""
    given = problem(48, 1000, 64, spread, 0.0075)
    token, logprob = (np.asarray(part) for part in draw(*given, temperature=1.0))
    want = exact_logprobs(given[1], given[2])[np.arange(48), token]
    errors = np.abs(logprob - want)
    assert errors.mean() < mean
    assert errors.max() < largest


def test_numbers_of_many_steps(draw) -> None:
    *given, numbers = problem(3, 3000, 64, 2.0, 0.1)
    many = np.random.default_rng(1).uniform(size=(4, *numbers.shape)).astype(np.float32)
    for step in range(4):
        want = draw(*given, many[step], temperature=0.7)
        got = draw(*given, many, temperature=0.7, step=step)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_allclose(got[1], want[1], atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_rows_that_have_no_distribution(draw) -> None:
    """Token 0 with log-probability NaN, and their neighbours are not touched."""
    proposal, hidden, head, numbers = problem(7, 5000, 32, 1.0, 0.1)
    proposal[0, 3000] = np.nan
    proposal[1, 4999] = np.inf
    proposal[2] = -np.inf
    hidden[3, 5] = np.nan
    hidden[4, 5] = np.inf
    proposal[5] = np.nan
    token, logprob = (np.asarray(part) for part in draw(proposal, hidden, head, numbers, temperature=1.0))
    np.testing.assert_array_equal(token[:6], 0)
    np.testing.assert_array_equal(np.isnan(logprob), [True] * 6 + [False])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_no_token_without_probability_is_drawn(draw) -> None:
    """Neither one that the proposal rules out nor one that the head does, while a candidate is left."""
    proposal, hidden, head, numbers = problem(64, 32, 16, 1.0, 0.1)
    hidden = np.abs(hidden) + 1
    proposal = hidden @ head.T
    proposal[:, 8:16] = -np.inf
    head[16:24] = -np.inf
    token, logprob = (np.asarray(part) for part in draw(proposal, hidden, head, numbers, temperature=1.0))
    lost = np.isnan(logprob)
    assert lost.mean() < 0.1  # of those whose candidates were all ruled out
    assert set(token[~lost]) <= {*range(8), *range(24, 32)}
    assert np.isfinite(logprob[~lost]).all()


@pytest.mark.parametrize("stop_ids", [(), (5, 1, 11)])
@pytest.mark.parametrize("record", ["twin", "kernel"])
def test_record(record: str, stop_ids: tuple[int, ...]) -> None:
    """What `draw_corrected` draws, rows that are done masked, and every other step's entry left as it was."""
    op: Callable = pallas_kernels.draw_corrected_and_record
    if record == "kernel":
        op = pytest.importorskip("tests.pallas_kernels.launch", exc_type=ImportError).draw_corrected_and_record
    rng, rows, step, pad = np.random.default_rng(5), 40, 2, 7
    *given, _ = problem(rows, 12, 32, 1.0, 0.1)
    numbers = np.float32(rng.uniform(size=(4, rows, pallas_kernels.numbers_a_token())))
    before = rng.integers(-9, 9, (4, 4, rows), dtype=np.int32)
    remaining = rng.integers(0, 3, rows, dtype=np.int32)
    completions, ends = pallas_kernels.Completions(before, remaining), pallas_kernels.Ends(stop_ids, pad)
    token, got = op(*given, numbers, completions, temperature=0.9, step=step, ends=ends)
    drawn, logprob = pallas_kernels.draw_corrected(*given, numbers, temperature=0.9, step=step)
    wanted_token, want = pallas_kernels.record(completions, step, ends, drawn, logprob, jnp.zeros_like(logprob))
    assert (remaining == 0).any()
    assert bool(stop_ids) == bool(unpack(want.packed[step])[4].any())
    np.testing.assert_array_equal(token, wanted_token)
    np.testing.assert_array_equal(got.remaining, want.remaining)
    parts = (unpack(jnp.asarray(packed[step])) for packed in (got.packed, want.packed))
    for field, (part, expected) in enumerate(zip(*parts, strict=True)):
        np.testing.assert_allclose(part, expected, atol=ERROR if field == 1 else 0)
    others = np.arange(4) != step
    np.testing.assert_array_equal(np.asarray(got.packed)[others], before[others])


def test_arguments_that_do_not_fit_are_refused() -> None:
    given = dict(proposal=jnp.ones((2, 24)), hidden=jnp.ones((2, 8)), head=jnp.ones((24, 8)), uniform=jnp.ones((2, 7)))
    for arguments, message in [
        (dict(proposal=jnp.ones(24)), "an entry at least"),
        (dict(hidden=jnp.ones((3, 8))), r"wants hidden \[2, D\]"),
        (dict(head=jnp.ones((23, 8))), r"head \[24, D\]"),
        (dict(uniform=jnp.ones((2, 6))), r"2K - 1\]"),
        (dict(step=0), r"uniform \[T, 2"),
        (dict(temperature=0.0), "positive"),
        (dict(implementation="triton"), "cannot run"),
    ]:
        with pytest.raises(ValueError, match=message):
            pallas_kernels.draw_corrected(**dict(temperature=1.0) | given | arguments)
    completions = pallas_kernels.Completions(jnp.zeros((3, 4, 2), jnp.int32), jnp.ones(2, jnp.int32))
    how = dict(completions=completions, temperature=1.0, step=0, ends=pallas_kernels.Ends((), 0))
    with pytest.raises(ValueError, match="completions must be"):
        pallas_kernels.draw_corrected_and_record(**given | how | dict(uniform=jnp.ones((4, 2, 7))))


def test_rule() -> None:
    hopper = dispatch.Device("gpu", (9, 0), True, "NVIDIA H200")
    full, half = jnp.float32, jnp.bfloat16
    assert dispatch.draw_corrected_problem(hopper, full, half, half, 4) is None
    assert "float32" in str(dispatch.draw_corrected_problem(hopper, full, full, full, 4))
    assert "the head" in str(dispatch.draw_corrected_problem(hopper, full, half, full, 4))
    assert "power of two" in str(dispatch.draw_corrected_problem(hopper, full, half, half, 3))
    assert "'cpu'" in str(dispatch.draw_corrected_problem(dispatch.Device("cpu"), full, half, half, 4))
