"""The algorithm layer: pure functions, arrays in, arrays out, usable without a trainer.

Rewards become advantages (`advantages`), log-probabilities become a per-token loss (`ratios`, `losses`, `kl`, `masks`,
`corrections`), aggregation is an array of weights (`aggregation`), and `policy_loss` sums. `registry` composes them
from a configuration. NaN rewards mean "no reward"; masks hide anything; nothing valid gives 0.
docs/algorithms.md lists every formula with its source.
"""

from jgrpo.algorithms.advantages import group_advantages
from jgrpo.algorithms.aggregation import aggregation_weights
from jgrpo.algorithms.kl import kl_k1, kl_k2, kl_k3
from jgrpo.algorithms.masks import drop_truncated
from jgrpo.algorithms.metrics import completion_metrics, policy_metrics, reward_metrics
from jgrpo.algorithms.objective import Objective, Scored, loss_mask
from jgrpo.algorithms.policy_loss import policy_loss
from jgrpo.algorithms.registry import check_objective, objective_from_config, preference_from_config
from jgrpo.algorithms.rewards import combine_rewards

__all__ = [
    "Objective",
    "Scored",
    "aggregation_weights",
    "check_objective",
    "combine_rewards",
    "completion_metrics",
    "drop_truncated",
    "group_advantages",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "loss_mask",
    "objective_from_config",
    "policy_loss",
    "policy_metrics",
    "preference_from_config",
    "reward_metrics",
]
