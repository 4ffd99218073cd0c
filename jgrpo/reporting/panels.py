"""Which charts a report shows, and what each of them means in one sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jgrpo.reporting.charts import Chart, Line, column, draw

History = Sequence[Mapping[str, Any]]


def panels(history: History) -> list[Chart]:
    """The charts that this history has numbers for, most important first."""
    charts = [*learning(history), *health(history), *cost(history)]
    return [chart for chart in charts if chart is not None]


def learning(history: History) -> list[Chart | None]:
    """Is it getting better?"""
    return [
        draw("Held-out", "Prompts that are never trained on; band: 95 % interval.", held_out(history), smoothed=False),
        draw(
            "Held-out loss",
            "Nats a completion token, of examples that are never trained on.",
            lines(history, {"eval_loss": "loss"}),
            smoothed=False,
        ),
        draw("Reward", "Mean over a step's completions; band: the spread within a prompt's group.", [reward(history)]),
        draw("Reward by function", "Mean of each function, before its weight.", by_function(history)),
        draw(
            "Prompts without signal",
            "Share of prompts whose completions all got the same reward: nothing to compare, nothing learned.",
            lines(history, {"frac_reward_zero_std": "share"}),
        ),
        draw("Completion length", "Tokens; band: shortest to longest.", [lengths(history)]),
        draw(
            "Cut off",
            "Share of completions that ran into --max-completion-length.",
            lines(history, {"completions/clipped_ratio": "share"}),
        ),
    ]


def health(history: History) -> list[Chart | None]:
    """Is the optimisation sound?"""
    gap = "sampling/sampling_logp_difference/"
    return [
        draw("KL from the base model", "Nats a token.", lines(history, {"kl": "KL"})),
        draw("Entropy", "Nats a token; falls as the model becomes certain.", lines(history, {"entropy": "entropy"})),
        draw(
            "Loss",
            "Near 0 by construction in GRPO, where the reward tells whether it works; in supervised training, nats a token.",
            lines(history, {"loss": "loss"}),
        ),
        draw("Gradient norm", "Before clipping.", lines(history, {"grad_norm": "norm"})),
        draw(
            "Clipped tokens",
            "Share of tokens whose ratio left the trust region.",
            lines(history, {"clip_ratio/low_mean": "too low", "clip_ratio/high_mean": "too high"}),
        ),
        draw(
            "Sampler against trainer",
            "Difference of their log-probabilities for the same tokens, nats: rounding only, if all is well.",
            lines(history, {gap + "mean": "mean", gap + "max": "largest"}),
        ),
        draw("Learning rate", "", lines(history, {"learning_rate": "rate"}), smoothed=False),
    ]


def cost(history: History) -> list[Chart | None]:
    """What does a step take? Without the first step, which compiles, once there are others."""
    later = [row for row in history if row["step"] > 1] or history
    memory = {
        "memory/peak_bytes": "peak",
        "memory/in_use_bytes": "in use",
        "memory/host_peak_rss_bytes": "process peak",
    }
    return [
        draw(
            "Throughput",
            "Tokens a second, without the first step, which compiles.",
            lines(
                later,
                {"throughput/rollout_tokens_per_s": "rollout", "throughput/train_tokens_per_s": "training"},
            ),
        ),
        draw(
            "Time of a step",
            "Seconds, without the first step, which compiles.",
            lines(later, {"time/rollout": "rollout", "time/reward": "rewards", "time/update": "update"}),
        ),
        draw("Memory", "", lines(history, memory), unit="bytes", smoothed=False),
    ]


def lines(history: History, labels: Mapping[str, str]) -> list[Line]:
    """One curve for each metric of `labels`: {metric: label}."""
    return [column(history, name, label) for name, label in labels.items()]


def by_function(history: History, prefix: str = "") -> list[Line]:
    """Each reward function's mean, in the order of their appearance."""
    start, end = f"{prefix}rewards/", "/mean"
    names = dict.fromkeys(key for row in history for key in row if key.startswith(start) and key.endswith(end))
    return [column(history, name, name.removeprefix(start).removesuffix(end)) for name in names]


def held_out(history: History) -> list[Line]:
    """Accuracy and reward of the evaluations, and each function's mean if there are several."""
    functions = by_function(history, "eval_")
    main = [with_spread(history, f"eval_{name}", f"eval_{name}_ci95", name) for name in ("accuracy", "reward")]
    return main + (functions if len(functions) > 1 else [])


def reward(history: History) -> Line:
    """The reward with a band of one `reward_std`."""
    return with_spread(history, "reward", "reward_std", "reward")


def with_spread(history: History, name: str, spread: str, label: str) -> Line:
    """A metric with a band of plus and minus another."""
    rows = [row for row in history if name in row]
    pairs = [(row[name], row.get(spread)) for row in rows]
    low = [None if value is None or half is None else value - half for value, half in pairs]
    high = [None if value is None or half is None else value + half for value, half in pairs]
    return replace(column(rows, name, label), low=low, high=high)


def lengths(history: History) -> Line:
    """The mean length with a band from the shortest to the longest completion."""
    rows = [row for row in history if "completions/mean_length" in row]
    return replace(
        column(rows, "completions/mean_length", "mean"),
        low=[row.get("completions/min_length") for row in rows],
        high=[row.get("completions/max_length") for row in rows],
    )
