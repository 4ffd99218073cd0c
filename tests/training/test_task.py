"""What a run trains on."""

from jgrpo.config import TrainConfig
from jgrpo.data import Example, PromptDataset
from jgrpo.rewards import resolve_rewards
from jgrpo.training.task import Task, load_rewards, prompt_width


def example(length):
    return Example("x", [1] * length, {})


def test_prompts_are_padded_to_what_the_longest_needs():
    assert [prompt_width([example(length), example(3)]) for length in (1, 15, 16, 17)] == [16, 16, 16, 32]
    prompts = PromptDataset((example(5), example(9)), dropped=3)
    task = Task(prompts, (example(20),), tuple(resolve_rewards(TrainConfig().reward, ("exact_match",))))
    assert task.prompt_width == 32  # one shape serves training and evaluation
    assert "2 prompts (3 too long, dropped), padded to 32 tokens" in task.describe()[0]


def test_python_functions_come_before_names():
    def mine(completions, **columns):
        return [0.0] * len(completions)

    assert [reward.name for reward in load_rewards(TrainConfig(), [mine])] == ["mine"]
    assert [reward.name for reward in load_rewards(TrainConfig())] == ["countdown"]
