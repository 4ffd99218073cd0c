"""Value of an arithmetic expression that a model wrote, from a whitelisted syntax tree; nothing is ever executed.

Allowed are integer and decimal numbers, + - * /, unary signs and parentheses. Powers, names, calls and everything
else are refused: model output is untrusted input, and `9**9**9` would hang.
"""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}

LONGEST = 400
"""Characters above which an expression is refused: the parser's stack is not ours to exhaust."""


class ExpressionError(ValueError):
    """The text is not an allowed expression, or divides by zero."""


def evaluate(text: str) -> tuple[Fraction, list[Fraction]]:
    """Exact value and the numbers used, in the order of writing. Raises `ExpressionError`."""
    if len(text) > LONGEST:
        raise ExpressionError(f"{len(text)} characters, at most {LONGEST} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        numbers: list[Fraction] = []
        return _value(tree.body, numbers), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ExpressionError(str(error)) from error


def _value(node: ast.expr, numbers: list[Fraction]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # str() of a float is its shortest spelling, so 0.1 is one tenth here.
        numbers.append(Fraction(str(node.value)))
        return numbers[-1]
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        left = _value(node.left, numbers)
        return BINARY[type(node.op)](left, _value(node.right, numbers))
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](_value(node.operand, numbers))
    raise ExpressionError(f"{type(node).__name__} is not allowed")
