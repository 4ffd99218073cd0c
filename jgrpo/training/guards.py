"""What stops a run from going on when it should not: signals, non-finite updates, a wrong first step, recompilation."""

import os
import signal
import threading
from collections.abc import Mapping
from functools import partial
from types import FrameType
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp

from jgrpo.algorithms.masked import masked_mean
from jgrpo.config import TrainConfig
from jgrpo.errors import UserError
from jgrpo.rollout import Rollout
from jgrpo.training.forward import logprob_chunk, rows_of, token_logprobs
from jgrpo.training.policy import Policy

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

TOLERANCES: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
"""Largest mean |Δ log-prob| over tokens between two forwards of the same policy in each compute dtype. The sampler
decodes one token at a time and the trainer whole rows, so their sums are rounded in a different order."""
INT8_WEIGHTS = TOLERANCES["float16"]
"""The same where the sampler decodes with a merged copy in 8 bits, in any dtype (0.002 in docs/benchmarks.md)."""


class PolicyMismatch(RuntimeError):
    """Two forwards that must be the same policy are not: a fault of the program, not of its input."""


class StopSignals:
    """SIGTERM and SIGINT ask the loop to finish its phase, save and exit; the second one exits at once.

    A context manager, because handlers are global: the earlier ones are restored on leaving.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """128 + signal: 143 for SIGTERM, 130 for SIGINT; 0 if none came."""
        return 0 if self.received is None else 128 + self.received

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number


class CompileCounter:
    """Counts XLA compilations (also those served from the persistent cache) from the moment it is made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1

    def close(self) -> None:
        """Stop counting."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)


def check_first_rollout(policy: Policy, lora: Mapping[str, Any], rollout: Rollout, config: TrainConfig) -> None:
    """Before the first update, on the first microbatch: π_trainer = π_sampler (ratio 1) and π = π_base (KL 0).

    A run that starts from an adapter does not start as the base, so there only the first is asked for.

    Raises:
        PolicyMismatch: a mean gap (NaN included) is above the dtype's tolerance.
    """
    training, length = config.training, rollout.completion_mask.shape[-1]
    rows = jax.tree.map(lambda array: array[: training.microbatch_size], rows_of(rollout))
    gaps = _policy_gaps(
        lora,
        policy.base,
        rows,
        rollout.policy_logprobs.reshape(-1, length)[: training.microbatch_size],
        rollout.policy_mask.reshape(-1, length)[: training.microbatch_size],
        model=policy.model,
        temperature=config.rollout.temperature,
        chunk=logprob_chunk(policy.model, training.logprob_workspace),
    )
    sampler_gap, base_gap = (float(gap) for gap in gaps)
    int8_weights = config.rollout.rollout_weights == "int8"
    check_same_policy(policy.dtype, sampler_gap, base_gap if config.lora.adapter is None else 0.0, int8_weights)


@partial(jax.jit, static_argnames=("model", "temperature", "chunk"))
def _policy_gaps(lora, base, rows, sampler_logprobs, mask, *, model, temperature, chunk):
    """Mean |Δ log-prob| over the tokens of the mask, of the trainer to the sampler and to the base (0 where there is none)."""
    forward = partial(token_logprobs, model, base, temperature=temperature, chunk=chunk, remat=False)
    logprobs = forward(lora, rows)[0]
    others = (sampler_logprobs, forward({}, rows)[0] if base else logprobs)
    return tuple(masked_mean(jnp.abs(logprobs - other), mask) for other in others)


def check_same_policy(dtype: str, sampler_gap: float, reference_gap: float, int8_weights: bool = False) -> None:
    """Compare the two gaps of the first rollout with the tolerance of the compute dtype, or of a copy in 8 bits.

    Raises:
        PolicyMismatch: a gap (NaN included) is above it.
    """
    tolerance = TOLERANCES[dtype]
    sampler_tolerance = max(tolerance, INT8_WEIGHTS) if int8_weights else tolerance
    gaps = [
        ("the sampler's (ratio at step 0)", sampler_gap, sampler_tolerance),
        ("the base model's (KL at step 0)", reference_gap, tolerance),
    ]
    for other, gap, allowed in gaps:
        if not gap <= allowed:
            raise PolicyMismatch(
                f"step 0: the policy's log-probabilities differ from {other} by {gap:.3g} on average, expected at most "
                f"{allowed:g} in {dtype}: rollout and training would optimise different policies"
            )


def check_finite(consecutive: int, limit: int, step: int) -> None:
    """Abort after `limit` updates in a row that were skipped for a non-finite loss or gradient.

    Raises:
        UserError: the limit is reached.
    """
    if consecutive >= limit:
        raise UserError(
            f"step {step}: loss or gradient not finite in {consecutive} updates in a row (max_nonfinite_steps {limit}); "
            "what is trained was left unchanged in all of them; lower learning_rate, or check the rewards"
        )
