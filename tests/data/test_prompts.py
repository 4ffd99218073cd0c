"""Loading, tokenizing and fitting prompts, and what is said about bad ones."""

import csv
import json

import numpy as np
import pytest

from jgrpo.config import DataConfig
from jgrpo.data import check_context, has_held_out, load_prompts, pad_prompts, repeat_columns
from jgrpo.demo.tokenizer import build_tokenizer
from jgrpo.errors import UserError

ROWS = [
    {"prompt": "1 2 3", "answer": "6"},
    {"prompt": "4 5", "answer": "9"},
    {"prompt": "1 2 3 4 5 6 7 8", "answer": "36"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def plain_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def jsonl(tmp_path):
    return lambda rows: write(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_file_format_gives_the_same_prompts(tmp_path, tokenizer, suffix):
    rows = [{**row, "answer": f"n{row['answer']}"} for row in ROWS]
    loaded = load_prompts(DataConfig(dataset=write(tmp_path / f"rows.{suffix}", rows)), tokenizer)
    assert [e.prompt for e in loaded.examples] == [row["prompt"] for row in ROWS]
    assert [e.columns for e in loaded.examples] == [{"answer": row["answer"]} for row in rows]
    assert loaded.example(1).token_ids == tokenizer("4 5")["input_ids"]


def test_messages_go_through_the_chat_template(jsonl, tokenizer):
    messages = [{"role": "user", "content": "1 2"}]
    loaded = load_prompts(DataConfig(dataset=jsonl([{"prompt": messages}])), tokenizer)
    assert loaded.example(0).prompt == messages
    assert tokenizer.decode(loaded.example(0).token_ids) == "<|user|>1 2<|end|><|assistant|>"


def test_a_last_assistant_message_is_continued(jsonl, tokenizer):
    messages = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "<think>"}]
    loaded = load_prompts(DataConfig(dataset=jsonl([{"prompt": messages}])), tokenizer)
    assert tokenizer.decode(loaded.example(0).token_ids) == "<|user|>1 2<|end|><|assistant|><think>"


def test_the_system_prompt_makes_messages_of_a_string(jsonl, tokenizer):
    loaded = load_prompts(DataConfig(dataset=jsonl(ROWS), system_prompt="7"), tokenizer)
    assert tokenizer.decode(loaded.example(1).token_ids) == "<|system|>7<|end|><|user|>4 5<|end|><|assistant|>"
    assert [m["role"] for m in loaded.example(1).prompt] == ["system", "user"]


def test_a_built_in_task_asks_in_a_user_message_or_in_plain_text(tokenizer, plain_tokenizer):
    chat, plain = (load_prompts(DataConfig(), t).example(0) for t in (tokenizer, plain_tokenizer))
    assert chat.prompt == [{"role": "user", "content": plain.prompt}]
    assert set(chat.columns) == {"nums", "target"}


def test_held_out_prompts_of_a_task_share_no_numbers_with_training(tokenizer):
    train, test = (load_prompts(DataConfig(), tokenizer, split) for split in ("train", "test"))
    numbers = [{tuple(sorted(e.columns["nums"])) for e in d.examples} for d in (train, test)]
    assert numbers[0]
    assert numbers[1]
    assert not numbers[0] & numbers[1]


def test_long_prompts_are_dropped_and_counted(jsonl, tokenizer):
    loaded = load_prompts(DataConfig(dataset=jsonl(ROWS), max_prompt_length=3), tokenizer)
    assert (len(loaded), loaded.dropped, loaded.truncated) == (2, 1, 0)


def test_or_keep_their_last_tokens_and_are_counted(jsonl, tokenizer):
    config = DataConfig(dataset=jsonl(ROWS), max_prompt_length=3, overlong_prompts="truncate")
    loaded = load_prompts(config, tokenizer)
    assert (len(loaded), loaded.dropped, loaded.truncated) == (3, 0, 1)
    assert tokenizer.decode(loaded.example(2).token_ids) == " 6 7 8"


def test_batches_are_right_padded(jsonl, tokenizer):
    loaded = load_prompts(DataConfig(dataset=jsonl(ROWS)), tokenizer)
    tokens, lengths = pad_prompts(loaded.examples[:2], 4, pad_id=9)
    assert tokens.dtype == lengths.dtype == np.int32
    assert lengths.tolist() == [3, 2]
    assert tokens[1].tolist() == [*loaded.example(1).token_ids, 9, 9]


def test_columns_repeat_for_each_completion(jsonl, tokenizer):
    loaded = load_prompts(DataConfig(dataset=jsonl(ROWS)), tokenizer)
    assert repeat_columns(loaded.examples[:2], 2) == {"answer": ["6", "6", "9", "9"]}


def test_gsm8k_from_a_file(jsonl, tokenizer):
    row = {"question": "How many?", "answer": "First 1,000 and 200.\n#### 1,200"}
    loaded = load_prompts(DataConfig(dataset=f"gsm8k:{jsonl([row])}"), tokenizer)
    assert loaded.example(0).columns == {"answer": "1200", "solution": row["answer"]}
    assert loaded.example(0).prompt[0]["content"].startswith("How many?\n")


def test_which_data_sets_have_held_out_prompts(jsonl):
    assert has_held_out(DataConfig())
    assert has_held_out(DataConfig(dataset="gsm8k"))
    assert not has_held_out(DataConfig(dataset=jsonl(ROWS)))
    assert has_held_out(DataConfig(dataset=jsonl(ROWS), eval_dataset="countdown"))


BAD = [
    (
        "prompt_column",
        [{"promt": "1", "answer": "2"}],
        {},
        "no column 'prompt', only: promt, answer; did you mean 'promt'",
    ),
    ("empty file", [], {}, "is empty"),
    (
        "too long",
        ROWS,
        {"max_prompt_length": 1},
        "all 3 prompts are longer than max_prompt_length 1 (the shortest has 2",
    ),
    ("number", [{"prompt": 7}], {}, "row 0: column 'prompt' is '7'; expected a non-empty string or a list of messages"),
    ("empty prompt", [{"prompt": "1"}, {"prompt": ""}], {}, "row 1: column 'prompt' is ''"),
    ("no role", [{"prompt": [{"content": "x"}]}], {}, "row 0: column 'prompt'"),
    (
        "two systems",
        [{"prompt": [{"role": "system", "content": "x"}]}],
        {"system_prompt": "y"},
        "leave one of them out",
    ),
]


@pytest.mark.parametrize(("rows", "settings", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_data_is_one_clear_line(jsonl, tokenizer, rows, settings, message):
    with pytest.raises(UserError) as caught:
        load_prompts(DataConfig(dataset=jsonl(rows), **settings), tokenizer)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("countdow", "did you mean 'countdown'"),
        ("missing.jsonl", "no such file"),
        ("countdown.csv", "no such file"),
        ("rows.txt", "is none of a built-in task"),
        ("countdown:rows.jsonl", "takes no source"),
    ],
)
def test_an_unknown_data_set_is_one_clear_line(tokenizer, dataset, message):
    with pytest.raises(UserError, match=message):
        load_prompts(DataConfig(dataset=dataset), tokenizer)


def test_a_file_that_is_no_json_is_one_clear_line(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("{not json\n")
    with pytest.raises(UserError, match="cannot be read as jsonl") as caught:
        load_prompts(DataConfig(dataset=str(path)), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"system_prompt": "x"}])
def test_chat_needs_a_template(jsonl, plain_tokenizer, settings):
    rows = ROWS if settings else [{"prompt": [{"role": "user", "content": "1"}]}]
    with pytest.raises(UserError, match="no chat template"):
        load_prompts(DataConfig(dataset=jsonl(rows), **settings), plain_tokenizer)


def test_a_template_that_refuses_a_role_is_one_clear_line(jsonl, tokenizer):
    strict = build_tokenizer()
    strict.chat_template = "{{ raise_exception('system role not supported') }}"
    with pytest.raises(UserError, match="system role not supported"):
        load_prompts(DataConfig(dataset=jsonl(ROWS), system_prompt="x"), strict)


def test_held_out_prompts_that_do_not_exist(jsonl, tokenizer):
    with pytest.raises(UserError, match="set eval_dataset, or eval_every to 0"):
        load_prompts(DataConfig(dataset=jsonl(ROWS)), tokenizer, "test")


def test_a_gsm8k_row_without_final_number(jsonl, tokenizer):
    with pytest.raises(UserError, match="row 0: the answer 'seven' does not end in"):
        load_prompts(DataConfig(dataset=f"gsm8k:{jsonl([{'question': '?', 'answer': 'seven'}])}"), tokenizer)


def test_prompt_and_completion_must_fit_the_context():
    check_context(64, 64, 128)
    with pytest.raises(
        UserError, match=r"64 \+ max_completion_length 65 = 129 exceeds .* 128 positions; lower them by 1"
    ):
        check_context(64, 65, 128)
