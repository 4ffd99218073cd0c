"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The conventions are PEFT's (https://github.com/huggingface/peft): keys are `base_model.model.<module>.lora_A.weight` with
A `[R, in]` and `lora_B.weight` with B `[out, R]`, and the update is alpha / r (rsLoRA: alpha / √r) · B A. Module names
come from the table that loads checkpoints, so an adapter written here fits the checkpoint its base came from.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from jgrpo.checkpoints.atomic import atomic_directory
from jgrpo.checkpoints.names import adapter_prefixes
from jgrpo.checkpoints.safetensors_io import TensorInfo, read_header, read_rows, write_tensors
from jgrpo.checkpoints.source import read_json, resolve_checkpoint
from jgrpo.config import LoraConfig, TrainConfig
from jgrpo.errors import UserError
from jgrpo.lora import ALL_MODULES, Params, init_lora, module_shapes
from jgrpo.models import ModelConfig
from jgrpo.sft_config import SftConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PARTS = {"a": "lora_A", "b": "lora_B"}
# Settings of PEFT that change the function of the adapter and that jgrpo does not have, with their neutral values.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "fan_in_fan_out": (None, False),
}


def export_adapter(
    out: str | Path,
    lora: Params,
    lora_config: LoraConfig,
    model_config: ModelConfig,
    base_model_name: str,
    *,
    replace: bool = False,
) -> Path:
    """Write `lora` (`{module: {"a": [L, R, in], "b": [L, out, R]}}`, stored as float32) to the directory `out`.

    `base_model_name` is a hub id, a directory (recorded as an absolute path) or "demo". `replace` overwrites an earlier
    adapter. Raises UserError if `out` cannot be written; then nothing of it is left.
    """
    tensors = {
        f"base_model.model.{_in_whole(prefix) if model_config.multimodal else prefix}.{part}.weight": np.asarray(
            lora[module][ours][layer], np.float32
        )
        for layer, module, prefix in _adapted(model_config, lora)
        for ours, part in _PARTS.items()
    }
    modules = sorted(lora)
    # By name alone PEFT would adapt the vision model's projections as well.
    targets = rf".*\.language_model\..*\.({'|'.join(modules)})" if model_config.multimodal else modules
    settings = _peft_config(lora_config, targets, base_model_name)
    with atomic_directory(out, replace=replace) as directory:
        write_tensors(directory / WEIGHTS, tensors)
        (directory / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return Path(out)


def _adapted(model_config: ModelConfig, modules: Any) -> Iterator[tuple[int, str, str]]:
    """(layer, module, Hugging Face name) of every adapted module, layer by layer."""
    prefixes = adapter_prefixes(model_config)
    for layer in range(model_config.num_layers):
        for module in prefixes:
            if module in modules:
                yield layer, module, prefixes[module][layer]


def _in_whole(prefix: str) -> str:
    """The name of a text model's module in the multimodal model that it is part of."""
    return prefix.replace("model.", "model.language_model.", 1)


def _index(path: Path) -> dict[str, TensorInfo]:
    """The adapter's tensors, under the text model's own names; transformers 4 and 5 nest it differently."""
    index = read_header(path / WEIGHTS)
    for nested in (".model.language_model.layers.", ".language_model.model.layers."):
        index = {name.replace(nested, ".model.layers."): info for name, info in index.items()}
    return index


def _peft_config(lora_config: LoraConfig, modules: list[str] | str, base_model_name: str) -> dict[str, Any]:
    local = base_model_name == "demo" or Path(base_model_name).expanduser().is_dir()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(resolve_checkpoint(base_model_name).absolute()) if local else base_model_name,
        "r": lora_config.lora_rank,
        "lora_alpha": lora_config.lora_alpha,
        "lora_dropout": lora_config.lora_dropout,
        "use_rslora": lora_config.use_rslora,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def load_adapter(path: str | Path, model_config: ModelConfig) -> tuple[dict[str, Any], LoraConfig]:
    """The float32 adapter of a PEFT directory, jgrpo's or PEFT's own, and its settings.

    Raises UserError if files are missing or damaged, if the adapter uses something other than plain LoRA on linear
    layers, or if it was made for a model of other shapes.
    """
    path = Path(path).expanduser()
    lora_config = adapter_settings(path)
    settings, index = read_json(path / CONFIG), _index(path)
    modules = lora_config.target_modules
    expected = _expected_shapes(model_config, lora_config)
    _check_fits(path, index, expected, str(settings.get("base_model_name_or_path")))
    stacked: dict[str, Any] = {module: {"a": [], "b": []} for module in modules}
    for name, (module, part, _) in expected.items():
        stacked[module][part].append(read_rows(index[name]).astype(np.float32))
    return {m: {k: jnp.asarray(np.stack(v)) for k, v in parts.items()} for m, parts in stacked.items()}, lora_config


def adapter_settings(path: str | Path) -> LoraConfig:
    """Rank, scale, dropout and modules of a PEFT directory; UserError as of `load_adapter`, but for the base's shapes."""
    path = Path(path).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise UserError(f"{path}: no {name}, so not an adapter in PEFT's safetensors format")
    settings = read_json(path / CONFIG)
    _check_plain(path, settings)
    present = {part for name in read_header(path / WEIGHTS) for part in name.split(".")[-3:-2]}
    return LoraConfig(
        lora_rank=settings["r"],
        lora_alpha=float(settings["lora_alpha"]),
        use_rslora=bool(settings.get("use_rslora", False)),
        lora_dropout=float(settings.get("lora_dropout") or 0.0),
        target_modules=tuple(module for module in ALL_MODULES if module in present),
    )


C = TypeVar("C", TrainConfig, SftConfig)


def replace_by_adapter(config: C) -> C:
    """The configuration with the settings of the adapter that the run starts from, if it starts from one."""
    if config.lora.adapter is None:
        return config
    theirs = adapter_settings(config.lora.adapter)
    # Dropout belongs to the training, not to the adapter.
    lora = replace(theirs, adapter=config.lora.adapter, lora_dropout=config.lora.lora_dropout)
    return replace(config, lora=lora)


def start_adapter(key: Array, lora_config: LoraConfig, model_config: ModelConfig) -> dict[str, Any]:
    """What training starts from: a fresh adapter, or the one that the settings name (UserError if it does not fit)."""
    if lora_config.adapter is None:
        return init_lora(key, lora_config, model_config)
    return load_adapter(lora_config.adapter, model_config)[0]


def _check_plain(path: Path, settings: Mapping[str, Any]) -> None:
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"{path}: peft_type {kind!r} is not supported, expected 'LORA'")
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), int | float):
            raise UserError(f"{path / CONFIG}: {key} is {settings.get(key)!r}, expected a number")
    for key, neutral in _NEUTRAL.items():
        if settings.get(key) not in neutral:
            raise UserError(f"{path}: {key} = {settings[key]!r} is not supported; jgrpo loads plain LoRA adapters")


def _expected_shapes(model_config: ModelConfig, lora_config: LoraConfig) -> dict[str, tuple[str, str, tuple[int, int]]]:
    """`{tensor name: (module, "a" or "b", shape)}`."""
    shapes, rank = module_shapes(model_config), lora_config.lora_rank
    expected = {}
    for _, module, prefix in _adapted(model_config, lora_config.target_modules):
        out, width = shapes[module]
        expected[f"base_model.model.{prefix}.lora_A.weight"] = (module, "a", (rank, width))
        expected[f"base_model.model.{prefix}.lora_B.weight"] = (module, "b", (out, rank))
    return expected


def _check_fits(
    path: Path, index: Mapping[str, TensorInfo], expected: Mapping[str, tuple[str, str, tuple[int, int]]], base: str
) -> None:
    made_for = f"{path}: the adapter (made for {base}) does not fit this model: tensor"
    if unknown := [name for name in index if name not in expected]:
        raise UserError(f"{made_for} {unknown[0]} ({len(unknown)} such) has no place in it; give its own base model")
    for name, (_, _, shape) in expected.items():
        if name not in index:
            raise UserError(f"{made_for} {name} is missing; give its own base model")
        if index[name].shape != shape:
            raise UserError(f"{made_for} {name} has shape {list(index[name].shape)}, expected {list(shape)}")
