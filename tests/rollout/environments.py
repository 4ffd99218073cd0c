"""Tools and environments for the tests, by dotted path."""


def add(a: float, b: float = 1.0) -> float:
    """The sum of two numbers."""
    return a + b


def broken() -> str:
    """Never works."""
    raise RuntimeError("out of order")


def untyped(a):
    """Its parameter has no type."""
    return a


class Echo:
    """Answers the first `turns` turns with a fixed text, and remembers what it was told."""

    stop_strings = ()
    turns, answer = 1, " noted. "

    def reset(self, columns):
        self.columns, self.heard = columns, []

    def step(self, turn):
        self.heard.append(turn)
        return self.answer if len(self.heard) <= self.turns else None


def number() -> int:
    return 3
