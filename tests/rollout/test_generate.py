"""`jgrpo.generate` and the command, on a tiny checkpoint with a byte-level tokenizer."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jgrpo
from jgrpo.checkpoints.adapter import export_adapter
from jgrpo.cli import save_config
from jgrpo.config import LoraConfig, ModelSettings, RolloutConfig, TrainConfig
from jgrpo.errors import UserError
from jgrpo.generate import LoadedModel, load, load_run, main
from jgrpo.lora import init_lora
from tests.tiny_checkpoints import make_checkpoint

SETTINGS = dict(max_completion_length=12, num_generations=4, seed=3)
PROMPTS = ["two plus two is", "x", "The capital of France is"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return load(checkpoint)


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(lora_rank=4, lora_alpha=16.0)
    lora = init_lora(jax.random.key(0), config, model.policy.model.config)
    lora = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape), lora)
    directory = tmp_path_factory.mktemp("run") / "adapter"
    return export_adapter(directory, lora, config, model.policy.model.config, str(checkpoint))


def test_one_call_with_a_list_of_strings(checkpoint: Path, model: LoadedModel) -> None:
    texts = jgrpo.generate(checkpoint, PROMPTS, **SETTINGS)
    assert [len(group) for group in texts] == [4, 4, 4]
    assert all(isinstance(text, str) for group in texts for text in group)
    assert [len(set(group)) for group in texts] == [4, 4, 4]
    assert texts == jgrpo.generate(model, PROMPTS, **SETTINGS)
    assert texts != jgrpo.generate(model, PROMPTS, **{**SETTINGS, "seed": 4})


def test_batches_do_not_change_greedy_completions(model: LoadedModel) -> None:
    settings = dict(max_completion_length=12, temperature=0.0)
    together = jgrpo.generate(model, PROMPTS, **settings)
    assert together == jgrpo.generate(model, PROMPTS, batch_size=2, **settings)


def test_messages_go_through_the_chat_template(model: LoadedModel) -> None:
    messages = [{"role": "user", "content": "hi"}]
    rendered = model.policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    settings = dict(max_completion_length=12, temperature=0.0)
    assert jgrpo.generate(model, [messages], **settings) == jgrpo.generate(model, [rendered], **settings)


def test_an_adapter_changes_the_completions(checkpoint: Path, model: LoadedModel, adapter: Path) -> None:
    settings = dict(max_completion_length=12, temperature=0.0)
    assert load(checkpoint, adapter).policy.model.lora.scale == 4.0
    assert jgrpo.generate(checkpoint, PROMPTS, adapter, **settings) != jgrpo.generate(model, PROMPTS, **settings)


def test_no_prompts_no_completions(model: LoadedModel) -> None:
    assert jgrpo.generate(model, []) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ("one string", {}, "put it in brackets"),
        (["x"], dict(temperature=-1.0), "temperature is -1.0"),
        (["x"], dict(top_p=0.0), "top-p is 0.0"),
        (["x"], dict(num_generations=0), "num_generations is 0"),
        (["x" * 250], dict(max_completion_length=12), "exceeds the model's context of 256"),
        ([""], {}, "no tokens"),
        (["x"], dict(adapter="elsewhere"), "loaded already"),
    ],
)
def test_bad_input_is_one_line(model: LoadedModel, prompts, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        jgrpo.generate(model, prompts, **settings)


def test_the_command_streams_what_the_function_returns(
    checkpoint: Path, model: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(checkpoint), "--max-completion-length", "12", "--temperature", "0"]
    assert main([*flags, "--prompt", "two plus", "--plain"]) == 0
    plain = capsys.readouterr().out
    assert plain == jgrpo.generate(model, ["two plus"], max_completion_length=12, temperature=0.0)[0][0] + "\n"
    main([*flags, "--prompt", "two plus"])
    chat = [{"role": "user", "content": "two plus"}]
    assert (
        capsys.readouterr().out == jgrpo.generate(model, [chat], max_completion_length=12, temperature=0.0)[0][0] + "\n"
    )


@pytest.fixture(scope="module")
def run(checkpoint: Path, adapter: Path) -> Path:
    """A run directory as training leaves it, its sampling settings included."""
    sampling = RolloutConfig(max_completion_length=12, temperature=0.5)
    config = TrainConfig(model=ModelSettings(model=str(checkpoint)), rollout=sampling)
    save_config(config, adapter.parent / "config.yaml")
    return adapter.parent


def test_the_command_takes_an_adapter_or_a_run(
    checkpoint: Path, adapter: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = jgrpo.generate(checkpoint, ["two plus"], adapter, max_completion_length=12, temperature=0.0)[0][0]
    flags = ["--prompt", "two plus", "--plain", "--temperature", "0"]
    main([*flags, "--model", str(checkpoint), "--max-completion-length", "12", "--adapter", str(adapter)])
    assert capsys.readouterr().out == expected + "\n"
    main([*flags, "--run", str(run)])
    assert capsys.readouterr().out == expected + "\n"


def test_a_run_is_loaded_as_it_was_trained(checkpoint: Path, adapter: Path, run: Path, tmp_path: Path) -> None:
    settings = dict(max_completion_length=12, temperature=0.0)
    expected = jgrpo.generate(checkpoint, PROMPTS, adapter, **settings)
    assert jgrpo.generate(load_run(run), PROMPTS, **settings) == expected
    with pytest.raises(UserError, match="output directory"):
        load_run(tmp_path)


def test_bad_flags_of_the_command_are_one_line(run: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match="--prompt is missing"):
        main([])
    with pytest.raises(UserError, match="two adapters"):
        main(["--prompt", "x", "--run", str(run), "--adapter", str(adapter)])
    with pytest.raises(UserError, match="--plain"):
        main(["--prompt", "x", "--run", str(run), "--system-prompt", "s", "--plain"])


def test_importing_the_package_loads_nothing_and_the_name_is_callable_either_way() -> None:
    code = (
        "import sys, jgrpo; assert 'jax' not in sys.modules; f = jgrpo.generate; "
        "import jgrpo.generate; assert f is jgrpo.generate and callable(f)"
    )
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], check=True)
