"""One token for every row of hidden states, drawn by logits that are rounded and corrected to those of the head itself.

The rounded logits, those of a head in 8 bits say, make a proposal q, from which K candidates are drawn; only of these is the exact
logit computed, hidden · head[candidate]. Of the candidates one is kept by a chain of Metropolis and Hastings (Tierney 1994,
doi:10.1214/aos/1176325750, the independence chain), which starts at the first:

    r = (exact - proposed) / temperature            held = candidate with probability min(1, exp(r[candidate] - r[held]))

Its tokens follow p = softmax(exact / temperature) up to an error that every further candidate multiplies by about max |r|: with
logits off by 0.0075 (six tokens, exact sums), q is off by 0.011 at its worst token, in log-probability, and K = 4 by 1e-8.
Resampling the candidates with weights exp(r) leaves 1 / K of it, 0.0026.

    log-probability = exact / temperature - log Z        Z = Z of q + Σ of the distinct candidates (exp(exact / temperature) - exp(proposed / temperature))

In a peaked distribution the probable tokens are among the candidates and Z is exact; in a flat one the errors of the others cancel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels import dispatch
from pallas_kernels.completions import Completions, Ends, check_shapes, record
from pallas_kernels.inverse_cdf import Total, tokens_at
from pallas_kernels.reference import take_layer

CANDIDATES = 4
"""K where nothing else is said. The draw would do with two; Z is the better for more."""


def numbers_a_token(candidates: int = CANDIDATES) -> int:
    """Random numbers that a draw takes: one for each candidate, and one for each choice between two."""
    return 2 * candidates - 1


def draw_corrected(
    proposal: Float32[Array, "M V"],
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    uniform: Float32[Array, "*T M N"],
    *,
    temperature: float,
    step: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> tuple[Int32[Array, " M"], Float32[Array, " M"]]:
    """(token, log-probability under softmax(hidden · headᵀ / temperature)) of every row.

    No token of probability 0 is drawn. Implementations may differ where a number is within rounding of a boundary. A row whose
    proposal has a NaN, +inf or nothing but -inf gives token 0 and NaN; so does one whose candidates have a NaN, +inf or
    nothing but -inf for exact logits.

    Args:
      proposal: logits that are close to the exact ones.
      hidden: the rows, in the type that is computed in; exact logits are summed in float32.
      head: the output matrix; it takes the rows' type.
      uniform: numbers in [0, 1), N = 2K - 1 a row (`numbers_a_token`): K for the candidates, then those of the choices. With
        `step`, those of T steps, of which that step's are taken.
      temperature: divides the logits; positive.
      implementation: "reference", "triton", or None for the rule in `dispatch.py`.

    Raises:
      ValueError: shapes do not fit, `temperature` is not positive, or the named implementation cannot run here.
    """
    given = proposal, hidden, head, uniform
    _check_arguments("draw_corrected", *given, temperature, step)
    if _chosen("draw_corrected", implementation, *given) == dispatch.TRITON:
        from pallas_kernels.draw_corrected_triton import draw_corrected as fused

        return fused(*given, float(temperature), step if step is None else jnp.asarray(step, jnp.int32))
    return reference(*given, temperature, step)


def draw_corrected_and_record(
    proposal: Float32[Array, "M V"],
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    uniform: Float32[Array, "T M N"],
    completions: Completions,
    *,
    temperature: float,
    step: Int[Array, ""] | int,
    ends: Ends,
    implementation: str | None = None,
) -> tuple[Int32[Array, " M"], Completions]:
    """`draw_corrected` and `completions.record` of what it draws at `step`, with a `log_kept` of 0, in no more kernels than the draw.

    (The tokens, of rows that are done the pad token, and the completions.) Arguments and errors are those of the two.
    """
    given = proposal, hidden, head, uniform
    _check_arguments("draw_corrected_and_record", *given, temperature, step)
    check_shapes("draw_corrected_and_record", completions, len(uniform), len(proposal))
    if _chosen("draw_corrected_and_record", implementation, *given) == dispatch.TRITON:
        from pallas_kernels.draw_corrected_triton import draw_corrected_and_record as fused

        return fused(*given, completions, float(temperature), jnp.asarray(step, jnp.int32), ends)
    token, logprob = reference(*given, temperature, step)
    return record(completions, step, ends, token, logprob, jnp.zeros_like(logprob))


def _chosen(name: str, implementation: str | None, proposal, hidden, head, uniform) -> str:
    given = proposal.dtype, hidden.dtype, head.dtype, (uniform.shape[-1] + 1) // 2
    problem = dispatch.draw_corrected_problem(dispatch.current_device(), *given)
    return dispatch.resolve(name, implementation, dispatch.REFERENCE if problem else dispatch.TRITON, problem)


def _check_arguments(name: str, proposal, hidden, head, uniform, temperature, step) -> None:
    if proposal.ndim != 2 or not proposal.shape[1]:
        raise ValueError(f"{name}: proposal must be [M, V] with an entry at least, got {proposal.shape}")
    rows, vocab = proposal.shape
    if hidden.ndim != 2 or hidden.shape[0] != rows or head.shape != (vocab, hidden.shape[1]):
        raise ValueError(
            f"{name}: proposal {proposal.shape} wants hidden [{rows}, D] and head [{vocab}, D], "
            f"got {hidden.shape} and {head.shape}"
        )
    if uniform.ndim != (2 if step is None else 3) or uniform.shape[-2] != rows or uniform.shape[-1] % 2 == 0:
        steps = "" if step is None else "T, "
        raise ValueError(
            f"{name}: proposal {proposal.shape} wants uniform [{steps}{rows}, 2K - 1], got {uniform.shape}"
        )
    if temperature <= 0:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}")


def reference(proposal, hidden, head, uniform, temperature, step):
    """The jnp twin of `draw_corrected`."""
    numbers = take_layer(uniform, step)
    count = (numbers.shape[-1] + 1) // 2
    logits = proposal.astype(jnp.float32) / temperature
    tokens, total = tokens_at(logits, None, numbers[:, :count])
    proposed = jnp.take_along_axis(logits, tokens, axis=-1)
    rows = head[tokens].astype(hidden.dtype)
    how: dict[str, Any] = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    exact = jnp.einsum("mkd,md->mk", rows, hidden, **how) / temperature

    ratio = exact - proposed
    place, held = jnp.zeros(len(ratio), jnp.int32), ratio[:, 0]
    for candidate in range(1, count):
        takes = numbers[:, count + candidate - 1] < jnp.exp(ratio[:, candidate] - held)
        place, held = jnp.where(takes, candidate, place), jnp.where(takes, ratio[:, candidate], held)
    valid = ~jnp.isnan(total.mass) & jnp.all(ratio < jnp.inf, axis=-1) & (held > -jnp.inf)

    largest, mass = _corrected(total, tokens, proposed, exact)
    token, logit = (jnp.take_along_axis(part, place[:, None], axis=-1)[:, 0] for part in (tokens, exact))
    return jnp.where(valid, token, 0), jnp.where(valid, logit - largest - jnp.log(mass), jnp.nan)


def _corrected(
    total: Total, tokens: Int32[Array, "M K"], proposed: Float32[Array, "M K"], exact: Float32[Array, "M K"]
) -> Total:
    """The total with the candidates' exact weights in place of the proposed ones."""
    count = tokens.shape[-1]
    again = jnp.any((tokens[:, :, None] == tokens[:, None, :]) & jnp.tri(count, k=-1, dtype=bool), axis=-1)
    largest = jnp.maximum(total.largest, exact.max(-1))
    weights = (jnp.where(again, 0.0, jnp.exp(part - largest[:, None])).sum(-1) for part in (proposed, exact))
    before, after = weights
    # Rounding may leave less than nothing of the others.
    others = jnp.maximum(total.mass * jnp.exp(total.largest - largest) - before, 0.0)
    return Total(largest, others + after)
