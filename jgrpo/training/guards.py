"""What stops a run from going on when it should not: signals, non-finite updates, a wrong first step, recompilation."""

import os
import signal
from collections.abc import Mapping
from types import FrameType

import jax.monitoring

from jgrpo.errors import UserError

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

TOLERANCES: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
"""Largest mean |Δ log-prob| over tokens between two forwards of the same policy in each compute dtype. The sampler
decodes one token at a time and the trainer whole rows, so their sums are rounded in a different order."""


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

    def _on_event(self, event: str, duration: float, **_: object) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1

    def close(self) -> None:
        """Stop counting."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)


def check_same_policy(dtype: str, sampler_gap: float, reference_gap: float) -> None:
    """Before the first update: the trainer must agree with the sampler, and the adapter (B = 0) with the base.

    Args:
        dtype: compute dtype of the model, a key of `TOLERANCES`.
        sampler_gap: mean |log π_trainer − log π_sampler| over completion tokens.
        reference_gap: the same against the base model with the adapter off, which is what KL = 0 means token by token.

    Raises:
        PolicyMismatch: a gap (NaN included) is above the tolerance of the dtype.
    """
    tolerance = TOLERANCES[dtype]
    gaps = {"the sampler's log-probabilities": sampler_gap, "the base model (KL at step 0)": reference_gap}
    for other, gap in gaps.items():
        if not gap <= tolerance:
            raise PolicyMismatch(
                f"step 0: the policy's log-probabilities differ from {other} by {gap:.3g} on average, expected at most "
                f"{tolerance:g} in {dtype}: rollout and training would optimise different policies; please report it"
            )


def check_finite(consecutive: int, limit: int, step: int) -> None:
    """Abort after `limit` updates in a row that were skipped for a non-finite loss or gradient.

    Raises:
        UserError: the limit is reached.
    """
    if consecutive >= limit:
        raise UserError(
            f"step {step}: loss or gradient not finite in {consecutive} updates in a row (max_nonfinite_steps {limit}); "
            "the adapter was left unchanged in all of them; lower learning_rate, or check the rewards"
        )
