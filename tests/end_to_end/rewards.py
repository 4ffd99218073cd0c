"""Reward functions for runs of the tests, by dotted path."""

import time


def vowels(completions, **_):
    """Fraction of ASCII vowels: something that a random model produces in varying amounts."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(character in "aeiouAEIOU" for character in text) / max(len(text), 1) for text in texts]


def slow_vowels(completions, **columns):
    """The same, slow enough for a signal to arrive in the middle of a step."""
    time.sleep(0.3)
    return vowels(completions, **columns)


def broken(completions, **_):
    raise RuntimeError("out of ideas")
