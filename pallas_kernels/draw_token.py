"""One token for every row of logits, and its log-probability under softmax(logits / temperature).

    token = min {t : F(t) > uniform}, F the cumulative distribution        logprob = (logit - largest) / temperature - log(mass)

In plain XLA this reads the logits once and is eight kernels, of which all but the first are short chains of reductions.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Int32

from pallas_kernels import dispatch
from pallas_kernels.completions import Completions, Ends, check_shapes, record
from pallas_kernels.inverse_cdf import draw_kept
from pallas_kernels.reference import take_layer


def draw_token(
    logits: Float32[Array, "M V"],
    uniform: Float32[Array, "*T M"],
    *,
    temperature: float,
    step: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> tuple[Int32[Array, " M"], Float32[Array, " M"]]:
    """(token, log-probability) of every row, drawn with its number in [0, 1).

    No token of probability 0 is drawn, whatever rounding does. Implementations may differ where `uniform` is within rounding of a
    boundary between two tokens. A row with a NaN, with +inf or with nothing but -inf gives token 0 and NaN.

    Args:
      uniform: the rows' numbers, or with `step` those of T steps, of which that step's are taken.
      temperature: divides the logits; positive.
      implementation: "reference", "triton", or None for the rule in `dispatch.py`.

    Raises:
      ValueError: shapes do not fit, `temperature` is not positive, or the named implementation cannot run here.
    """
    _check_arguments("draw_token", logits, uniform, temperature, step)
    if _chosen("draw_token", implementation, logits.dtype) == dispatch.TRITON:
        from pallas_kernels.draw_token_triton import draw_token as fused

        return fused(logits, uniform, float(temperature), step if step is None else jnp.asarray(step, jnp.int32))
    return reference(logits, uniform, temperature, step)


def draw_and_record(
    logits: Float32[Array, "M V"],
    uniform: Float32[Array, "T M"],
    completions: Completions,
    *,
    temperature: float,
    step: Int[Array, ""] | int,
    ends: Ends,
    implementation: str | None = None,
) -> tuple[Int32[Array, " M"], Completions]:
    """`draw_token` and `completions.record` of what it draws at `step`, with a `log_kept` of 0, in no more kernels than the draw.

    (The tokens, of rows that are done the pad token, and the completions.) Arguments and errors are those of the two.
    """
    _check_arguments("draw_and_record", logits, uniform, temperature, step)
    check_shapes("draw_and_record", completions, len(uniform), len(logits))
    if _chosen("draw_and_record", implementation, logits.dtype) == dispatch.TRITON:
        from pallas_kernels.draw_token_triton import draw_and_record as fused

        return fused(logits, uniform, completions, float(temperature), jnp.asarray(step, jnp.int32), ends)
    token, logprob = reference(logits, uniform, temperature, step)
    return record(completions, step, ends, token, logprob, jnp.zeros_like(logprob))


def _check_arguments(name: str, logits, uniform, temperature, step) -> None:
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"{name}: logits must be [M, V] with an entry at least, got {logits.shape}")
    if uniform.ndim != (1 if step is None else 2) or uniform.shape[-1] != logits.shape[0]:
        steps = "" if step is None else "T, "
        raise ValueError(f"{name}: logits {logits.shape} want uniform [{steps}{logits.shape[0]}], got {uniform.shape}")
    if temperature <= 0:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}")


def _chosen(name: str, implementation: str | None, dtype) -> str:
    problem = dispatch.draw_token_problem(dispatch.current_device(), dtype)
    return dispatch.resolve(name, implementation, dispatch.REFERENCE if problem else dispatch.TRITON, problem)


def reference(logits, uniform, temperature, step):
    """The jnp twin of `draw_token`."""
    token, logprob, _ = draw_kept(logits.astype(jnp.float32) / temperature, None, take_layer(uniform, step))
    return token, logprob
