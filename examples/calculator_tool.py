"""A calculator as a tool: it writes the value after every equals sign, as in GSM8K's annotations (arXiv:2110.14168).

The demo model searches for an expression that makes the target, and does its sums in its head. Here every " =" ends a turn: the
environment appends what the expression is worth, a text that carries no loss, and the model goes on from there. Training
starts from the demo model as it is, with the calculator from the first rollout on.

    python examples/calculator_tool.py                     # the demo task, offline, some minutes on a CPU
    python examples/calculator_tool.py --output-dir runs/calculator --steps 10

With a model that was trained to call functions, plain Python functions do: --tools my_module.my_function.
"""

import re
import sys

from jgrpo.cli import config_from_args
from jgrpo.rewards.arithmetic import ExpressionError, evaluate
from jgrpo.training.loop import train

SETTINGS = ["--max-turns", "24", "--round-length", "8", "--prompts-per-step", "16", "--eval-prompts", "128"]


def calculate(expression: str) -> str:
    """The value of an arithmetic expression; "?" if it has none."""
    try:
        return str(evaluate(expression)[0])
    except ExpressionError:
        return "?"


class Calculator:
    """Environment: answers an equals sign with the value of what stands before it, and ends at anything else."""

    stop_strings = (" =",)

    def reset(self, columns):
        self.text = ""

    def step(self, turn):
        self.text += turn
        if not self.text.endswith(" ="):
            return None
        line = self.text.removesuffix(" =").rpartition("\n")[2]
        line = re.sub(r" = [^()=]*\)", ")", line)  # "(3 * 4 = 12) * 5": values written earlier
        _, opened, inner = line.rpartition("(")
        is_open = opened and ")" not in inner
        reply = f" {calculate(inner if is_open else line)}" + (")" if is_open else "")
        self.text += reply
        return reply


def main(argv):
    config = config_from_args([*SETTINGS, *argv], prog="python examples/calculator_tool.py")
    state = train(config, environment=Calculator)
    print(f"trained for {int(state.step)} steps")


if __name__ == "__main__":
    main(sys.argv[1:])
