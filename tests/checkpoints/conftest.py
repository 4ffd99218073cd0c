import shutil
from pathlib import Path

import pytest

from tests.tiny_checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    """A sharded bfloat16-free Qwen3 checkpoint; not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", max_shard_size="100KB")


@pytest.fixture
def checkpoint(pristine, tmp_path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))
