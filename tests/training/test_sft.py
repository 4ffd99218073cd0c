"""Supervised training: which tokens are in the loss, packing that changes nothing, a run that learns and resumes."""

import importlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgrpo import sft
from jgrpo.checkpoints.hf import load_model_config
from jgrpo.cli import load_run_config
from jgrpo.data.packing import epoch_rows, pack
from jgrpo.data.supervised import Pair, load_pairs, rows_of_pairs
from jgrpo.errors import UserError
from jgrpo.export import load_adapter
from jgrpo.sft_config import SftConfig, SftDataConfig
from jgrpo.training import TrainState
from jgrpo.training.loop import Stopped
from jgrpo.training.sft_loop import SupervisedRun, in_microbatches
from jgrpo.training.sft_step import sft_step
from tests.tiny_checkpoints import make_checkpoint, make_tokenizer
from tests.training.setup import MODEL, assert_trees_equal, tiny_base, trained_lora

WIDTH, STEPS = 16, 30
EOS = (256, 258)
WORDS = ("red", "green", "blue", "white")


def test_packing_keeps_every_example_once_and_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 40, 500).tolist()
    rows = pack(lengths, 64, range(500))
    assert sorted(number for row in rows for number in row) == list(range(500))
    assert max(sum(lengths[number] for number in row) for row in rows) <= 64
    assert len(rows) <= -(-sum(lengths) // 64) + 1


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="example 1 has 5 tokens"):
        pack([1, 5], 4, [0, 1])


def test_epochs_differ_and_repeat():
    lengths = [3, 9, 4, 8, 2, 2, 7, 5] * 4
    first, again, second = (epoch_rows(lengths, 16, 0, epoch) for epoch in (0, 0, 1))
    assert first == again != second
    assert [len(row) for row in epoch_rows(lengths, 16, 0, 0, packing=False)] == [1] * 32


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_chat_pair_is_prompt_as_sampled_and_answer_up_to_its_end_token(tmp_path):
    tokenizer = make_tokenizer()
    question = [{"role": "user", "content": "hi"}]
    answers = ["yes", [{"role": "assistant", "content": "yes"}]]
    file = write(tmp_path / "chat.jsonl", [{"prompt": question, "completion": answers[0]}])
    (pair,) = load_pairs(SftDataConfig(dataset=file), tokenizer, EOS).pairs
    assert tokenizer.decode(pair.prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.completion) == "yes<|im_end|>"  # without the line break that the template adds
    file = write(tmp_path / "messages.jsonl", [{"prompt": question, "completion": answers[1]}])
    assert load_pairs(SftDataConfig(dataset=file), tokenizer, EOS).pairs == (pair,)


def test_plain_pair_ends_with_eos_and_long_ones_are_counted(tmp_path):
    tokenizer = make_tokenizer()
    file = write(tmp_path / "t.jsonl", [{"q": "2+2=", "a": "4"}, {"q": "2+2=", "a": "4" * 100}])
    config = SftDataConfig(dataset=file, prompt_column="q", completion_column="a", max_length=WIDTH)
    pairs = load_pairs(config, tokenizer, EOS)
    assert pairs.dropped == 1
    assert pairs.pairs == (Pair([50, 43, 50, 61], [52, tokenizer.eos_token_id]),)


def test_tasks_bring_completions(tmp_path):
    tokenizer = make_tokenizer()
    countdown = load_pairs(SftDataConfig(max_length=4096), tokenizer, EOS)
    assert "</think>" in tokenizer.decode(countdown.pairs[0].completion)
    file = write(tmp_path / "gsm.jsonl", [{"question": "1+1?", "answer": "two\n#### 2"}])
    gsm8k = load_pairs(SftDataConfig(dataset=f"gsm8k:{file}"), tokenizer, EOS)
    assert tokenizer.decode(gsm8k.pairs[0].completion) == "two\n#### 2<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "no column 'completion'"),
        ({"prompt": "a", "completion": ""}, "row 0: column 'completion' is ''"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}, "one message"),
        ({"prompt": "a", "completion": "b" * 2000}, "longer than max_length"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_pairs(SftDataConfig(dataset=write(tmp_path / "bad.jsonl", [row])), make_tokenizer(), EOS)


PAIRS = [Pair([5, 6, 7], [8, 9, 60]), Pair([10], [11, 60]), Pair([12, 13], [14, 15, 16, 60]), Pair([17, 18], [60])]
OPTIMIZER = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)  # lora changes by its gradient


def batch_of(groups, size):
    return in_microbatches(rows_of_pairs(PAIRS, groups, WIDTH, 59), size)


def step(groups, size=2, **changes):
    batch = batch_of(groups, size).replace(**changes)
    state = TrainState.create(jax.tree.map(jnp.copy, trained_lora()), OPTIMIZER, jax.random.key(0))
    return sft_step(state, tiny_base(), batch, model=MODEL, optimizer=OPTIMIZER, remat=False, chunk=64)


@jax.jit
def row_losses(variables, tokens, lengths):
    """−ℓ of every token but the first, from full logits."""
    logits = MODEL.apply(variables, MODEL.apply(variables, tokens, lengths), method="logits")
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


ALONE = [[0], [1], [2], [3]]


def test_loss_is_the_mean_over_completion_tokens():
    """Against rows of one example each, through logits and optax."""
    rows = rows_of_pairs(PAIRS, ALONE, WIDTH, 59)
    losses = row_losses({"params": tiny_base(), "lora": trained_lora()}, rows.tokens, rows.lengths)
    starts_and_ends = [(len(pair.prompt) - 1, len(pair) - 1) for pair in PAIRS]
    total = sum(losses[row, start:end].sum() for row, (start, end) in enumerate(starts_and_ends))
    _, metrics = step(ALONE)
    assert metrics["loss"] == pytest.approx(float(total) / sum(len(pair.completion) for pair in PAIRS), rel=1e-5)
    assert metrics["learning_rate"] == 1.0


@pytest.mark.parametrize(("groups", "size"), [([[2, 0, 1], [3], [], []], 2), ([[3, 1], [0], [2], []], 4)])
def test_packing_and_microbatches_do_not_change_the_gradient(groups, size):
    state, metrics = step(ALONE)
    other, packed = step(groups, size)
    assert packed["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), other.lora, state.lora)


def test_without_completion_tokens_nothing_moves():
    state, metrics = step(ALONE, mask=jnp.zeros((2, 2, WIDTH), bool))
    assert_trees_equal(state.lora, trained_lora())
    assert metrics["updates/skipped"] == 1


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A run of seconds: four prompts, each with its answer."""
    directory = tmp_path_factory.mktemp("sft")
    model = make_checkpoint(directory / "model", "qwen2", tie_word_embeddings=True)
    rows = [{"prompt": f"say {word}:", "completion": word} for word in WORDS]
    file = write(directory / "words.jsonl", rows)
    values = {
        "model": model, "dataset": file, "eval-dataset": file, "group-size": 32, "lora-rank": 8, "max-length": 40,
        "rows-per-step": 2, "microbatch-rows": 1, "learning-rate": 0.01, "steps": STEPS, "eval-every": 10, "save-every": 5,
        "tensorboard": "false",
    }  # fmt: skip
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def metrics_of(directory, without=("time", "throughput", "memory", "step_time")):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(without)} for row in rows]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert sft.main([*flags, "--output-dir", str(directory)]) == 0
    return directory


def test_run_learns_its_examples(finished):
    rows = metrics_of(finished)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert rows[-1]["eval_loss"] < 0.5 * rows[0]["eval_loss"]
    assert rows[-1]["loss"] < 0.5 * rows[1]["loss"]
    assert {"entropy", "grad_norm", "learning_rate", "epoch", "packing/fill", "num_tokens"} <= rows[1].keys()


def test_run_directory(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "adapter", "report.html"} <= names
    config = load_run_config(finished / "config.yaml")
    assert isinstance(config, SftConfig)
    assert config.data.max_length == 40
    assert "2 rows x 40 tokens" in (finished / "report.html").read_text()


def test_generate_takes_the_run(finished, capsys):
    flags = ["--run", str(finished), "--prompt", "say blue:", "--plain", "--max-completion-length", "8"]
    assert importlib.import_module("jgrpo.generate").main([*flags, "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip() in WORDS


def test_stopped_and_resumed_is_uninterrupted(flags, finished, tmp_path, monkeypatch):
    """A signal after step 7 saves it; the rest is bit for bit what it would have been."""
    whole = SupervisedRun._step

    def interrupted(run, step):
        whole(run, step)
        if step == 7:
            run.signals.received = 15

    monkeypatch.setattr(SupervisedRun, "_step", interrupted)
    directory = tmp_path / "run"
    with pytest.raises(Stopped) as stop:
        sft.main([*flags, "--output-dir", str(directory)])
    assert stop.value.code == 143
    monkeypatch.setattr(SupervisedRun, "_step", whole)
    assert sft.main([*flags, "--output-dir", str(directory), "--resume"]) == 0
    assert metrics_of(directory) == metrics_of(finished)
    config = load_run_config(directory / "config.yaml")
    model_config = load_model_config(config.model.model)
    one, other = (load_adapter(run / "adapter", model_config)[0] for run in (directory, finished))
    assert_trees_equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--microbatch-rows", "3"], "--microbatch-rows 3 does not divide --rows-per-step 16"),
        (["--max-length", "0"], "--max-length is 0: expected above 0"),
        (["--num-generations", "4"], "unknown flag --num-generations"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        sft.config_from_args(arguments)


def test_row_longer_than_the_context(flags, tmp_path):
    with pytest.raises(UserError, match="context of 256"):
        sft.main([*flags, "--max-length", "300", "--output-dir", str(tmp_path / "run")])
