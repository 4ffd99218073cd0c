"""Claiming the directory of a run: a new one must be unused, a resumed one must hold the same settings."""

import dataclasses
import os
from pathlib import Path
from typing import TypeVar

from jgrpo.cli import load_config, save_config
from jgrpo.config import TrainConfig
from jgrpo.errors import UserError
from jgrpo.sft_config import AnyConfig, SftConfig
from jgrpo.validation import check_resume, with_output_dir

C = TypeVar("C", TrainConfig, SftConfig)
CONFIG, CHECKPOINTS, ADAPTER, MODEL = "config.yaml", "checkpoints", "adapter", "model"


def check_directory(config: C) -> C:
    """The configuration with its output directory's name filled in; writes nothing.

    Raises:
        UserError: the directory cannot be written, is in use, or (resuming) is not a run's or has other settings.
    """
    return _resumed(config) if config.run.resume else _started(config)


def _started(config: C) -> C:
    config = with_output_dir(config)
    directory = Path(config.run.output_dir)
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(
            f"output_dir {directory} is not empty: give another one, or --resume to continue the run that is in it"
        )
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(
            f"output_dir {directory} cannot be made: {existing} is not a writable directory; give another one"
        )
    return config


def _resumed(config: C) -> C:
    directory = Path(config.run.output_dir)
    if "{time}" in config.run.output_dir:
        raise UserError("--resume needs --output-dir: the directory of the run to continue")
    if not (directory / CONFIG).is_file():
        raise UserError(f"--resume: {directory} holds no {CONFIG}, so there is no run to continue in it")
    saved = load_config(directory / CONFIG, type(config))
    if not config.quantization.wide_matrices:  # what a dynamic run chose at its start
        wide = saved.quantization.wide_matrices
        config = dataclasses.replace(config, quantization=dataclasses.replace(config.quantization, wide_matrices=wide))
    check_resume(saved, config)
    return config


def claim_directory(config: AnyConfig) -> None:
    """Make the directory and write `config.yaml` into it.

    Raises:
        UserError: the file system refuses.
    """
    directory = Path(config.run.output_dir)
    # `resume` is a way of starting, not a property of the run.
    saved = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=False))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f".{CONFIG}"
        save_config(saved, temporary)
        temporary.replace(directory / CONFIG)
    except OSError as error:
        raise UserError(f"output_dir {directory} cannot be written ({error.strerror}): give another one") from error
