"""The command line of every `python -m jgrpo.…` command, generated from its configuration class.

Layers, later ones win: class defaults < the demo model's preset (if the model is "demo") <
`--preset` < `--config` < flags. Bad input becomes a `UserError`, which `run_command` prints as one
line before it exits with code 2.

The flags are argparse's, not those of a dataclass-to-CLI library: argparse lets `error` be overridden, so a
flag and a key in a file are refused by the same code in the same words, and the core install
stays smaller. (tyro, the best candidate, reports errors as boxes and has no public hook for them.)
"""

import argparse
import errno
import io
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar

from jgrpo.config import MEMORY_DIAL, DataConfig, TrainConfig
from jgrpo.errors import UserError
from jgrpo.settings import (
    Layer,
    Setting,
    build,
    check_value,
    expectation,
    flag,
    nearest,
    preset_names,
    preset_path,
    read_layer,
    scalar,
    sections_of,
    settings_of,
    to_yaml,
)
from jgrpo.sft_config import AnyConfig, SftConfig, SftDataConfig
from jgrpo.validation import validate

C = TypeVar("C")
DEMO = "demo"
COMMANDS = (TrainConfig, SftConfig)
"""What a file of settings may speak of: a command reads its own part and leaves the rest to the other."""


def config_from_args(argv: Sequence[str] | None = None, *, prog: str = "python -m jgrpo.train") -> TrainConfig:
    """The validated configuration of a training run from a command line (None: `sys.argv[1:]`).

    Raises UserError for bad input; exits with code 0 after `--help`.
    """
    description = "Train a language model with GRPO. With no arguments: the built-in demo, offline, on a CPU."
    config = parse_command(TrainConfig, argv, prog=prog, description=description)
    validate(config)
    return config


def resolve_config(
    *, preset: str | None = None, config: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The same from Python: `resolve_config(preset="demo", overrides={"steps": 3})`."""
    table = settings_of(TrainConfig)
    values = dict(overrides or {})
    for name in values:
        if name not in table:
            raise UserError(f"unknown setting {name!r}.{nearest(name, table)}")
    values = {name: check_value(table[name], value, name) for name, value in values.items()}
    resolved = build(TrainConfig, _merge(TrainConfig, preset, [config] if config else [], values))
    validate(resolved)
    return resolved


def load_config(path: str | Path, cls: type[C] = TrainConfig) -> C:
    """A configuration from a YAML file: `save_config`'s, or a partial one over the defaults."""
    return build(cls, _merge(cls, None, [path], {}))


def load_run_config(path: str | Path) -> AnyConfig:
    """The configuration of a finished run, of whichever command wrote it."""
    is_supervised = SftDataConfig.__dataclass_fields__.keys() - DataConfig.__dataclass_fields__.keys()
    return load_config(path, SftConfig if is_supervised & read_layer(path, SftConfig, COMMANDS).keys() else TrainConfig)


def save_config(config: Any, path: str | Path) -> None:
    """Write every setting as YAML; `load_config` gives the same object back."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def parse_command(cls: type[C], argv: Sequence[str] | None = None, *, prog: str, description: str) -> C:
    """A command's configuration class from its command line; flags are the class's settings.

    `cls` is a dataclass of sections (classes of `jgrpo.config`) and fields of its own. With sections it
    also gets `--config` and `--preset`, whose training settings outside `cls` are ignored; if it
    has a setting `run`, that run's config.yaml is the layer under `--config`.
    Raises UserError for unknown flags, wrong types and missing values. Ranges are `validate`'s job.
    """
    argv = [_hyphenated(token) for token in (sys.argv[1:] if argv is None else argv)]
    parser = make_parser(cls, prog, description)
    given, unknown = parser.parse_known_args(argv)
    _refuse_unknown(unknown, settings_of(cls))
    texts = vars(given)
    preset, config = texts.pop("preset", None), texts.pop("config", None)
    table = settings_of(cls)
    flags = {name: check_value(table[name], from_text(table[name], text), flag(name)) for name, text in texts.items()}
    return build(cls, _merge(cls, preset, [*_run_config(cls, flags), *([config] if config else [])], flags))


def _run_config(cls: type, flags: Layer) -> list[Path]:
    run = flags.get("run")
    if run is None or not sections_of(cls):
        return []
    path = Path(run, "config.yaml")
    if not path.is_file():
        raise UserError(f"--run {run}: no config.yaml in it. Give the output directory of a training run.")
    return [path]


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit: 0 or its return value, 2 after a UserError or on a full disk, 130 after Ctrl-C.

    Other exceptions keep their traceback: they are bugs, not input.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a model's characters must not crash a terminal that lacks them
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(
            f"error: {error.strerror}{where}. Free some space; --resume continues a run from its last checkpoint.",
            file=sys.stderr,
        )
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _merge(cls: type, preset: str | None, files: Sequence[str | Path], flags: Layer) -> Layer:
    upper: Layer = {}
    for path in ([preset_path(preset)] if preset else []) + [*map(Path, files)]:
        upper |= _with_dial(read_layer(path, cls, COMMANDS))
    upper |= _with_dial(flags)
    table = settings_of(cls)
    is_demo = "model" in table and upper.get("model", table["model"].default) == DEMO
    demo = read_layer(preset_path(DEMO), cls, COMMANDS) if is_demo else {}
    return _with_full_rate(demo | upper, "learning_rate" in upper, table)


def _with_full_rate(layer: Layer, is_given: bool, table: Mapping[str, Setting]) -> Layer:
    """The layer with a tenth of the learning rate, unless it is given, where the whole model is trained."""
    if is_given or "learning_rate" not in table or layer.get("lora", "adapter") is not None:
        return layer
    return {**layer, "learning_rate": layer.get("learning_rate", table["learning_rate"].default) / 10}


def _with_dial(layer: Layer) -> Layer:
    """The layer with what its `memory` stands for under its other values."""
    return {**MEMORY_DIAL[layer["memory"]], **layer} if "memory" in layer else layer


def _hyphenated(token: str) -> str:
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value if token.startswith("--") else token


def _refuse_unknown(tokens: Sequence[str], table: Mapping[str, Setting]) -> None:
    if not tokens:
        return
    token = tokens[0].partition("=")[0]
    if not token.startswith("-"):
        raise UserError(f"unexpected argument {token!r}: every value follows its flag; --help lists the flags.")
    known = [flag(name) for name in table] + ["--config", "--preset"]
    raise UserError(f"unknown flag {token}.{nearest(token, known)} --help lists the flags.")


def from_text(setting: Setting, text: Any) -> Any:
    """The value that a flag's text stands for, by the rules of the YAML files; its type is checked later.

    Text stays text where the setting takes a string; several values are a list, split at commas too.
    """
    if isinstance(text, list):
        element = Setting("", "", setting.annotation.__args__[0], None, "")
        return [from_text(element, part) for item in text for part in item.split(",") if part]
    if NoneType in setting.alternatives and text.lower() in ("none", "null"):
        return None
    takes_text = str in setting.alternatives or any(isinstance(choice, str) for choice in setting.choices)
    return text if takes_text else scalar(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}. --help lists the flags.")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns - 2, 118)
        super().__init__(prog, max_help_position=34, width=width)


def make_parser(cls: type, prog: str, description: str) -> argparse.ArgumentParser:
    """argparse parser with one group of flags for each section; values are left as text."""
    parser = _Parser(
        prog,
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        usage=f"{prog} {'[--config FILE.yaml] [--preset NAME] ' if sections_of(cls) else ''}[--flag VALUE ...]",
        epilog="Later wins: defaults, the demo model's preset, --preset, --config, flags."
        if sections_of(cls)
        else None,
    )
    demo = read_layer(preset_path(DEMO), cls, COMMANDS)
    groups = {"": parser.add_argument_group("command")}
    if sections_of(cls):
        _add_layer_flags(groups[""])
    for name, section in sections_of(cls).items():
        groups[name] = parser.add_argument_group(name, (section.__doc__ or "").strip().splitlines()[0])
    for setting in settings_of(cls).values():
        _add_flag(groups[setting.section], setting, demo.get(setting.name, setting.default))
    return parser


def _add_layer_flags(group: Any) -> None:
    presets = ", ".join(preset_names())
    group.add_argument("--config", metavar="FILE.yaml", help="settings from a file (a run saves its own: config.yaml)")
    group.add_argument("--preset", metavar="NAME", help=f"settings shipped with jgrpo: {presets}")


def _add_flag(group: Any, setting: Setting, demo_value: Any) -> None:
    name, help_text = flag(setting.name), _help(setting, demo_value)
    if setting.annotation is bool:
        group.add_argument(name, nargs="?", const="true", metavar="true|false", help=help_text)
        group.add_argument(
            "--no" + name[1:], dest=setting.name, action="store_const", const="false", help=argparse.SUPPRESS
        )
    elif setting.is_tuple:
        group.add_argument(name, nargs="*", metavar="VALUE", help=help_text)
    else:
        group.add_argument(name, metavar=_metavar(setting), help=help_text)


def _metavar(setting: Setting) -> str:
    if setting.choices:
        return "|".join([*map(str, setting.choices), *(["null"] if NoneType in setting.alternatives else [])])
    words = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
    return words.get(setting.alternatives[0]) or expectation(setting.annotation).upper()


def _help(setting: Setting, demo_value: Any) -> str:
    shown = "required" if setting.default is MISSING else f"default: {_shown(setting.default)}"
    if demo_value != setting.default:
        shown += f"; demo model: {_shown(demo_value)}"
    return f"{setting.help.rstrip('.')} ({shown})".replace("%", "%%")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "empty"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
