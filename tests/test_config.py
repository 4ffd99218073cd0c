"""Configuration: YAML files, presets, layers, ranges, batches that divide, and what a resumed run may change."""

from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import pytest

from jgrpo.cli import config_from_args, load_config, resolve_config, save_config
from jgrpo.config import LoraConfig, TrainConfig
from jgrpo.errors import UserError
from jgrpo.settings import attribute_docstrings, build, flatten, preset_names, scalar, settings_of, to_yaml
from jgrpo.sft_config import SftConfig
from jgrpo.validation import (
    RANGES,
    RESUME_MAY_CHANGE,
    check_resume,
    diff_configs,
    nearest_divisors,
    validate,
    with_output_dir,
)

CONTRACT = {"steps", "seed", "output_dir", "resume", "save_every", "eval_every", "prompts_per_step", "num_generations"}
CONTRACT |= {"microbatch_size", "max_prompt_length", "max_completion_length", "learning_rate", "beta", "epsilon"}
CONTRACT |= {"epsilon_high", "model", "dataset"}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def changed(**values: object) -> TrainConfig:
    return build(TrainConfig, flatten(TrainConfig()) | values)


def test_names_that_scripts_rely_on_exist():
    assert set(settings_of(TrainConfig)) >= CONTRACT


def test_every_setting_is_documented():
    assert [name for name, setting in settings_of(TrainConfig).items() if not setting.help] == []


def test_a_docstring_belongs_to_the_field_above_it():
    assert attribute_docstrings(LoraConfig)["lora_rank"] == "Rank R."


def test_two_sections_may_not_share_a_name():
    @dataclass(frozen=True)
    class Twice:
        lora: LoraConfig = field(default_factory=LoraConfig)
        other: LoraConfig = field(default_factory=LoraConfig)

    with pytest.raises(TypeError, match="two sections"):
        settings_of(Twice)


def test_names_in_rules_are_settings():
    named = {name for rule in RANGES for name in rule.names.split()} | RESUME_MAY_CHANGE
    assert named <= {*settings_of(TrainConfig), *settings_of(SftConfig)}


def test_flatten_is_the_inverse_of_build():
    config = changed(steps=7, epsilon_high=0.3, target_modules=("q_proj",))
    assert build(TrainConfig, flatten(config)) == config
    assert config.training.steps == 7


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_valid(preset: str):
    validate(resolve_config(preset=preset))


def test_defaults_are_valid_for_a_real_model():
    config = config_from_args(["--model", "Qwen/Qwen2.5-0.5B-Instruct"])
    assert config == replace(TrainConfig(), model=replace(TrainConfig().model, model="Qwen/Qwen2.5-0.5B-Instruct"))


def test_the_demo_model_brings_its_own_settings():
    demo = config_from_args([])
    assert demo.model.model == "demo"
    assert demo.rollout.max_completion_length < TrainConfig().rollout.max_completion_length
    assert demo == config_from_args(["--model", "demo"]) == config_from_args(["--preset", "demo"])


def test_later_layers_win(tmp_path: Path):
    path = write(tmp_path, "steps: 11\nseed: 12\n")
    config = config_from_args(["--config", str(path), "--preset", "demo", "--seed", "13"])
    demo, default = config_from_args([]), TrainConfig()
    assert config.training.seed == 13  # flag over file
    assert config.training.steps == 11 != demo.training.steps  # file over preset
    assert config.optimizer.learning_rate == demo.optimizer.learning_rate != default.optimizer.learning_rate
    assert config.algorithm == default.algorithm


def test_a_model_in_the_file_leaves_the_demo_settings_out(tmp_path: Path):
    config = config_from_args(["--config", str(write(tmp_path, "model: some/model\n"))])
    assert config.rollout == TrainConfig().rollout


TRICKY = [
    "1e-5",
    "yes",
    "off",
    "12:30",
    "null",
    "~",
    "010",
    "2026-01-02",
    "",
    " x ",
    "a: b #c",
    "é\n\tx",
    "true",
    ".inf",
]


@pytest.mark.parametrize("text", TRICKY)
def test_strings_round_trip(tmp_path: Path, text: str):
    config = changed(system_prompt=text, output_dir=text, reward_functions=(text, "b"))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("number", [1e-5, 3e-4, 1e20, 0.1 + 0.2, 5e-324, 1.0])
def test_numbers_round_trip_bit_for_bit(tmp_path: Path, number: float):
    config = changed(learning_rate=number, epsilon_high=number, stop_token_ids=(1, 2), reward_weights=(number,))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_saved_config_is_complete(tmp_path: Path):
    """So that neither presets nor later defaults can change what it means."""
    config = resolve_config(overrides={"learning_rate": 0.5})
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert [name for name in settings_of(TrainConfig) if f"{name}:" not in text] == []
    assert config_from_args(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2", -2),
        ("3", 3),
        (".5", 0.5),
        ("true", True),
        ("null", None),
        ("yes", "yes"),
        ("1:30", "1:30"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object):
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_nested_and_flat_keys_mean_the_same(tmp_path: Path):
    nested = load_config(write(tmp_path, "optimizer:\n  learning_rate: 1e-6\nmodel: {model: a/b}\n"))
    flat = load_config(write(tmp_path, "learning_rate: 1e-6\nmodel: a/b\n"))
    assert nested == flat
    assert flat.optimizer.learning_rate == 1e-6


def test_an_empty_file_or_section_changes_nothing(tmp_path: Path):
    assert load_config(write(tmp_path, "# nothing\noptimizer:\n")) == config_from_args([])


def test_no_adapter_is_null_in_a_file_and_on_the_command_line(tmp_path: Path):
    model = ["--model", "a/b", "--quantization", "none"]
    given = config_from_args([*model, "--lora", "null"])
    assert given.lora.is_full
    text = "lora: null\nmodel: a/b\nquantization: {quantization: none}\n"
    assert load_config(write(tmp_path, text)) == given
    assert load_config(write(tmp_path, to_yaml(given))) == given
    with pytest.raises(UserError, match=r"--lora null .* add --quantization none"):
        config_from_args(["--model", "a/b", "--lora", "null"])
    with pytest.raises(UserError, match="--lora: 'fals' is not one of adapter or null"):
        config_from_args(["--lora", "fals"])


def test_all_weights_learn_at_a_tenth_of_the_rate_unless_it_is_given():
    full = ["--quantization", "none", "--lora", "null"]
    for model in (["--model", "a/b"], []):  # the demo brings its own rate
        adapter = config_from_args(model).optimizer.learning_rate
        assert config_from_args([*model, *full]).optimizer.learning_rate == pytest.approx(adapter / 10)
    assert config_from_args([*full, "--learning-rate", "1e-3"]).optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1", ["unknown key 'learning_rat'", "Did you mean learning_rate?"]),
        ("optimizer: {learning_rat: 1}", ["unknown key 'optimizer.learning_rat'", "learning_rate"]),
        ("trainig: {steps: 1}", ["unknown key 'trainig'", "training"]),
        ("zzzz: 1", ["unknown key 'zzzz'"]),
        ("training: {learning_rate: 1}", ["training.learning_rate belongs to section optimizer"]),
        ("steps: 1\ntraining: {steps: 2}", ["steps is given twice"]),
        ("steps: 1\nsteps: 2", ["'steps' is given twice, line 1"]),
        ("training: 3", ["section training is 3"]),
        ("model: {model: 3}", ["model: 3 is not a string"]),
        ("steps: ten", ["steps: 'ten' is not an integer"]),
        ("steps: 1.0", ["steps: 1.0 is not an integer"]),
        ("steps: true", ["True is not an integer"]),
        ("steps: '3'", ["'3' is not an integer"]),
        ("steps:", ["None is not an integer"]),
        ("learning_rate: fast", ["'fast' is not a number"]),
        ("epsilon_high: none", ["'none' is not a number or null"]),
        ("resume: yes", ["'yes' is not true or false"]),
        ("dataset: 5", ["5 is not a string"]),
        ("group_size: 63", ["63 is not one of 32, 64, 128"]),
        ("aggregation: dapp", ["'dapp' is not one of grpo, ", "Did you mean dapo?"]),
        ("target_modules: q_proj", ["'q_proj' is not a list, each a string"]),
        ("stop_token_ids: [1, x]", ["not a list, each an integer"]),
        ("- steps", ["expected 'name: value' lines, found list"]),
        ("a: [", ["not valid YAML", "line"]),
        ("a: !!python/object:os.system {}", ["not valid YAML"]),
    ],
)
def test_a_bad_file_is_refused_in_words(tmp_path: Path, text: str, words: list[str]):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert [word for word in [*words, str(path)] if word not in str(error.value)] == []


def test_unreadable_files_are_refused(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "binary"):
        with pytest.raises(UserError, match="Give the path of a YAML file"):
            load_config(path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_generations": 1}, "--num-generations is 1: expected at least 2"),
        ({"temperature": 0.0}, "--temperature is 0.0: expected above 0"),
        ({"top_p": 0.0}, "--top-p is 0.0: expected above 0 and at most 1"),
        ({"top_p": 1.1}, "--top-p is 1.1"),
        ({"top_k": -1}, "--top-k is -1: expected 0 or above"),
        ({"min_p": 1.0}, "--min-p is 1.0"),
        ({"epsilon": 1.0}, "--epsilon is 1.0: expected below 1"),
        ({"epsilon_high": -0.1}, "--epsilon-high -0.1"),
        ({"lora_rank": 0}, "--lora-rank is 0"),
        ({"lora_dropout": 1.0}, "--lora-dropout is 1.0"),
        ({"max_prompt_length": 0}, "--max-prompt-length is 0"),
        ({"max_completion_length": -5}, "--max-completion-length is -5"),
        ({"learning_rate": -1.0}, "--learning-rate is -1.0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan: expected a finite number"),
        ({"beta": float("inf")}, "--beta is inf: expected a finite number"),
        ({"seed": 2**32}, "--seed is 4294967296"),
        ({"steps": 0}, "--steps is 0"),
        ({"target_modules": ()}, "--target-modules is empty"),
        ({"target_modules": ("q_prj",)}, "unknown module 'q_prj'. Did you mean q_proj?"),
        ({"skip_modules": ("lmhead",)}, "unknown module 'lmhead'. Did you mean lm_head?"),
        ({"reward_functions": ("a", "b"), "reward_weights": (1.0,)}, "1 values for 2 reward functions (a, b)"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, object], words: str):
    with pytest.raises(UserError) as error:
        validate(changed(**values))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("total", "value", "expected"),
    [(128, 7, [4, 8]), (16, 64, [16]), (15, 8, [5, 15]), (12, 12, [6]), (13, 5, [1, 13])],
)
def test_nearest_divisors(total: int, value: int, expected: list[int]):
    assert nearest_divisors(total, value) == expected


@pytest.mark.parametrize("microbatch", [3, 7, 100, 1000])
def test_a_microbatch_that_does_not_divide_is_refused_with_settings_that_do(microbatch: int):
    values = {"prompts_per_step": 12, "num_generations": 8, "num_minibatches": 3, "microbatch_size": microbatch}
    if 32 % microbatch == 0:
        validate(changed(**values))
        return
    with pytest.raises(UserError, match="32 completions of an optimizer step") as error:
        validate(changed(**values))
    suggested = [int(word) for word in str(error.value).rsplit("to ", 1)[1].rstrip(".").split(" or ")]
    assert suggested
    for size in suggested:
        validate(changed(**values | {"microbatch_size": size}))


def test_minibatches_that_do_not_divide_are_refused_with_settings_that_do():
    values = {"prompts_per_step": 8, "num_minibatches": 3, "microbatch_size": 1}
    with pytest.raises(UserError, match="set --prompts-per-step to 6 or 9, or --num-minibatches to 2 or 4"):
        validate(changed(**values))
    for better in ({"prompts_per_step": 6}, {"prompts_per_step": 9}, {"num_minibatches": 2}, {"num_minibatches": 4}):
        validate(changed(**values | better))


def test_more_minibatches_than_prompts_never_suggests_zero_prompts():
    with pytest.raises(UserError, match="set --prompts-per-step to 8,"):
        validate(changed(prompts_per_step=5, num_minibatches=8))


def test_resume_may_change_where_and_how_often_but_not_the_maths():
    saved = TrainConfig()
    free = changed(steps=999, output_dir="elsewhere", save_every=1, resume=True, wandb=True, microbatch_size=4)
    assert diff_configs(saved, free) == []
    assert diff_configs(saved, changed(learning_rate=0.5, seed=3, save_every=1)) == ["learning_rate", "seed"]


def test_resume_may_not_change_steps_under_a_schedule_that_ends_with_them():
    saved = changed(lr_schedule="linear")
    assert diff_configs(saved, changed(lr_schedule="linear", steps=999)) == ["steps"]


def test_check_resume_names_each_setting_with_both_values():
    check_resume(TrainConfig(), changed(resume=True))
    with pytest.raises(UserError, match=r"--beta was 0.0, is 0.5; --seed was 0, is 1"):
        check_resume(TrainConfig(), changed(seed=1, beta=0.5))


@pytest.mark.parametrize(
    ("dataset", "name"),
    [("countdown", "countdown"), ("openai/gsm8k", "gsm8k"), ("data/my set.jsonl", "my-set"), ("..", "run")],
)
def test_output_dir_placeholders(dataset: str, name: str):
    config = with_output_dir(changed(dataset=dataset), datetime(2026, 3, 4, 5, 6, 7))
    assert config.run.output_dir == f"runs/{name}-20260304-050607"
    assert with_output_dir(changed(output_dir="x{y}")).run.output_dir == "x{y}"
