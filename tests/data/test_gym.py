"""reasoning-gym by name: with the package replaced by a small one of the same interface, and without it."""

import sys
from random import Random
from types import ModuleType

import pytest

from jgrpo.config import DataConfig, RewardConfig
from jgrpo.data import gym, has_held_out, load_prompts
from jgrpo.errors import UserError
from jgrpo.rewards import resolve_rewards, score
from tests.tiny_checkpoints import make_tokenizer


class Sums:
    """Item i is drawn from seed + i, as in the package; a twentieth for any number."""

    def __init__(self, seed=0, size=0):
        self.seed, self.size = seed, size

    def __getitem__(self, index):
        a, b = divmod(Random(self.seed + index).randrange(400), 20)
        return {"question": f"{a} + {b} = ?", "answer": str(a + b), "metadata": {"a": a, "b": b}}

    def score_answer(self, answer, entry):
        return 1.0 if answer == entry["answer"] else 0.05 * answer.isdigit()


@pytest.fixture
def package(monkeypatch):
    fake, factory = ModuleType("reasoning_gym"), ModuleType("factory")
    factory.DATASETS = {"sums": (Sums, None), "products": (Sums, None)}
    fake.factory = factory
    fake.create_dataset = lambda name, **config: factory.DATASETS[name][0](**config)
    fake.get_score_answer_fn = lambda name: factory.DATASETS[name][0]().score_answer
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)
    monkeypatch.setattr(gym, "SIZES", {"train": 200, "test": 40})


def load(split, seed=0, dataset="reasoning_gym:sums"):
    return load_prompts(DataConfig(dataset=dataset), make_tokenizer(), split, seed)


def test_held_out_questions_are_never_trained_on(package):
    assert has_held_out(DataConfig(dataset="reasoning_gym:sums"))
    questions = {
        split: {e.columns["gym_entry"]["question"] for e in load(split).examples} for split in ("train", "test")
    }
    assert len(load("test")) == 40
    assert 100 < len(load("train")) < 200  # the tasks are small: some problems coincide, and those are left out
    assert not questions["train"] & questions["test"]


def test_seeds_change_the_training_problems_only(package):
    assert load("test", 1).examples == load("test", 2).examples
    assert load("train", 1).examples != load("train", 300).examples


def test_the_tasks_own_scorer_is_the_reward(package):
    examples = load("test").examples[:3]
    answer = examples[0].columns["gym_entry"]["answer"]
    texts = [f"<think>…</think><answer>{answer}</answer>", "<answer>999999</answer>", answer]
    columns = {name: [e.columns[name] for e in examples] for name in ("gym_task", "gym_entry")}
    rewards = resolve_rewards(RewardConfig(), ("reasoning_gym",))
    result = score(rewards, [e.prompt for e in examples], texts, [[]] * 3, columns)
    assert result.per_function.tolist() == [[1.0, 0.05, 0.0]]


def test_prompt_asks_for_tags(package):
    prompt = load("test").examples[0].prompt
    assert prompt[0]["content"].endswith("in <answer> tags.")


@pytest.mark.parametrize(("name", "message"), [("sum", "did you mean 'reasoning_gym:sums'"), ("", "2 tasks")])
def test_unknown_task(package, name, message):
    with pytest.raises(UserError, match=message):
        load("train", dataset=f"reasoning_gym:{name}")


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"reasoning_gym:sums needs .* pip install 'jgrpo\[reasoning-gym\]'"):
        load("train")
