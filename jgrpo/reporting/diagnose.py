"""What is going wrong in a run, in words, from its metrics.

Thresholds are deliberately far from anything healthy, and most findings need three steps in a row: a
small batch can miss all rewards once by chance.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

Metrics = Mapping[str, float | None]
IN_A_ROW = 3


@dataclass(frozen=True)
class Finding:
    """One problem: a stable name, and the sentence for a person."""

    kind: str
    text: str


def diagnose(history: Sequence[Metrics]) -> list[Finding]:
    """Findings that hold at the end of a history (one mapping a step, oldest first)."""
    return [finding for check in CHECKS if (finding := check(history)) is not None]


def _recent(history: Sequence[Metrics], name: str) -> list[float] | None:
    """The metric's last three values, or None where one is missing or not finite."""
    values = [step.get(name) for step in history[-IN_A_ROW:]]
    finite = [value for value in values if value is not None and isfinite(value)]
    return finite if len(finite) == IN_A_ROW else None


def _last(history: Sequence[Metrics], name: str) -> float | None:
    return history[-1].get(name) if history else None


def non_finite(history: Sequence[Metrics]) -> Finding | None:
    """The loss or the gradient is NaN or infinite."""
    for name in ("loss", "grad_norm"):
        value = _last(history, name)
        if history and name in history[-1] and (value is None or not isfinite(value)):
            return Finding(
                "non_finite",
                f"{name} is not finite: this step's update was left out. If it goes on, lower --learning-rate, "
                "or check the rewards for huge values.",
            )
    return None


def no_reward(history: Sequence[Metrics]) -> Finding | None:
    """No completion got any reward value."""
    if history and "reward" in history[-1]:
        value = _last(history, "reward")
        if value is None or not isfinite(value):
            return Finding("no_reward", "No reward function gave a value to any completion: nothing was learned from.")
    return None


def zero_variance(history: Sequence[Metrics]) -> Finding | None:
    """Every group's rewards are equal, so every advantage is 0."""
    shares = _recent(history, "frac_reward_zero_std")
    if shares is None or min(shares) < 1.0:
        return None
    return Finding(
        "zero_variance",
        f"The rewards have no variance: for {IN_A_ROW} steps all completions of each prompt got the same reward "
        f"(mean {_last(history, 'reward'):.4g}), so there is nothing to learn from. The task may be far too hard or "
        "too easy for this model, or the reward function constant: read completions/, and try an easier data set, "
        "a partial reward, a higher --temperature or more --num-generations.",
    )


def zero_gradient(history: Sequence[Metrics]) -> Finding | None:
    """Loss and gradient are exactly 0."""
    losses, norms = _recent(history, "loss"), _recent(history, "grad_norm")
    if losses is None or norms is None or any(losses) or any(norms):
        return None
    return Finding(
        "zero_gradient",
        f"The loss and its gradient have been exactly 0 for {IN_A_ROW} steps: what is trained does not change. "
        "Either no advantage differs from 0 or every completion is masked (--mask-truncated-completions).",
    )


def zero_loss(history: Sequence[Metrics]) -> Finding | None:
    """The loss is 0 with a gradient: normal, but it looks broken to everybody at first."""
    losses, norms = _recent(history, "loss"), _recent(history, "grad_norm")
    if losses is None or norms is None or max(map(abs, losses)) > 1e-6 or min(norms) == 0:
        return None
    return Finding(
        "zero_loss",
        "The loss is 0 but its gradient is not: normal with one optimizer step for each rollout, where the ratio is 1 "
        "and the advantages of a group add up to 0. Watch reward, not loss.",
    )


def truncated(history: Sequence[Metrics]) -> Finding | None:
    """(Almost) every completion runs into the length limit."""
    ratios = _recent(history, "completions/clipped_ratio")
    if ratios is None or min(ratios) < 0.95:
        return None
    share = "Every completion" if min(ratios) == 1 else "Almost every completion"
    return Finding(
        "truncated",
        f"{share} of the last {IN_A_ROW} steps was cut at --max-completion-length before it ended. Raise it, ask for "
        "shorter answers in the prompt, or check that the model's end-of-text token (or --stop-token-ids) is right.",
    )


def empty(history: Sequence[Metrics]) -> Finding | None:
    """Completions end at once."""
    lengths = _recent(history, "completions/mean_length")
    if lengths is None or max(lengths) > 1.5:
        return None
    return Finding(
        "empty",
        f"Completions of the last {IN_A_ROW} steps are empty: the model ends at once. Check the prompt and the "
        "chat template (an instruction-tuned model needs one).",
    )


def kl_explosion(history: Sequence[Metrics]) -> Finding | None:
    """The policy has left the base model."""
    value = _last(history, "kl")
    if value is None or value < 1.0:
        return None
    return Finding(
        "kl_explosion",
        f"The KL divergence from the base model is {value:.3g} nats a token: the policy has drifted far away and may "
        "no longer write sensible text. Lower --learning-rate, or raise --beta.",
    )


def sampler_gap(history: Sequence[Metrics]) -> Finding | None:
    """Sampler and trainer compute different log-probabilities for the same tokens."""
    mean = _last(history, "sampling/sampling_logp_difference/mean")
    if mean is None or abs(mean) < 0.05:
        return None
    return Finding(
        "sampler_gap",
        f"The sampler's and the trainer's log-probabilities differ by {abs(mean):.3g} nats a token on average; rounding "
        "explains about 0.005. The update is biased: please report this with config.yaml.",
    )


CHECKS: tuple[Callable[[Sequence[Metrics]], Finding | None], ...] = (
    non_finite,
    no_reward,
    zero_variance,
    zero_gradient,
    zero_loss,
    truncated,
    empty,
    kl_explosion,
    sampler_gap,
)


class Watch:
    """Findings as they appear: each is told once, and again only after it was gone."""

    def __init__(self) -> None:
        self._history: list[Metrics] = []
        self._standing: set[str] = set()

    def update(self, metrics: Metrics) -> list[Finding]:
        """Add one step; the findings that were not there before it."""
        self._history = [*self._history, metrics][-IN_A_ROW:]
        findings = diagnose(self._history)
        appeared = [finding for finding in findings if finding.kind not in self._standing]
        self._standing = {finding.kind for finding in findings}
        return appeared
