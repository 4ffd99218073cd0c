"""The Countdown task: what its enumeration promises."""

from jgrpo.data import countdown
from jgrpo.rewards.answers import countdown_score
from jgrpo.rewards.arithmetic import evaluate


def test_expressions_are_what_they_claim():
    found = {e.text: e.value for e in countdown.expressions((3, 5, 7))}
    assert found["(3 + 5) * 7"] == 56
    assert found["7 - (5 - 3)"] == 5
    assert "(5 - 7) * 3" not in found, "intermediate values stay non-negative"
    assert "(5 * 7) * 3" not in found, "105 is above 99"
    for text, value in found.items():
        exact, used = evaluate(text)
        assert exact == value
        assert sorted(used) == [3, 5, 7]


def test_every_target_is_reachable_and_scored_as_such():
    for numbers, target in countdown.problems("test"):
        right = [e for e in countdown.expressions(numbers) if e.value == target]
        assert right, (numbers, target)
        assert countdown_score(f"<answer>{right[0].text}</answer>", numbers, target) == 1.0


def test_the_splits_share_no_set_of_numbers():
    train = {numbers for numbers, _ in countdown.problems("train")}
    test = {numbers for numbers, _ in countdown.problems("test")}
    assert not train & test
    assert 0.1 < len(test) / (len(train) + len(test)) < 0.3


def test_the_seed_reorders_the_same_problems():
    def content(seed):
        return [(tuple(row["nums"]), row["target"]) for row in countdown.rows("train", seed)]

    assert content(0) == content(0)
    assert content(0) != content(1)
    assert sorted((tuple(sorted(n)), t) for n, t in content(0)) == sorted((tuple(sorted(n)), t) for n, t in content(1))


def test_the_prompt_names_numbers_and_target():
    row = countdown.rows("train", 0)[0]
    a, b, c = row["nums"]
    assert row["prompt"].startswith(f"Combine {a}, {b}, {c} with + - * / to make {row['target']}. ")
