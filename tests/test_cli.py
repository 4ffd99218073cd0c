"""Flags, help, other commands' classes, and exit codes."""

import errno
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jgrpo.cli import config_from_args, parse_command, resolve_config, run_command, save_config
from jgrpo.config import ModelSettings, RolloutConfig, TrainConfig
from jgrpo.errors import UserError
from jgrpo.settings import flag, flatten, sections_of, settings_of


def value(name: str, *argv: str) -> object:
    return flatten(config_from_args(argv))[name]


@pytest.mark.parametrize(
    ("argv", "name", "expected"),
    [
        (["--steps", "3"], "steps", 3),
        (["--steps=3"], "steps", 3),
        (["--learning-rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning_rate", "2"], "learning_rate", 2.0),
        (["--output_dir=a_b"], "output_dir", "a_b"),
        (["--epsilon-high", "none"], "epsilon_high", None),
        (["--epsilon-high", "0.28"], "epsilon_high", 0.28),
        (["--dataset", "123"], "dataset", "123"),
        (["--system-prompt", "a, b: 1e-4"], "system_prompt", "a, b: 1e-4"),
        (["--system-prompt", "null"], "system_prompt", None),
        (["--group-size", "128"], "group_size", 128),
        (["--aggregation", "dr_grpo"], "aggregation", "dr_grpo"),
        (["--quantization", "none"], "quantization", "none"),
        (["--resume"], "resume", True),
        (["--resume", "true"], "resume", True),
        (["--remat=false"], "remat", False),
        (["--no-remat"], "remat", False),
        (["--stop-token-ids", "1", "2"], "stop_token_ids", (1, 2)),
        (["--target-modules", "q_proj,v_proj"], "target_modules", ("q_proj", "v_proj")),
        (["--reward-functions", "--steps", "3"], "reward_functions", ()),
        (["--seed", "1", "--seed", "2"], "seed", 2),
    ],
)
def test_flags(argv: list[str], name: str, expected: object):
    assert value(name, *argv) == expected
    assert type(value(name, *argv)) is type(expected)


@pytest.mark.parametrize("name", sorted(settings_of(TrainConfig)))
def test_every_setting_has_a_flag_that_takes_its_own_value(name: str):
    default = flatten(config_from_args([]))[name]
    texts = [str(item) for item in default] if isinstance(default, tuple) else [str(default).lower()]
    texts = [str(default)] if isinstance(default, str) else texts
    assert value(name, flag(name), *texts) == default


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lerning-rate", "3"], "unknown flag --lerning-rate. Did you mean --learning-rate?"),
        (["--lerning-rate=3"], "unknown flag --lerning-rate. Did you mean --learning-rate?"),
        (["--learning"], "unknown flag --learning"),
        (["--optimizer.learning-rate", "3"], "unknown flag --optimizer.learning-rate. Did you mean --learning-rate?"),
        (["--confg", "x"], "Did you mean --config?"),
        (["-x"], "unknown flag -x"),
        (["train"], "unexpected argument 'train'"),
        (["--steps", "3", "4"], "unexpected argument '4'"),
        (["--steps"], "--steps: expected one argument"),
        (["--steps", "ten"], "--steps: 'ten' is not an integer"),
        (["--steps", "1.5"], "--steps: 1.5 is not an integer"),
        (["--steps", ""], "--steps: None is not an integer"),
        (["--steps", "[1"], "--steps: '[1' is not an integer"),
        (["--learning-rate", "fast"], "--learning-rate: 'fast' is not a number"),
        (["--learning-rate", "nan"], "--learning-rate: 'nan' is not a number"),
        (["--resume", "maybe"], "--resume: 'maybe' is not true or false"),
        (["--aggregation", "dap"], "'dap' is not one of "),
        (["--stop-token-ids", "a"], "not a list, each an integer"),
        (["--preset", "dmo"], "unknown preset 'dmo'; there are: "),
        (["--config", "missing.yaml"], "missing.yaml: cannot be read"),
        (["--microbatch-size", "7"], "does not divide"),
        (["--num-generations", "1"], "at least 2"),
    ],
)
def test_bad_flags_are_refused_in_one_line(argv: list[str], words: str):
    with pytest.raises(UserError) as error:
        config_from_args(argv)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_from_python():
    config = resolve_config(preset="demo", overrides={"steps": 3, "target_modules": ["q_proj"]})
    assert config == config_from_args(["--steps", "3", "--target-modules", "q_proj"])
    with pytest.raises(UserError, match=r"unknown setting 'step'\. Did you mean steps\?"):
        resolve_config(overrides={"step": 3})
    with pytest.raises(UserError, match="steps: '3' is not an integer"):
        resolve_config(overrides={"steps": "3"})


def test_help_shows_every_flag_with_its_default_in_its_group(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        config_from_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert [name for name in settings_of(TrainConfig) if f"  {flag(name)} " not in text] == []
    positions = [text.index(f"\n{section}:\n") for section in sections_of(TrainConfig)]
    assert positions == sorted(positions)
    words = " ".join(text.split())
    assert "Rank R (default: 32; demo model: 16)" in words
    assert "Peak learning rate (default: 0.0001; demo model: " in words
    assert max(map(len, text.splitlines())) <= 118


@dataclass(frozen=True)
class Sample:
    """A command with two sections of the training run and settings of its own."""

    prompts: tuple[str, ...]
    """What to continue."""
    run: str | None = None
    """A run whose settings are used."""
    model: ModelSettings = field(default_factory=ModelSettings)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


def sample(*argv: str) -> Sample:
    return parse_command(Sample, argv, prog="sample", description="Sample.")


def test_a_command_declares_its_own_settings_beside_sections():
    arguments = sample("--prompts", "a", "b", "--top-k", "5", "--model", "x/y")
    assert arguments == Sample(("a", "b"), None, ModelSettings("x/y"), RolloutConfig(top_k=5))
    with pytest.raises(UserError, match=r"--prompts is missing: What to continue\."):
        sample()
    with pytest.raises(UserError, match="unknown flag --steps"):
        sample("--prompts", "a", "--steps", "3")


def test_a_command_reads_its_own_sections_of_a_training_file(tmp_path: Path):
    save_config(resolve_config(overrides={"top_p": 0.5, "steps": 3}), tmp_path / "config.yaml")
    path = str(tmp_path / "config.yaml")
    assert sample("--prompts", "a", "--config", path).rollout.top_p == 0.5
    (tmp_path / "config.yaml").write_text("top_pp: 0.5")
    with pytest.raises(UserError, match=r"unknown key 'top_pp'\. Did you mean top_p"):
        sample("--prompts", "a", "--config", path)


def test_a_run_brings_its_settings(tmp_path: Path):
    save_config(resolve_config(overrides={"model": "x/y", "top_p": 0.5, "top_k": 3}), tmp_path / "config.yaml")
    arguments = sample("--prompts", "a", "--run", str(tmp_path), "--top-k", "9")
    assert (arguments.model.model, arguments.rollout.top_p, arguments.rollout.top_k) == ("x/y", 0.5, 9)
    with pytest.raises(UserError, match=r"no config\.yaml in it"):
        sample("--prompts", "a", "--run", str(tmp_path / "nowhere"))


def raising(error: BaseException) -> None:
    raise error


def test_exit_codes(capsys: pytest.CaptureFixture[str]):
    for main, code in [(lambda: None, 0), (lambda: 143, 143), (lambda: raising(KeyboardInterrupt()), 130)]:
        with pytest.raises(SystemExit) as stop:
            run_command(main)
        assert stop.value.code == code
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: raising(UserError("a\n  b")))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a b\n"
    for bug in (ZeroDivisionError(), OSError(errno.EIO, "broken")):
        with pytest.raises(type(bug)):
            run_command(lambda bug=bug: raising(bug))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: Path("/dev/full").write_text("x") and None)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert "--resume" in line


def test_a_process_refuses_bad_input_with_one_line_and_code_2():
    command = [sys.executable, "-m", "jgrpo.report", "--rum", "x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: unknown flag --rum. Did you mean --run? --help lists the flags.\n"
    assert result.stdout == ""
