"""Completions of several turns: one conversation of tokens, log-probabilities of the trainer's, no loss on what others wrote."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms import objective_from_config
from jgrpo.rollout import FINISH_LENGTH, FINISH_STOP, Prompts, generate, generate_turns
from jgrpo.rollout.multi_turn import Conversation, _continued, _end_turn, _until_stop
from jgrpo.training import Batch
from jgrpo.training.forward import rows_of
from jgrpo.training.step import slice_batch
from tests.rollout.environments import Echo
from tests.training.setup import MANY_EOS, MODEL, PAD, prompts, settings, tiny_base, token_logprobs, trained_lora

LENGTH = 24
CONFIG = dataclasses.replace(settings().rollout, num_generations=3, max_completion_length=LENGTH, max_turns=3)
KEY = jax.random.key(2)


class Letters:
    """Token i is the character i + 40; the end tokens vanish in text, as special tokens do."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) - 40 for c in text]}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(i + 40) for i in ids if i not in MANY_EOS)


class Reply(Echo):
    """As long as `turns` allows: "ABC" behind every turn."""

    turns, answer = 2, "ABC"


class Silent(Echo):
    turns = 0


class Interrupted(Echo):
    """A turn ends at a text of one token or at one of two."""

    stop_strings = ("N", "b", "T", "XY")
    turns, answer = 1, "A"


ABC = [ord(c) - 40 for c in "ABC"]


def converse(kind, config=CONFIG, key=KEY):
    environments = [kind() for _ in range(4 * config.num_generations)]
    for environment in environments:
        environment.reset({})
    model = (MODEL, tiny_base(), trained_lora())
    rollout = generate_turns(
        *model, prompts(), key, config, environments, tokenizer=Letters(), eos_ids=MANY_EOS, pad_id=PAD
    )
    return jax.device_get(rollout), environments


@pytest.fixture(scope="module")
def replied():
    return converse(Reply)


def rows(rollout):
    """(tokens, by the model, finish) of every completion."""
    lengths = rollout.completion_lengths.reshape(-1)
    tokens = rollout.completion_tokens.reshape(-1, LENGTH)
    mask = rollout.loss_mask.reshape(-1, LENGTH)
    finish = rollout.finish.reshape(-1)
    return [(tokens[r, :n].tolist(), mask[r, :n].tolist(), finish[r]) for r, n in enumerate(lengths)]


def runs(tokens, by_model):
    """The conversation in pieces: [(by the model, tokens)]."""
    pieces = []
    for token, own in zip(tokens, by_model, strict=True):
        if not pieces or pieces[-1][0] != own:
            pieces.append((own, []))
        pieces[-1][1].append(token)
    return pieces


def test_turns_and_replies_alternate(replied):
    rollout, environments = replied
    spoke = 0
    for (tokens, by_model, finish), environment in zip(rows(rollout), environments, strict=True):
        pieces = runs(tokens, by_model)
        assert pieces[0][0]
        assert all(piece == ABC for own, piece in pieces if not own)
        turns = [piece for own, piece in pieces if own]
        heard = [Letters().decode(turn, True) for turn in turns]
        assert environment.heard == (heard if finish == FINISH_STOP else heard[: len(environment.heard)])
        assert all(turn[-1] in MANY_EOS for turn in turns[:-1])
        spoke += len(turns) > 1
    assert spoke >= 6  # the end tokens are frequent enough for this to be a test


def test_budget_and_masks(replied):
    rollout, _ = replied
    position = np.arange(LENGTH)
    np.testing.assert_array_equal(rollout.completion_mask, position < rollout.completion_lengths[..., None])
    assert not (rollout.loss_mask & ~rollout.completion_mask).any()
    assert (rollout.logprobs[~rollout.loss_mask] == 0).all()
    assert (rollout.completion_tokens[~rollout.completion_mask] == PAD).all()
    assert set(np.unique(rollout.finish)) == {FINISH_STOP, FINISH_LENGTH}


def test_sampler_agrees_with_the_trainer_in_every_turn(replied):
    rollout, _ = replied
    logprobs, _ = token_logprobs(MODEL, tiny_base(), trained_lora(), rows_of(rollout), chunk=64)
    logprobs = np.asarray(logprobs).reshape(rollout.logprobs.shape)
    np.testing.assert_allclose(logprobs[rollout.loss_mask], rollout.logprobs[rollout.loss_mask], atol=1e-4)
    others = rollout.completion_mask & ~rollout.loss_mask
    assert np.all(logprobs[others] < 0)  # the trainer has numbers for them; only the mask keeps them out


def test_replies_have_no_weight_in_the_loss(replied):
    rollout, _ = replied
    batch = Batch(rollout=rollout, rewards=jnp.ones((4, 3)), advantages=jnp.ones((4, 3)))
    slices = slice_batch(batch, objective_from_config(settings().algorithm), 1, 12)
    weights = np.asarray(slices.weights).reshape(rollout.loss_mask.shape)
    np.testing.assert_array_equal(weights > 0, rollout.loss_mask)
    assert weights.sum() == pytest.approx(1.0)
    np.testing.assert_array_equal(slices.rows.completion_mask.reshape(rollout.loss_mask.shape), rollout.completion_mask)


def test_without_replies_it_is_generate():
    rollout, environments = converse(Silent)
    key = jax.random.fold_in(KEY, 0)
    model = (MODEL, tiny_base(), trained_lora())
    plain = jax.device_get(generate(*model, prompts(), key, CONFIG, eos_ids=MANY_EOS, pad_id=PAD))
    for field in ("completion_tokens", "completion_lengths", "completion_mask", "logprobs", "finish"):
        np.testing.assert_array_equal(getattr(rollout, field), getattr(plain, field))
    np.testing.assert_array_equal(rollout.loss_mask, plain.completion_mask)
    assert all(len(e.heard) == (f == FINISH_STOP) for e, f in zip(environments, plain.finish.reshape(-1), strict=True))


def test_stop_strings_end_a_turn():
    rollout, environments = converse(Interrupted, dataclasses.replace(CONFIG, max_turns=2))
    stopped = 0
    for (tokens, by_model, _), environment in zip(rows(rollout), environments, strict=True):
        for turn, heard in zip([p for own, p in runs(tokens, by_model) if own], environment.heard, strict=False):
            for stop in Interrupted.stop_strings:
                assert stop not in heard[:-1]
            stopped += heard.endswith(Interrupted.stop_strings)
            assert Letters().decode(turn, True) == heard
    assert stopped >= 3


def test_rounds_interrupt_turns_and_nothing_else():
    """Rounds of 5 tokens: the same kind of conversation, whose log-probabilities are still the trainer's."""
    rollout, environments = converse(Reply, dataclasses.replace(CONFIG, round_length=5))
    longest = 0
    for (tokens, by_model, _), environment in zip(rows(rollout), environments, strict=True):
        turns = [piece for own, piece in runs(tokens, by_model) if own]
        heard = [Letters().decode(turn, True) for turn in turns]
        assert environment.heard == heard[: len(environment.heard)]
        assert all(turn[-1] in MANY_EOS and not set(turn[:-1]) & set(MANY_EOS) for turn in turns[:-1])
        longest = max(longest, *map(len, turns))
    assert longest > 5
    logprobs, _ = token_logprobs(MODEL, tiny_base(), trained_lora(), rows_of(rollout), chunk=64)
    logprobs = np.asarray(logprobs).reshape(rollout.logprobs.shape)
    np.testing.assert_allclose(logprobs[rollout.loss_mask], rollout.logprobs[rollout.loss_mask], atol=1e-4)


@pytest.mark.parametrize(("text", "count"), [("abXYcXY", 4), ("XbYXX", None), ("", None), ("XY", 2), ("abN", 3)])
def test_until_stop(text, count):
    assert _until_stop([ord(c) - 40 for c in text], ("N", "XY"), Letters()) == count


def test_stop_string_over_two_rounds_and_what_stands_behind_it():
    environment = Reply()
    environment.reset({})
    conversation = Conversation(environment, budget=40)
    for part in ("abX", "Ycd"):
        ids = [ord(c) - 40 for c in part]
        conversation.extend(ids, [-1.0] * 3, [0.0] * 3)
        _end_turn(conversation, ("XY",), MANY_EOS, Letters(), 8)
    assert environment.heard == ["abXY"]
    assert Letters().decode(conversation.tokens, True) == "abXYABC"
    assert conversation.by_model == [True] * 4 + [False] * 3


def test_last_turn_gets_no_reply():
    environment = Reply()
    environment.reset({})
    conversation = Conversation(environment, budget=40)
    conversation.extend([5, MANY_EOS[0]], [-1.0] * 2, [0.0] * 2)
    _end_turn(conversation, (), MANY_EOS, Letters(), 1)
    assert (conversation.finish, len(conversation.tokens)) == (FINISH_LENGTH, 2)


def test_reply_without_room_for_an_answer_ends_the_conversation():
    conversation = Conversation(Silent(), budget=5)
    conversation.extend([1, 2], [-1.0, -2.0], [0.0, 0.0])
    conversation.add_reply([3, 4, 5])
    assert (conversation.tokens, conversation.finish, conversation.room) == ([1, 2], FINISH_LENGTH, 0)
    conversation.finish = None
    conversation.add_reply([3, 4])
    assert (conversation.tokens, conversation.by_model, conversation.room) == (
        [1, 2, 3, 4],
        [True] * 2 + [False] * 2,
        1,
    )


def test_prompts_of_a_later_round_are_the_live_conversations():
    seen = Prompts(tokens=np.array([[7, 8, 0], [9, 0, 0]]), lengths=np.array([2, 1]))
    conversations = [Conversation(Silent(), 2) for _ in range(4)]
    conversations[3].tokens = [5]
    later, limits = _continued(seen, conversations, [0, 1, 3], PAD)
    assert later.tokens[:3].tolist() == [[7, 8, PAD, PAD, PAD]] * 2 + [[9, 5, PAD, PAD, PAD]]
    assert later.lengths.tolist() == [2, 2, 2, 1]
    assert limits.tolist() == [[2], [2], [1], [0]]
    fewer, limits = _continued(seen, conversations, [3], PAD)
    assert fewer.tokens.tolist() == [[9, 5, PAD, PAD, PAD]]
    assert limits.tolist() == [[1]]


def test_fewer_prompts_at_once_say_the_same(replied):
    rollout, _ = converse(Reply, dataclasses.replace(CONFIG, prompts_at_once=3))
    for one, whole in zip(rows(rollout), rows(replied[0]), strict=True):
        np.testing.assert_array_equal(one[0], whole[0])
        np.testing.assert_array_equal(one[1], whole[1])
