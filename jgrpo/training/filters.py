"""Dynamic sampling (DAPO, Yu et al. 2025, arXiv:2503.14476): groups that teach something, from as many rollouts as it takes.

A group whose rewards are all equal has no advantage. While fewer than Q groups of a step have differing rewards, and the
bound on rollouts is not reached, Q further prompts are sampled. The step then trains on the first Q informative groups;
where the bound came first, the first uninformative ones fill the batch up, so that its shape never changes: their
advantages are 0. Informative groups beyond Q are dropped, and their prompts count as seen.

Whether rewards differ is asked of the reward functions alone, not of a length penalty or a KL.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jgrpo.algorithms import combine_rewards
from jgrpo.algorithms.rewards import zero_variance_groups
from jgrpo.rewards import RewardResult
from jgrpo.rollout import Rollout
from jgrpo.training.experience import Experience


class Judged(NamedTuple):
    """One rollout of Q groups with its rewards."""

    rollout: Rollout
    experience: Experience
    informative: Bool[np.ndarray, " Q"]
    """Groups whose rewards differ."""


def judged(rollout: Rollout, experience: Experience, weights: Float[np.ndarray, " K"]) -> Judged:
    """With the groups marked that can teach something."""
    return Judged(rollout, experience, ~np.asarray(_uninformative(experience.rewards_per_function, weights)))


@jax.jit
def _uninformative(rewards_per_function: Any, weights: Any) -> Any:
    return zero_variance_groups(combine_rewards(rewards_per_function, weights))


def sample_until_informative(sample: Callable[[int], Judged], batches: int) -> list[Judged]:
    """`sample(0)`, `sample(1)`, … until there are Q informative groups, at most `batches` times."""
    drawn = [sample(0)]
    while len(drawn) < batches and sum(batch.informative.sum() for batch in drawn) < len(drawn[0].informative):
        drawn.append(sample(len(drawn)))
    return drawn


def choose(drawn: Sequence[Judged]) -> tuple[Rollout, Experience]:
    """Q groups of all that were drawn: informative ones first, each kind in the order it was drawn.

    On the host, in NumPy: how many rollouts there are differs from step to step, and would be a shape to compile for.
    """
    questions = len(drawn[0].informative)
    if len(drawn) == 1:
        return drawn[0].rollout, drawn[0].experience
    informative = np.concatenate([batch.informative for batch in drawn])
    groups = np.argsort(~informative, kind="stable")[:questions]

    def pick(*parts: Any) -> Any:
        return jnp.asarray(np.concatenate([np.asarray(part) for part in parts])[groups])

    rollout = jax.tree.map(pick, *(batch.rollout for batch in drawn))
    return rollout, choose_experience([batch.experience for batch in drawn], groups)


def choose_experience(parts: Sequence[Experience], groups: np.ndarray) -> Experience:
    """The given groups of several experiences, counted through all of them."""
    generations = parts[0].finish.shape[1]
    rows = (groups[:, None] * generations + np.arange(generations)).reshape(-1)
    examples = [example for part in parts for example in part.examples]
    texts = [text for part in parts for text in part.texts]
    return Experience(
        [examples[group] for group in groups],
        [texts[row] for row in rows],
        np.concatenate([part.rewards_per_function for part in parts], axis=1)[:, groups],
        np.concatenate([part.finish for part in parts])[groups],
        np.concatenate([part.lengths for part in parts])[groups],
        _choose_result([part.result for part in parts], rows),
    )


def _choose_result(results: Sequence[RewardResult], rows: np.ndarray) -> RewardResult:
    """Columns that a function logged for some rollouts only are left out; metrics are means over all rollouts."""
    columns = set.intersection(*(set(result.extra_columns) for result in results))
    joined = {name: [value for result in results for value in result.extra_columns[name]] for name in sorted(columns)}
    names = dict.fromkeys(name for result in results for name in result.metrics)
    return RewardResult(
        np.concatenate([result.per_function for result in results], axis=1)[:, rows],
        [problem for result in results for problem in result.problems],
        {name: [values[row] for row in rows] for name, values in joined.items()},
        {name: float(np.mean([r.metrics[name] for r in results if name in r.metrics])) for name in names},
    )


def sampling_effort(drawn: Sequence[Judged]) -> dict[str, float]:
    """`dynamic_sampling/batches` (rollouts) and `dynamic_sampling/frac_informative` (of all groups drawn)."""
    informative = np.concatenate([batch.informative for batch in drawn])
    return {
        "dynamic_sampling/batches": float(len(drawn)),
        "dynamic_sampling/frac_informative": float(informative.mean()),
    }
