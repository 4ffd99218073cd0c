"""Find a Hugging Face checkpoint and index its tensors, without reading their data.

A checkpoint is a local directory, a hub id (downloaded by `huggingface_hub` into its cache), or "demo", the model
shipped with jgrpo. It holds `model.safetensors`, or shards listed by `model.safetensors.index.json`.

Of a model that also sees images (Gemma 3 from 4B on) the text model is taken, under the names that it has alone; an
adapter's names keep their place in the whole model, so that PEFT finds it.
"""

import dataclasses
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jgrpo.checkpoints.safetensors_io import TensorInfo, read_header
from jgrpo.errors import UserError
from jgrpo.models import ModelConfig, model_config_from_hf
from jgrpo.models.families import FAMILIES

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
# The same weights once more, in their authors' own format.
_NOT_DOWNLOADED = ("consolidated*", "original/*")
_TEXT_MODELS = {"gemma3": "gemma3_text"}
"""model_type of a multimodal model, and of its text model."""
_TEXT_NAMES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_SHARED_SETTINGS = ("dtype", "torch_dtype", "quantization_config", "eos_token_id", "tie_word_embeddings")


def resolve_checkpoint(model: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The directory of a checkpoint: a local one, a downloaded snapshot, or the packaged demo model.

    Without `weights`, only `config.json` is downloaded.

    Raises UserError if it is neither a directory nor a hub id that can be fetched.
    """
    if model == "demo":
        return Path(str(resources.files("jgrpo") / "demo" / "model"))
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    if directory.is_file():
        raise UserError(
            f"model {str(model)!r} is a file; expected the directory that holds config.json and safetensors"
        )
    return _download(str(model), revision, _DOWNLOADED if weights else ("config.json",))


def _download(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        snapshot = snapshot_download(
            repository, revision=revision, allow_patterns=list(files), ignore_patterns=list(_NOT_DOWNLOADED)
        )
    except HFValidationError as error:
        raise UserError(
            f"model {repository!r}: no such directory, and not a hub id like 'Qwen/Qwen2.5-1.5B'"
        ) from error
    except GatedRepoError as error:
        raise UserError(
            f"model {repository!r} is gated: accept its licence on the hub, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"model {repository!r} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model {repository!r}: no such directory, and no such hub repository (or no access)"
        ) from error
    except OSError as error:  # offline, HTTP errors and a full cache disk alike
        raise UserError(
            f"model {repository!r}: no such directory, and the hub could not be reached ({type(error).__name__}); "
            "go online once, or give the path of a downloaded checkpoint"
        ) from error
    return Path(snapshot)


def read_config(path: Path) -> dict[str, Any]:
    """The dictionary of `config.json`, of a multimodal model the text model's; UserError if it is missing or broken."""
    config = _whole_config(path)
    family = _TEXT_MODELS.get(str(config.get("model_type")))
    if family is None:
        return config
    shared = {key: config[key] for key in _SHARED_SETTINGS if key in config}
    text = {"architectures": [FAMILIES[family].architecture], **(config.get("text_config") or {}), **shared}
    return text | {"model_type": family}


def _whole_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        hint = "; this is a PEFT adapter, give its base model" if (path / "adapter_config.json").is_file() else ""
        raise UserError(f"{path}: no config.json, so not a Hugging Face checkpoint{hint}")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; UserError names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(value).__name__}; download it again")
    return value


def load_model_config(model: str | Path, revision: str | None = None, weights: bool = True) -> ModelConfig:
    """Shapes and switches of the checkpoint's model; without `weights`, nothing else of it is downloaded."""
    path = resolve_checkpoint(model, revision, weights)
    config = model_config_from_hf(read_config(path), str(path / "config.json"))
    return dataclasses.replace(config, multimodal=_whole_config(path).get("model_type") in _TEXT_MODELS)


def tensor_index(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the (text) model by name; UserError names a missing or damaged file."""
    index = _whole_index(path)
    if not (path / "config.json").is_file() or _whole_config(path).get("model_type") not in _TEXT_MODELS:
        return index
    return {_text_name(name): info for name, info in index.items() if not name.startswith(_OTHER_PARTS)}


def _text_name(name: str) -> str:
    prefix = next((prefix for prefix in _TEXT_NAMES if name.startswith(prefix)), "")
    return _TEXT_NAMES.get(prefix, "") + name.removeprefix(prefix)


def _whole_index(path: Path) -> dict[str, TensorInfo]:
    if (path / INDEX).is_file():
        return _sharded_index(path)
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    pickled = sorted(path.glob("*.bin")) or sorted(path.glob("*.pt*"))
    hint = f"; {pickled[0].name} is a pickle: save the model again as safetensors" if pickled else ""
    raise UserError(f"{path}: neither {SINGLE} nor {INDEX}{hint}")


def _sharded_index(path: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path / INDEX}: no weight_map; download it again")
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (path / shard).is_file()]:
        raise UserError(f"{path}: shard {missing[0]} is missing ({len(missing)} of {len(shards)}); download it again")
    headers = {shard: read_header(path / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise UserError(
                f"{path / shard}: tensor {name} is not in the file although {INDEX} says so; download it again"
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def stored_dtype(path: Path) -> str:
    """The narrower of "bfloat16" and "float32" that holds every weight of the checkpoint without rounding."""
    return "bfloat16" if {info.dtype for info in tensor_index(path).values()} == {"BF16"} else "float32"
