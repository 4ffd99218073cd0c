"""Checkpoints: exact, atomic, bounded in number, honest about a full disk."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgrpo.checkpoints.train_state import Checkpoints, load_adapter
from jgrpo.errors import UserError

LORA = {"q_proj": {"a": jnp.arange(24.0).reshape(2, 3, 4) / 7, "b": jnp.zeros((2, 4, 3))}}
REST = {"opt": optax.adam(1e-3).init(LORA), "key": jax.random.key(3), "cursor": jnp.array([1, 5], jnp.int32)}


def test_restore_is_exact_and_needs_only_shapes(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(4, LORA, REST, {"metrics_bytes": 17})
    shapes = jax.eval_shape(lambda: (LORA, REST))
    lora, rest, meta = Checkpoints(tmp_path, keep_last=2).restore(*shapes)
    assert meta == {"metrics_bytes": 17}
    assert jax.tree.structure((lora, rest)) == jax.tree.structure((LORA, REST))
    before = jax.tree.leaves((LORA, {**REST, "key": jax.random.key_data(REST["key"])}))
    after = jax.tree.leaves((lora, {**rest, "key": jax.random.key_data(rest["key"])}))
    for want, got in zip(before, after, strict=True):
        np.testing.assert_array_equal(want, got)


def test_keeps_the_last_n_and_ignores_unfinished_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        checkpoints.save(step, LORA, REST, {})
    (tmp_path / "step_000004.orbax-checkpoint-tmp").mkdir()
    assert sorted(path.name for path in tmp_path.glob("step_??????")) == ["step_000002", "step_000003"]
    assert Checkpoints(tmp_path, keep_last=2).latest_step == 3
    assert not list(tmp_path.glob("*tmp*"))


def test_adapter_is_readable_on_its_own(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(1, LORA, REST, {})
    checkpoints.save(2, jax.tree.map(lambda x: x + 1, LORA), REST, {})
    step, lora = load_adapter(tmp_path)
    assert step == 2
    np.testing.assert_array_equal(lora["q_proj"]["a"], LORA["q_proj"]["a"] + 1)


def test_no_checkpoint_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_adapter(tmp_path)
    with pytest.raises(UserError, match="no complete checkpoint"):
        Checkpoints(tmp_path, keep_last=1).restore(LORA, REST)


FULL_DISK = """
import resource, signal, sys
import numpy as np
from jgrpo.checkpoints.train_state import Checkpoints
from jgrpo.errors import UserError
checkpoints = Checkpoints(sys.argv[1], keep_last=1)
small, big = ({"a": np.random.default_rng(0).normal(size=size).astype("float32")} for size in (10, 1_000_000))
checkpoints.save(1, small, {"k": np.zeros(1)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, big, {"k": np.zeros(1)}, {})
except UserError as error:
    print(error)
checkpoints.close()
"""


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    """The kernel refuses the write (file size limit, the same path in Orbax as a full disk)."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "file size limit" in done.stdout
    assert "checkpoint of step 1 is intact" in done.stdout
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert [path.name for path in Path(tmp_path).iterdir()] == ["step_000001"]
    assert load_adapter(tmp_path)[0] == 1
