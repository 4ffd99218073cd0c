import json
import resource
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jgrpo.checkpoints.names import placements
from jgrpo.checkpoints.safetensors_io import SafetensorsWriter, TensorSpec
from jgrpo.models import model_config_from_hf
from tests.tiny_checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    """A sharded float32 Qwen3 checkpoint; not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", max_shard_size="100KB")


@pytest.fixture
def checkpoint(pristine, tmp_path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


BIG = {
    "model_type": "qwen2",
    "vocab_size": 16000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def big(tmp_path_factory) -> Path:
    """A checkpoint of 210 MB in bfloat16."""
    path = tmp_path_factory.mktemp("big")
    (path / "config.json").write_text(json.dumps(BIG))
    ordered = [p for placed in placements(model_config_from_hf(BIG)).values() for p in placed]
    noise = np.random.default_rng(0).normal(size=4096 * 1024).astype(ml_dtypes.bfloat16)
    specs = [TensorSpec(p.name, p.shape, noise.dtype) for p in ordered]
    with SafetensorsWriter(path / "model.safetensors", specs) as writer:
        for spec in specs:
            writer.write(np.resize(noise, spec.shape))
    return path


@pytest.fixture
def full_disk():
    """Every write beyond 10 kB of a file fails, as the kernel reports it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
