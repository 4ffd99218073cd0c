"""The demo's tokenizer: short, exact, and the same after a trip through a directory."""

import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from jgrpo.data.countdown import rows
from jgrpo.demo import MODEL_PATH
from jgrpo.demo.tokenizer import build_tokenizer

SOLUTION = "<think>\n(3 + 12 = 15) * 5 = 75 no\n9 - (3 + 5 = 8) = 1 yes\n</think>\n<answer>9 - (3 + 5)</answer>"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("text", [SOLUTION, "Grüße, 12345 + x\n\n\t終", "Make 100 from (7) and 99."])
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_try_is_ten_tokens_and_a_question_twelve(tokenizer):
    assert len(tokenizer("(3 + 12 = 15) * 5 = 75 no\n")["input_ids"]) == 10
    assert len(tokenizer("9 - (3 + 5 = 8) = 1 yes\n")["input_ids"]) == 10
    question = [{"role": "user", "content": rows("test", 0)[0]["prompt"]}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert len(ids) == 12


def test_the_shipped_files_are_this_tokenizer(tokenizer):
    shipped = AutoTokenizer.from_pretrained(MODEL_PATH)
    assert type(shipped) is Qwen2Tokenizer
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template
    assert (shipped.eos_token, shipped.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert shipped(SOLUTION)["input_ids"] == tokenizer(SOLUTION)["input_ids"]
