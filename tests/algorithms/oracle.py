"""The formulas of docs/algorithms.md as plain float64 loops over rows and tokens.

Written from the formulas, with no import from jgrpo, to be the other side of the golden tests. `ell` is the variable of
a derivative; `frozen` is its value wherever a formula says stop_gradient, so that a finite difference in `ell`
alone is the gradient that the formula defines.
"""

import math
from types import SimpleNamespace

import numpy as np


def random_batch(seed: int, questions: int = 3, generations: int = 4, length: int = 5) -> SimpleNamespace:
    """Arrays of a batch off-policy enough to clip; row (0, 0) is empty, (0, 1) has one token, masks have holes."""
    rng = np.random.default_rng(seed)
    shape = (questions, generations, length)
    mask = rng.random(shape) < 0.7
    mask[0, 0], mask[0, 1] = False, np.arange(length) == 0
    ell = -rng.exponential(1.5, shape)
    batch = SimpleNamespace(
        ell=ell,
        old=ell + rng.normal(0, 0.4, shape),
        ref=ell + rng.normal(0, 0.5, shape),
        sampler=ell + rng.normal(0, 0.5, shape),
        entropy=rng.exponential(1.0, shape),
        advantages=rng.normal(0, 1, shape[:2]),
        mask=mask,
    )
    batch.advantages[-1, -1] = 0.0
    return batch


def std(values) -> float:
    """Sample standard deviation; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def given(values) -> list[float]:
    return [float(v) for v in np.ravel(values) if not math.isnan(v)]


def group_advantages(rewards, scale):
    out = np.zeros_like(rewards)
    for q, group in enumerate(rewards):
        for g, reward in enumerate(group):
            if not math.isnan(reward):
                divisor = {"group": std(given(group)) + 1e-4, "batch": std(given(rewards)) + 1e-4, "none": 1.0}[scale]
                out[q, g] = (reward - mean(given(group))) / divisor
    return out


def whiten(x):
    return np.array([[0.0 if math.isnan(v) else (v - mean(given(x))) / (std(given(x)) + 1e-4) for v in r] for r in x])


def gdpo(per_function, weights):
    z = np.array([group_advantages(r, "group") for r in per_function])
    total = np.full(per_function.shape[1:], math.nan)
    for index in np.ndindex(total.shape):
        values = [(w, z[k][index]) for k, w in enumerate(weights) if not math.isnan(per_function[k][index])]
        if values:
            total[index] = sum(w * v for w, v in values)
    return whiten(total)


def rloo(rewards):
    out = np.zeros_like(rewards)
    for q, g in np.ndindex(rewards.shape):
        others = given(np.delete(rewards[q], g))
        if others and not math.isnan(rewards[q, g]):
            out[q, g] = rewards[q, g] - mean(others)
    return out


def reinforce_plus_plus_baseline(rewards):
    return whiten(np.array([[r - mean(given(group)) for r in group] for group in rewards]))


def opo(rewards, lengths):
    out = np.zeros_like(rewards)
    for q, g in np.ndindex(rewards.shape):
        pairs = [(n, r) for n, r in zip(lengths[q], rewards[q], strict=True) if not math.isnan(r)]
        if not math.isnan(rewards[q, g]):
            tokens = sum(n for n, _ in pairs)
            out[q, g] = rewards[q, g] - (sum(n * r for n, r in pairs) / tokens if tokens else 0.0)
    return out


def pass_at_k(rewards):
    out = np.zeros_like(rewards)
    for q, group in enumerate(rewards):
        ranked = sorted(given(group), reverse=True)
        if len(ranked) >= 2:
            best = next(g for g, r in enumerate(group) if r == ranked[0])
            out[q, best] = (ranked[0] - ranked[1]) / (std(ranked) + 1e-4)
    return out


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def log_ratios(level, ell, frozen, old, mask) -> np.ndarray:
    """log r of every token of one row."""
    tokens = [t for t in range(len(ell)) if mask[t]]
    log_r = [clamp(ell[t] - old[t], -20, 20) for t in range(len(ell))]
    if level == "token":
        return np.array(log_r)
    if level == "sequence":
        return np.full(len(ell), mean(log_r[t] for t in tokens))
    row = mean(clamp(frozen[t] - old[t], -20, 20) for t in tokens)
    return np.array([ell[t] - frozen[t] + row for t in range(len(ell))])


def row_loss(kind, level, settings, ell, frozen, old, advantage, mask, log_rho) -> np.ndarray:
    """Per-token loss of one row. `log_rho`: the sampler correction of VESPO, 0 elsewhere."""
    log_r = log_ratios(level, ell, frozen, old, mask)
    tokens = [t for t in range(len(ell)) if mask[t]]
    out = np.zeros(len(ell))
    if kind == "gmpo":
        low, high = -settings["epsilon_low"], settings["epsilon_high"]
        pick = min if advantage > 0 else max
        out[:] = -advantage * math.exp(mean(pick(log_r[t], clamp(log_r[t], low, high)) for t in tokens))
        return out
    if kind == "vespo":
        total = sum(clamp(frozen[t] - old[t], -20, 20) + log_rho[t] for t in tokens)
        log_w = clamp(total, math.log(1e-8), 20)
        sign = "pos" if advantage >= 0 else "neg"
        k, lam = settings[f"k_{sign}"], settings[f"lambda_{sign}"]
        return -math.exp(lam + k * log_w - lam * math.exp(log_w)) * advantage * ell
    frozen_log_r = log_ratios(level, frozen, frozen, old, mask)
    for t in range(len(ell)):
        r = math.exp(log_r[t])
        if kind == "clipped":
            bounded = r if settings["delta"] is None else min(r, settings["delta"])
            clipped = clamp(r, 1 - settings["epsilon_low"], 1 + settings["epsilon_high"])
            out[t] = -min(bounded * advantage, clipped * advantage)
        elif kind == "cispo":
            out[t] = -min(math.exp(frozen_log_r[t]), settings["cap"]) * advantage * ell[t]
        elif kind == "sapo":
            tau = settings["temperature_pos"] if advantage > 0 else settings["temperature_neg"]
            out[t] = -advantage * (4 / tau) / (1 + math.exp(-tau * (r - 1)))
    return out


def weights(kind, mask, max_length, generation_tokens=None) -> np.ndarray:
    out = np.zeros(mask.shape)
    questions, generations, _ = mask.shape
    rows = questions * generations
    for q, g, t in np.argwhere(mask):
        row, group, batch = mask[q, g].sum(), mask[q].sum(), mask.sum()
        out[q, g, t] = {
            "grpo": 1 / row / rows,
            "bnpo": 1 / batch,
            "dr_grpo": 1 / (rows * max_length),
            "dapo": 1 / (batch if generation_tokens is None else generation_tokens),
            "prompt": 1 / group / questions,
            "luspo": 1 / rows,
        }[kind]
    return out


def kl(kind, ell, ref) -> float:
    x = ell - ref
    return {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) + x - 1}[kind]


def sampler_weights(mode, old, sampler, mask, low, high) -> np.ndarray:
    """ρ of every token of one row."""
    level, bound = mode.split("_")
    log_rho = [old[t] - sampler[t] for t in range(len(old))]
    if level == "sequence":
        log_rho = [mean(log_rho[t] for t in range(len(old)) if mask[t])] * len(old)
    rho = [math.exp(x) for x in log_rho]
    if bound == "truncate":
        return np.array([min(r, high) for r in rho])
    return np.array([r if low <= r <= high else 0.0 for r in rho])


def total_loss(b, w, settings, kind, *, level="token", ell=None, **options) -> float:
    """The whole objective on a batch: Σ w (l × masks × ρ + β KL − c H)."""
    ell = b.ell if ell is None else ell
    total = 0.0
    for index in np.ndindex(b.advantages.shape):
        row, m, advantage = ell[index], b.mask[index], b.advantages[index]
        rho = np.ones(len(row))
        if options.get("correction"):
            low, high = options["bounds"]
            rho = sampler_weights(options["correction"], b.old[index], b.sampler[index], m, low, high)
        log_rho = np.log(np.maximum(rho, 1e-8)) if kind == "vespo" else np.zeros(len(row))
        loss = row_loss(kind, level, settings, row, b.ell[index], b.old[index], advantage, m, log_rho)
        log_r = log_ratios(level, row, b.ell[index], b.old[index], m)
        drift = mean(b.sampler[index][t] - b.ell[index][t] for t in range(len(row)) if m[t])
        kept = advantage >= 0 or drift <= options.get("off_policy_threshold", math.inf)
        for t in np.flatnonzero(m):
            value = loss[t] * kept * (1.0 if kind == "vespo" else rho[t])
            if "token_mask" in options:
                value *= options["token_mask"][index][t]
            if options.get("beta"):
                ratio = math.exp(log_r[t]) if options.get("kl_times_ratio") else 1.0
                value += options["beta"] * ratio * kl(options.get("kl", "k3"), row[t], b.ref[index][t])
            value -= options.get("entropy_coef", 0.0) * b.entropy[index][t]
            total += w[index][t] * value
    return total


def finite_difference(function, x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of a scalar function at every entry of x."""
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        out[index] = (function(up) - function(down)) / (2 * step)
    return out
