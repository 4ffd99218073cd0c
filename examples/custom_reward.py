"""Train with reward functions of your own: plain Python functions that get texts and return numbers.

python examples/custom_reward.py                       # the built-in demo model, offline
python examples/custom_reward.py --output-dir runs/short --steps 20
"""

import sys

from jgrpo.cli import config_from_args
from jgrpo.training.loop import train


def closed_tags(completions, **columns):
    """1 if every <tag> that is opened is closed, else 0. Columns of the data set arrive as keyword arguments."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [
        float(all(text.count(f"<{tag}>") == text.count(f"</{tag}>") for tag in ("think", "answer"))) for text in texts
    ]


def brevity(completion_ids, max_completion_length, **columns):
    """From 1 for an empty completion to 0 for one of the full length; None leaves a row to the other functions."""
    return [1 - len(ids) / max_completion_length for ids in completion_ids]


if __name__ == "__main__":
    config = config_from_args(
        ["--reward-weights", "1.0", "0.5", *sys.argv[1:]], prog="python examples/custom_reward.py"
    )
    state = train(config, reward_functions=[closed_tags, brevity])
    print(f"trained for {int(state.step)} steps")
