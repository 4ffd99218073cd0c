"""The calling convention, and what is said about functions that misbehave."""

import functools
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jgrpo.config import RewardConfig
from jgrpo.errors import UserError
from jgrpo.rewards import named_rewards, resolve_rewards, score
from tests.rewards import samples

CHAT = [[{"role": "user", "content": "q"}]] * 2
IDS = [[1], [2, 3]]


def run(*functions, prompts=("p", "p"), texts=("a", "b"), columns=None, **settings):
    rewards = named_rewards(list(functions))
    return score(rewards, list(prompts), list(texts), IDS, columns or {}, **{"timeout": 5, **settings})


def test_chat_prompts_give_chat_completions():
    result = run(samples.trl_style, prompts=CHAT, columns={"answer": ["a", "x"]})
    assert result.per_function.tolist() == [[1.0, 0.0]]


def test_string_prompts_give_strings_and_only_named_columns_are_passed():
    result = run(samples.without_kwargs, columns={"answer": ["a", "x"], "other": [0, 0]})
    assert result.per_function.tolist() == [[1.0, 0.0]]


def test_every_argument_of_the_convention_arrives():
    seen = {}

    def spy(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0, True]

    assert run(spy, columns={"answer": ["x", "y"]}).per_function.tolist() == [[0.0, 1.0]]
    assert seen["prompts"] == ["p", "p"]
    assert seen["completions"] == ["a", "b"]
    assert seen["completion_ids"] == IDS
    assert seen["answer"] == ["x", "y"]


def test_none_and_nan_are_no_reward_and_array_scalars_are_numbers():
    import jax.numpy as jnp

    assert np.isnan(run(lambda completions: [None, float("nan")]).per_function).all()
    assert run(lambda completions: [np.float32(0.5), jnp.array(2)]).per_function.tolist() == [[0.5, 2.0]]
    assert run(lambda completions: jnp.array([0.5, 2.0])).per_function.tolist() == [[0.5, 2.0]]
    assert run(lambda completions: np.array([1, 2])).per_function.tolist() == [[1.0, 2.0]]


def test_asynchronous_functions_run_at_the_same_time():
    run(samples.asynchronous)  # starts the event loop
    start = time.monotonic()
    result = run(samples.asynchronous, samples.also_asynchronous)
    assert time.monotonic() - start < 0.39, "two waits of 0.2 s one after the other take 0.4 s"
    assert result.per_function.tolist() == [[1.0, 1.0], [2.0, 2.0]]


def test_functions_can_log_and_see_the_trainer_state():
    result = run(samples.logs, texts=("a", "bcd"), extras={"trainer_state": SimpleNamespace(global_step=7)})
    assert result.per_function.tolist() == [[7.0, 7.0]]
    assert result.extra_columns == {"size": [1, 3]}
    assert result.metrics == {"mean_size": 2.0}


def test_a_missing_column_stops_the_run_in_any_case():
    for on_error in ("abort", "ignore"):
        with pytest.raises(
            UserError, match="reward 'trl_style': the data set has no column 'answer', only: anser"
        ) as caught:
            run(samples.trl_style, columns={"anser": [1, 2]}, on_error=on_error)
        assert "did you mean 'anser'" in str(caught.value)


MISBEHAVIOUR = [
    (samples.raises, "raised ZeroDivisionError: division by zero"),
    (samples.too_short, "returned 1 values for 2 completions"),
    (samples.not_a_list, "returned float; expected a list of 2 numbers or None"),
    (samples.words, "returned 'good' for completion 0; expected a number or None"),
    (samples.infinite, "returned inf for completion 0"),
]


@pytest.mark.parametrize(("function", "message"), MISBEHAVIOUR)
def test_misbehaviour_is_reported_by_name(function, message):
    with pytest.raises(UserError) as caught:
        run(function)
    assert f"reward {function.__name__!r} {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("function", "message"), MISBEHAVIOUR)
def test_or_ignored_by_policy_without_touching_the_others(function, message):
    result = run(function, samples.asynchronous, on_error="ignore")
    assert np.isnan(result.per_function[0]).all()
    assert result.per_function[1].tolist() == [1.0, 1.0]
    assert len(result.problems) == 1
    assert f"reward {function.__name__!r} {message}" in result.problems[0]


HANGING = [
    samples.sleeps,
    samples.loops,
    samples.catches_everything,
    samples.runaway_pattern,
    samples.takes_over_the_alarm,
    samples.sleeps_forever,
    samples.blocks_its_loop,
]


@pytest.mark.parametrize("function", HANGING)
def test_a_function_that_hangs_is_stopped(function):
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"'{function.__name__}' did not return within reward_timeout, 0.3 s"):
        run(function, timeout=0.3)
    assert time.monotonic() - start < 3
    # The next call is not affected by the hung one.
    assert run(samples.asynchronous).per_function.tolist() == [[1.0, 1.0]]


def test_outside_the_main_thread_a_hung_function_is_abandoned():
    caught = []

    def work():
        with pytest.raises(UserError, match="did not return within") as error:
            run(samples.sleeps, timeout=0.2)
        caught.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join(5)
    assert caught


def test_a_hung_function_does_not_keep_the_process_alive():
    program = (
        "import threading\n"
        "from tests.rewards.test_scoring import run, samples\n"
        "def work():\n"
        "    for function in (samples.sleeps, samples.blocks_its_loop):\n"
        "        print(run(function, timeout=0.2, on_error='ignore').problems)\n"
        "worker = threading.Thread(target=work); worker.start(); worker.join()\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("did not return") == 2


def test_names_resolve_to_functions():
    rewards = resolve_rewards(RewardConfig(("countdown", "tests.rewards.samples.trl_style"), (1.0, 0.5)))
    assert [(r.name, r.weight) for r in rewards] == [("countdown", 1.0), ("trl_style", 0.5)]
    assert rewards[1].function is samples.trl_style
    assert [r.name for r in resolve_rewards(RewardConfig(), ("gsm8k",))] == ["gsm8k"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig(("countdwn",)), "unknown reward 'countdwn', did you mean 'countdown'"),
        (RewardConfig(("no_such_module.f",)), "cannot import 'no_such_module'"),
        (RewardConfig(("tests.rewards.samples.trl_stlye",)), "has no function 'trl_stlye', did you mean 'trl_style'"),
        (RewardConfig(("tests.rewards.samples.NOT_A_FUNCTION",)), "has no function 'NOT_A_FUNCTION'"),
        (RewardConfig(("countdown",), (1.0, 2.0)), "2 entries for 1 reward functions"),
        (RewardConfig(("gsm8k", "jgrpo.rewards.answers.gsm8k")), "two reward functions are named 'gsm8k'"),
        (RewardConfig(), "reward_functions is empty"),
    ],
)
def test_bad_names_are_one_clear_line(config, message):
    with pytest.raises(UserError) as caught:
        resolve_rewards(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_partials_and_callable_objects_are_functions_too():
    class Judge:
        async def __call__(self, completions, **kwargs):
            return [4.0] * len(completions)

    named = functools.partial(samples.without_kwargs)
    result = run(Judge(), columns={})
    assert result.per_function.tolist() == [[4.0, 4.0]]
    assert run(named, columns={"answer": ["a", "a"]}).per_function.tolist() == [[1.0, 0.0]]
