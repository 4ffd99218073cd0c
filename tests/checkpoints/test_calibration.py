"""What four bits are calibrated on, and `python -m jgrpo.export` with it: the demo's model with an adapter that nearest levels lose."""

import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pytest

from jgrpo import calibration
from jgrpo.checkpoints.calibrated import CHUNK_TOKENS, chunks_of
from jgrpo.checkpoints.dynamic import PROMPTS
from jgrpo.checkpoints.hf import eos_ids, load_base, load_model_config, load_tokenizer, resolve_checkpoint
from jgrpo.checkpoints.train_state import Checkpoints
from jgrpo.cli import save_config
from jgrpo.config import LoraConfig, QuantizationConfig, TrainConfig
from jgrpo.data.countdown import rows as countdown_rows
from jgrpo.errors import UserError
from jgrpo.export import main
from jgrpo.lora import init_lora

LORA = LoraConfig(lora_rank=16, lora_alpha=32.0)


@pytest.fixture(scope="module")
def demo():
    path = resolve_checkpoint("demo")
    return path, load_model_config(path), load_tokenizer(path)


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory):
    """A run directory of the demo's model, whose adapter is as small as the one that the demo trains; nothing is logged."""
    directory = tmp_path_factory.mktemp("run")
    save_config(TrainConfig(lora=LORA), directory / "config.yaml")
    lora = init_lora(jax.random.key(0), LORA, demo[1])
    keys = jax.random.split(jax.random.key(1), len(lora))
    moved = {
        name: {"a": part["a"], "b": 0.01 * jax.random.normal(key, part["b"].shape)}
        for key, (name, part) in zip(keys, lora.items(), strict=True)
    }
    checkpoints = Checkpoints(directory / "checkpoints", keep_last=1)
    checkpoints.save(1, moved, {"step": np.int32(1)}, {})
    checkpoints.close()
    return directory


def export(run, out, *flags):
    return main(["--run", str(run), "--output", str(out), *flags])


def share_of(printed: str) -> float:
    return float(re.search(r"merged model has (-?[\d.]+) times the adapter's effect", printed).group(1))


@pytest.mark.parametrize("flags", [["gptq"], ["gguf", "--gguf-type", "Q4_0"]])
def test_an_adapter_that_nearest_levels_lose_is_exported(run, tmp_path, capsys, flags):
    with pytest.raises(UserError, match=r"refused.*rounding to this dtype takes the adapter away"):
        export(run, tmp_path / "nearest", "--format", *flags, "--calibration-tokens", "0")
    assert "rounding against" not in capsys.readouterr().out
    assert export(run, tmp_path / "out", "--format", *flags) == 0
    printed = capsys.readouterr().out
    assert "completions that the model drew (the run logged none)" in printed
    assert 0.85 < share_of(printed) < 1.15


def log(run, directory, rows):
    """The same run with logged completions."""
    (directory / "completions").mkdir(parents=True)
    for name in ("config.yaml", "checkpoints"):
        (directory / name).symlink_to(run / name)
    for step, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "completions" / f"step_{step:06}.jsonl").write_text(text)
    return directory


def test_logged_completions_are_taken_newest_step_first(run, demo, tmp_path, capsys):
    lines = [{"prompt": f"<|user|>{n}<|assistant|>", "completion": "<think>", "finish": "stop"} for n in range(2)]
    logged = log(run, tmp_path / "run", {9: lines[:1], 10: [{**lines[1], "finish": "length"}]})
    tokenizer = demo[2]
    rows = list(calibration.logged_rows(logged, tokenizer))
    assert [tokenizer.decode(row) for row in rows] == [
        "<|user|>1<|assistant|><think>",
        "<|user|>0<|assistant|><think><|end|>",
    ]
    problems = [row["prompt"] for row in countdown_rows("train", 0)[:64]]
    texts = [{"prompt": f"<|user|>{text}<|end|><|assistant|>", "completion": "<think>\n"} for text in problems]
    logged = log(run, tmp_path / "other", {1: texts})
    assert export(logged, tmp_path / "out", "--format", "gptq", "--calibration-tokens", "1000") == 0
    printed = capsys.readouterr().out
    assert re.search(r"rounding against 9\d\d tokens: completions of the run, and", printed)
    assert 0.7 < share_of(printed) < 1.3


def test_a_file_of_the_user(run, demo, tmp_path, capsys):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"prompt": "ab", "completion": "c"}) + "\n" + json.dumps({"prompt": "d"}) + "\n")
    assert calibration.rows_of_file(str(file), demo[2]) == [demo[2].encode("abc"), demo[2].encode("d")]
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"prompt": [{"role": "user", "content": "12"}]}) + "\n")
    assert demo[2].decode(calibration.rows_of_file(str(chat), demo[2])[0]) == "<|user|>12<|end|><|assistant|>"
    assert export(run, tmp_path / "out", "--format", "gptq", "--calibration", str(file)) == 0
    assert f"tokens: {file}, and a few general prompts" in capsys.readouterr().out


def test_drawn_completions_go_on_from_the_prompts(run, demo):
    path, config, tokenizer = demo
    base = load_base(path, config, QuantizationConfig())
    ends = eos_ids(path, tokenizer)
    rows = calibration.drawn_rows(base, {}, LORA, config, tokenizer, ends)
    texts = [tokenizer.decode(row) for row in rows]
    assert len(rows) == 2 * len(PROMPTS) * calibration.DRAWN
    for prompt in (*PROMPTS, *(f"<|user|>{prompt}<|end|><|assistant|>" for prompt in PROMPTS)):
        drawn = {text for text in texts if text.startswith(prompt)}
        assert len(drawn) > 1
        assert all(len(text) > len(prompt) for text in drawn)
    assert sum(row[-1] in ends for row in rows) > 0
    # No room behind the longest prompt: the prompts alone.
    short = dataclasses.replace(config, max_position_embeddings=max(map(len, map(tokenizer.encode, PROMPTS))))
    assert len(calibration.drawn_rows(base, {}, LORA, short, tokenizer, ends)) == 2 * len(PROMPTS)


def test_the_general_prompts_are_a_tenth_of_what_is_kept(demo):
    _, config, tokenizer = demo
    rows = ([token] * 100 for token in itertools.count())
    kept = calibration.mixed(rows, tokenizer, config, 10_000)
    own = [row for row in kept if len(set(row)) == 1]
    assert [row[0] for row in own] == list(range(90))
    general = kept[len(own) :]
    assert {tuple(row) for row in general} == {tuple(tokenizer.encode(prompt)) for prompt in PROMPTS}
    assert 0.07 < sum(map(len, general)) / sum(map(len, kept)) < 0.13
    # One row and one pass over the prompts at least; long rows are cut off, empty ones left out.
    few = calibration.mixed([[], [5] * 2000], tokenizer, config, 10)
    assert few[0] == [5] * calibration.ROW_TOKENS
    assert len(few) == 1 + len(PROMPTS)
    with pytest.raises(UserError, match="no calibration text has a token"):
        calibration.mixed([[]], tokenizer, config, 100)


def test_rows_are_put_together_by_their_lengths():
    lengths = [1, 128, 129, 300, *[64] * 40]
    chunks = chunks_of([[7] * n for n in lengths])
    assert sum(int(chunk.lengths.sum()) for chunk in chunks) == sum(lengths)
    assert sorted(length for chunk in chunks for length in chunk.lengths if length) == sorted(lengths)
    assert all(chunk.tokens.size <= CHUNK_TOKENS for chunk in chunks)
    assert {chunk.tokens.shape[1] for chunk in chunks} == {128, 256, 384}
    assert all((chunk.tokens == 7 * chunk.real).all() for chunk in chunks)


def test_halves_are_balanced_and_a_repeated_row_is_in_one_of_them():
    rows = [[number] * (100 + number % 3) for number in range(50)]
    chunks = chunks_of(rows + 3 * rows[:4])
    first, second = (
        {int(row[0]) for chunk in chunks for row in chunk.tokens[chunk.halves[half].any(1)]} for half in range(2)
    )
    assert first | second == set(range(50))
    assert not first & second
    assert len(first) == len(second) == 25
    for chunk in chunks:
        np.testing.assert_array_equal(chunk.halves[0] ^ chunk.halves[1], chunk.real)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["gptq", "--calibration-tokens", "-1"], "--calibration-tokens is -1: expected 0 or more"),
        (["merged", "--calibration", "x.jsonl"], "--calibration is for four bits"),
        (["gguf", "--calibration", "x.jsonl"], "--calibration is for four bits"),
        (["gptq", "--calibration", "x.jsonl"], "no such file"),
        (["gptq", "--calibration", "EMPTY"], "no calibration text has a token"),
    ],
)
def test_bad_input(run, tmp_path, flags, message):
    (tmp_path / "empty.jsonl").write_text(json.dumps({"prompt": ""}) + "\n")
    flags = [str(tmp_path / "empty.jsonl") if flag == "EMPTY" else flag for flag in flags]
    with pytest.raises(UserError, match=message):
        export(run, tmp_path / "out", "--format", *flags)
    assert not (tmp_path / "out").exists()
