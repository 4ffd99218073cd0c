"""float64 numpy oracles and random inputs, written element by element from the definitions, not from the code."""

import numpy as np


def random_int4(rng: np.random.Generator, n: int, k: int, group: int, layers: tuple[int, ...] = ()):
    """(packed uint8[*L, N, K/2], scales float32[*L, N, K/g], weight float64[*L, N, K]), split-half inside a group."""
    nibbles = rng.integers(0, 16, (*layers, n, k), dtype=np.uint8)
    scales = rng.uniform(0.02, 0.1, (*layers, n, k // group)).astype(np.float32)
    packed = np.zeros((*layers, n, k // 2), np.uint8)
    for start in range(0, k, group):
        half = group // 2
        low, high = nibbles[..., start : start + half], nibbles[..., start + half : start + group]
        packed[..., start // 2 : start // 2 + half] = low | (high << 4)
    weight = (nibbles.astype(np.float64) - 8) * np.repeat(scales.astype(np.float64), group, axis=-1)
    return packed, scales, weight


def attention(q, prompt_k, prompt_v, prompt_lengths, k, v, length, layer, scale, window=None):
    """One row, one head at a time, over the list of keys that the row may see."""
    q, prompt_k, prompt_v, k, v = (np.asarray(a, np.float64) for a in (q, prompt_k, prompt_v, k, v))
    questions, generations, heads, _ = q.shape
    per_kv = heads // k.shape[3]
    out = np.zeros_like(q)
    for i in range(questions):
        for g in range(generations):
            for h in range(heads):
                head, n = h // per_kv, int(prompt_lengths[i])
                keys = np.concatenate([prompt_k[layer, i, head, :n], k[layer, i, g, head, :length]])
                values = np.concatenate([prompt_v[layer, i, head, :n], v[layer, i, g, head, :length]])
                if window is not None:
                    keys, values = keys[-window:], values[-window:]
                scores = scale * keys @ q[i, g, h]
                weights = np.exp(scores - scores.max())
                out[i, g, h] = weights @ values / weights.sum()
    return out


def logprobs(hidden, head, targets, temperature):
    """(log p(target), entropy) in float64 from the definitions."""
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / temperature
    log_p = z - z.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    return log_p[np.arange(len(targets)), targets], -(np.exp(log_p) * log_p).sum(-1)


def draw_errors(logits, uniform, temperature, token, logprob) -> tuple[float, float]:
    """(how far `uniform` lies outside of its token's part of [0, 1], error of the log-probability), the largest of all rows.

    Tokens of probability 0 have no part and a log-probability of -inf; -inf and NaN make either error NaN or infinite.
    """
    z = np.asarray(logits, np.float64) / temperature
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    rows = np.arange(len(z))
    chosen, above = p[rows, token], np.cumsum(p, -1)[rows, token]
    outside = np.maximum(np.maximum(above - chosen - uniform, uniform - above), 0)
    with np.errstate(divide="ignore"):
        error = np.abs(np.log(chosen) - logprob)
    return float(outside.max()), float(error.max())


def corrected_draw(proposal, hidden, head, numbers, temperature) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token, log-probability, whether no number is within 1e-6 of a boundary) of every row, one candidate after the other."""
    proposal, hidden, head = (np.asarray(part, np.float64) for part in (proposal, hidden, head))
    tokens, logprobs, clear = [], [], []
    count = (numbers.shape[1] + 1) // 2
    for row, own in enumerate(numbers):
        z = proposal[row] / temperature
        mass = np.exp(z - z.max()).sum()
        above = np.cumsum(np.exp(z - z.max())) / mass
        drawn = np.searchsorted(above, own[:count], side="right")
        exact = {token: head[token] @ hidden[row] / temperature for token in drawn}
        distances, held = [np.abs(above - u).min() for u in own[:count]], drawn[0]
        for other, u in zip(drawn[1:], own[count:], strict=True):
            chance = np.exp(exact[other] - z[other] - exact[held] + z[held])
            distances.append(abs(chance - u))
            held = other if u < chance else held
        z_of_all = mass * np.exp(z.max()) + sum(np.exp(exact[token]) - np.exp(z[token]) for token in exact)
        tokens.append(held)
        logprobs.append(exact[held] - np.log(z_of_all))
        clear.append(min(distances) > 1e-6)
    return np.array(tokens), np.array(logprobs), np.array(clear)


def relative_error(got, want) -> float:
    """||got - want|| / ||want||; NaN stays NaN, which passes no comparison."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
