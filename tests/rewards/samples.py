"""Reward functions as users write them, for the tests of names, limits and errors."""

import asyncio
import contextlib
import re
import time


def trl_style(completions, answer, **kwargs):
    return [float(c[0]["content"] == a) for c, a in zip(completions, answer, strict=True)]


def without_kwargs(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


async def asynchronous(completions, **kwargs):
    await asyncio.sleep(0.2)
    return [1.0] * len(completions)


async def also_asynchronous(completions, **kwargs):
    await asyncio.sleep(0.2)
    return [2.0] * len(completions)


async def sleeps_forever(completions, **kwargs):
    await asyncio.sleep(3600)


async def blocks_its_loop(completions, **kwargs):
    time.sleep(3)


def sleeps(completions, **kwargs):
    time.sleep(3600)


def loops(completions, **kwargs):
    while True:
        pass


def catches_everything(completions, **kwargs):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def runaway_pattern(completions, **kwargs):
    return [float(bool(re.match(r"(a+)+$", "a" * 60 + "b")))] * len(completions)


def takes_over_the_alarm(completions, **kwargs):
    from math_verify.utils import timeout

    timeout(5)(lambda: None)()
    time.sleep(3600)


def raises(completions, **kwargs):
    return [1 / 0]


def too_short(completions, **kwargs):
    return [1.0]


def not_a_list(completions, **kwargs):
    return 1.0


def words(completions, **kwargs):
    return ["good"] * len(completions)


def infinite(completions, **kwargs):
    return [float("inf")] * len(completions)


def logs(completions, log_extra, log_metric, trainer_state, **kwargs):
    log_extra("size", [len(c) for c in completions])
    for completion in completions:
        log_metric("mean_size", len(completion))
    return [float(trainer_state.global_step)] * len(completions)


NOT_A_FUNCTION = 3
