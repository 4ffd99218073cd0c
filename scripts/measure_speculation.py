"""Would n-gram speculation (prompt lookup) make rollouts faster? Accepted tokens on real completions, against what a step costs.

    PYTHONPATH=. python scripts/measure_speculation.py --model demo --prompts 48 --group 8

The draft of a step is what followed the latest earlier occurrence of a row's last n tokens, in its prompt and completion or, with
siblings, also in what the other completions of its group have so far. A draft is one guess, so exact rejection sampling
(Leviathan et al. 2023, arXiv:2211.17192) accepts it with the model's probability p(draft) and otherwise draws from p without it:
the token that comes out equals the draft exactly when it was accepted. Replaying a completion that was sampled without drafts
therefore gives the accepted tokens of a run with drafts, exactly in distribution and without asking the model. `--check` asks it: the
mean of p(first drafted token), next to the share of first tokens that were accepted.

A step with k drafted tokens a row computes k + 1 tokens of every row, accepted or not, drafted or not: the shapes of a compiled
program do not follow the drafts. Its time is taken as that of (k + 1) x rows, from measured steps (`--step-ms`), once as it is
and once less the attention of the additional rows (`--attention-us` a row), since a row's keys are read once for its k + 1
tokens. Rows are taken to advance by the mean; in a batch, the slowest row counts, so the speed-ups are generous.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jgrpo.config import DataConfig, RolloutConfig
from jgrpo.data import load_prompts
from jgrpo.generate import load
from jgrpo.rollout import Rollout
from jgrpo.training.forward import packed_tokens, rows_of
from jgrpo.training.task import prompt_width

MEASURED = {64: 1.79, 256: 2.98, 512: 5.04}
"""Rows -> ms of a decode step, Qwen2.5-1.5B, bf16 copy, H200 (docs/benchmarks.md)."""
ATTENTION_US = 5.1
"""Of a step's attention a row, there at 64 rows; less with more rows, which are then taken for cheaper than they are."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="checkpoint that completes (default %(default)s)")
    parser.add_argument("--dataset", default="countdown", help="its prompts (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=48, help="prompts Q (default %(default)s)")
    parser.add_argument("--group", type=int, default=8, help="completions G of each (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="at most (default %(default)s)")
    parser.add_argument("--ngram", nargs="+", type=int, default=[2, 3], help="tokens n to look up")
    parser.add_argument("--draft", nargs="+", type=int, default=[1, 3, 7], help="tokens k to draft")
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 256, 512], help="rows of a batch to judge")
    parser.add_argument("--step-ms", nargs="+", metavar="ROWS:MS", help="measured steps; default: those of the docs")
    parser.add_argument("--attention-us", type=float, default=ATTENTION_US, help="a row (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="compare acceptance with the model's probabilities")
    return parser.parse_args()


class Group(NamedTuple):
    """A prompt and its completions."""

    prompt: list[int]
    completions: list[list[int]]


class Replay(NamedTuple):
    """What drafts did for a set of completions."""

    tokens: int
    steps: int
    drafted: int
    """Steps that had a draft."""
    first: list[tuple[int, int, int]]
    """(row, position in the completion, first drafted token) of those."""
    accepted_first: int

    @property
    def per_step(self) -> float:
        """Tokens that a step adds to a row."""
        return self.tokens / self.steps


def find_draft(texts: Sequence[Sequence[int]], key: Sequence[int], count: int) -> Sequence[int]:
    """Up to `count` tokens behind the last occurrence of `key` in the first text that has one followed by a token."""
    size = len(key)
    for text in texts:
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == key:
                return text[start + size : start + size + count]
    return []


def replay(groups: Sequence[Group], ngram: int, count: int, siblings: bool) -> Replay:
    """Decode the completions with drafts; siblings are seen as far as the row itself has come."""
    tokens = steps = drafted = accepted_first = 0
    first: list[tuple[int, int, int]] = []
    rows = [(group, row) for group in groups for row in range(len(group.completions))]
    for number, (group, row) in enumerate(rows):
        completion, done = group.completions[row], 0
        tokens += len(completion)
        while done < len(completion):
            own = group.prompt + completion[:done]
            others = [other[:done] for i, other in enumerate(group.completions) if i != row] if siblings else []
            draft = find_draft([own, *others], own[-ngram:], count)
            accepted = matching(draft, completion[done:])
            if draft:
                drafted += 1
                accepted_first += accepted > 0
                first.append((number, done, draft[0]))
            steps += 1
            done += accepted + 1
    return Replay(tokens, steps, drafted, first, accepted_first)


def matching(draft: Sequence[int], actual: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(draft, actual, strict=False)) if a != b), min(len(draft), len(actual))
    )


def step_ms(rows: float, measured: dict[int, float]) -> float:
    """Linear between the measured numbers of rows, and beyond the last two."""
    known = sorted(measured)
    high = next((n for n in known[1:] if rows <= n), known[-1])
    low = known[known.index(high) - 1]
    return measured[low] + (rows - low) * (measured[high] - measured[low]) / (high - low)


def wide_ms(rows: int, count: int, args: argparse.Namespace, measured: dict[int, float]) -> tuple[float, float]:
    """A step with `count` drafted tokens a row: as one of as many rows, and with every row's keys read once."""
    wide = step_ms(rows * (count + 1), measured)
    return wide, max(step_ms(rows, measured), wide - args.attention_us / 1e3 * rows * count)


def sample(args: argparse.Namespace) -> tuple[list[Group], Rollout, np.ndarray]:
    """Completions at temperature 1, and log-probabilities `[rows, positions, V]` of the model if they are to be checked."""
    policy, lora = load(args.model)
    dataset = load_prompts(DataConfig(dataset=args.dataset), policy.tokenizer, "test")
    examples = dataset.examples[: args.prompts]
    config = RolloutConfig(num_generations=args.group, max_completion_length=args.new_tokens)
    rollout = policy.sample(lora, examples, jax.random.key(0), config, prompt_width(examples))
    groups = [
        Group(list(example.token_ids), [row[:n].tolist() for row, n in zip(drawn, lengths, strict=True)])
        for example, drawn, lengths in zip(
            examples, np.asarray(rollout.completion_tokens), np.asarray(rollout.completion_lengths), strict=True
        )
    ]
    if not args.check:
        return groups, rollout, np.zeros(0)
    rows = rows_of(rollout)
    tokens, lengths = packed_tokens(rows)
    hidden = policy.model.apply({"params": policy.base}, tokens, lengths)
    logits = policy.model.apply({"params": policy.base}, hidden, method="logits")
    return groups, rollout, np.asarray(jax.nn.log_softmax(logits))


def checked(result: Replay, rollout: Rollout, logprobs: np.ndarray) -> dict[str, float]:
    """Mean probability of the first drafted tokens; it should be the share of them that was accepted."""
    starts = np.repeat(np.asarray(rollout.prompt_lengths), rollout.completion_lengths.shape[1])
    chance = [np.exp(logprobs[row, starts[row] - 1 + place, token]) for row, place, token in result.first]
    return {
        "first_accepted": round(result.accepted_first / result.drafted, 4),
        "first_probability": round(float(np.mean(chance)), 4),
    }


def main() -> None:
    args = arguments()
    measured = {int(n): float(ms) for n, ms in (part.split(":") for part in args.step_ms)} if args.step_ms else MEASURED
    groups, rollout, logprobs = sample(args)
    lengths = [len(completion) for group in groups for completion in group.completions]
    print(json.dumps({"completions": len(lengths), "tokens": sum(lengths), **vars(args), "step_ms": measured}))
    for count in args.draft:
        ratios = [
            [wide / step_ms(rows, measured) for wide in wide_ms(rows, count, args, measured)] for rows in args.rows
        ]
        needed = {rows: [round(ratio, 2) for ratio in pair] for rows, pair in zip(args.rows, ratios, strict=True)}
        print(json.dumps({"draft": count, "tokens_a_step_to_break_even": needed}))
    heads = [f"{rows} rows" for rows in args.rows]
    print(f"| n | k | siblings | steps with a draft | first token accepted | tokens a step | {' | '.join(heads)} |")
    print("|" + "---|" * (6 + len(heads)))
    for ngram, count, siblings in itertools.product(args.ngram, args.draft, (False, True)):
        result = replay(groups, ngram, count, siblings)
        gains = [
            [result.per_step * step_ms(rows, measured) / wide for wide in wide_ms(rows, count, args, measured)]
            for rows in args.rows
        ]
        cells = [ngram, count, "yes" if siblings else "no", f"{result.drafted / result.steps:.0%}"]
        cells += [f"{result.accepted_first / max(1, result.drafted):.0%}", f"{result.per_step:.2f}"]
        cells += [f"{plain:.2f} to {narrow:.2f}" for plain, narrow in gains]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        if args.check:
            print(json.dumps(checked(result, rollout, logprobs)))


if __name__ == "__main__":
    main()
