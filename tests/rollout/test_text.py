"""Text that arrives in pieces is the text of the whole."""

import numpy as np
import pytest

from jgrpo.rollout.text import TextStream
from tests.tiny_checkpoints import make_tokenizer

TEXTS = [
    "plain",
    "Zürich, naïve – 12 €",
    "日本語のテキスト",
    "👩‍👩‍👧 family 🇨🇭",
    "ends in \N{REPLACEMENT CHARACTER}",
    "",
]


def streamed(tokenizer, ids: list[int], size: int) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(ids[i : i + size]) for i in range(0, len(ids), size)), stream.finish()]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(text: str, size: int) -> None:
    tokenizer = make_tokenizer()
    assert "".join(streamed(tokenizer, tokenizer.encode(text), size)) == text


def test_a_character_of_several_tokens_appears_once_it_is_complete() -> None:
    tokenizer = make_tokenizer()
    assert streamed(tokenizer, tokenizer.encode("a€b"), 1) == ["a", "", "", "€", "b", ""]


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    tokenizer = make_tokenizer()
    assert streamed(tokenizer, tokenizer.encode("a€")[:-1], 1) == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_are_left_out() -> None:
    tokenizer = make_tokenizer()
    ids = [*tokenizer.encode("hi"), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert "".join(streamed(tokenizer, ids, 1)) == "hi"


@pytest.mark.parametrize("seed", range(5))
def test_any_bytes_join_to_what_the_tokenizer_decodes(seed: int) -> None:
    tokenizer = make_tokenizer()
    ids = np.random.default_rng(seed).integers(0, 260, 200).tolist()
    expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(streamed(tokenizer, ids, 3)) == expected
