"""Saving and restoring the state of a run with Orbax: the adapter, the optimizer, the random key, the data cursor.

One directory a checkpoint, three items in it: `lora` (the adapter, readable on its own), `rest` (every other array of
the state) and `meta` (JSON: metrics position, settings). Orbax writes to a temporary directory and renames it, so a
checkpoint exists whole or not at all; the base model is never written and never needed to restore.

Saving is synchronous: an adapter and its moments are some hundred MB at most, and a save that has returned is on disk,
which is what stopping on a signal relies on.
"""

import errno
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jgrpo.errors import UserError

_DISK_ERRORS = {errno.ENOSPC: "no space left", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file size limit"}
_LOGGER = logging.getLogger("absl")
_TEMPORARY = "*.orbax-checkpoint-tmp*"


class Checkpoints:
    """The checkpoints of one run, newest last.

    Args:
        directory: where they are; made if missing.
        keep_last: number kept; older ones are deleted after a newer one is complete.
    """

    def __init__(self, directory: Path, keep_last: int):
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            step_prefix="step",
            step_format_fixed_length=6,
            max_to_keep=keep_last,
            enable_async_checkpointing=False,
        )
        _remove_unfinished(self.directory)
        _LOGGER.addFilter(_is_worth_logging)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, lora: Mapping[str, Any], rest: Any, meta: Mapping[str, Any]) -> None:
        """Write a checkpoint; a step that is already saved is left alone.

        Args:
            step: its number, steps trained on.
            lora: adapter pytree.
            rest: pytree of every other array.
            meta: JSON-serializable.

        Raises:
            UserError: the disk is full; earlier checkpoints are intact.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            lora=ocp.args.StandardSave(lora), rest=ocp.args.StandardSave(rest), meta=ocp.args.JsonSave(dict(meta))
        )
        with _disk_errors(self.directory, self.latest_step):
            self._manager.save(step, args=items)

    def restore(self, lora: Mapping[str, Any], rest: Any) -> tuple[Mapping[str, Any], Any, dict[str, Any]]:
        """The newest checkpoint as (lora, rest, meta).

        Args:
            lora, rest: pytrees of arrays or `jax.ShapeDtypeStruct` with the shapes to expect. A leaf that is placed (a
                committed array, or a struct with a sharding) is restored to that place, any other to the default
                device without being bound to it, so that programs compiled for a fresh state serve a restored one.

        Raises:
            UserError: there is no complete checkpoint.
        """
        step = _require(self.latest_step, self.directory)
        items = ocp.args.Composite(
            lora=ocp.args.StandardRestore(_targets(lora)),
            rest=ocp.args.StandardRestore(_targets(rest)),
            meta=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=items)
        lora, rest = jax.tree.map(_unbind, (lora, rest), (restored["lora"], restored["rest"]))
        return lora, rest, restored["meta"]

    def meta(self) -> dict[str, Any]:
        """The JSON part of the newest checkpoint.

        Raises:
            UserError: there is no complete checkpoint.
        """
        step = _require(self.latest_step, self.directory)
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def close(self) -> None:
        """Release Orbax's threads."""
        self._manager.close()


def load_adapter(directory: Path) -> tuple[int, Mapping[str, Any]]:
    """Step and adapter of the newest checkpoint in a run's `checkpoints/`, without knowing the model or the optimizer.

    Reads only, so it may be called while the run goes on.

    Raises:
        UserError: there is no complete checkpoint.
    """
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: expected the checkpoints of a run")
    step = max((int(path.name.removeprefix("step_")) for path in directory.glob("step_??????")), default=None)
    path = directory / f"step_{_require(step, directory):06}" / "lora"
    # An item on its own lacks the metadata of the checkpoint around it, which Orbax would remark upon.
    with _without_warnings(), ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        return _require(step, directory), checkpointer.restore(path, _targets(saved))


def _require(step: int | None, directory: Path) -> int:
    if step is None:
        raise UserError(f"{directory} holds no complete checkpoint: expected a run saved at least once")
    return step


@contextmanager
def _without_warnings() -> Iterator[None]:
    level = _LOGGER.level
    _LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _LOGGER.setLevel(level)


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Not the traceback from a writer thread of Orbax, whose exception reaches the caller anyway."""
    return "_SignalingThread.run()" not in record.getMessage()


def _place(leaf: Any) -> Any:
    """The sharding that a leaf is bound to, if any."""
    is_bound = isinstance(leaf, jax.ShapeDtypeStruct) or getattr(leaf, "committed", False)
    return leaf.sharding if is_bound else None


def _targets(tree: Any) -> Any:
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_place(leaf) or default), tree
    )


def _unbind(wanted: Any, restored: jax.Array) -> jax.Array:
    if _place(wanted) is not None:
        return restored
    if jnp.issubdtype(restored.dtype, jax.dtypes.prng_key):
        data = jnp.asarray(np.asarray(jax.random.key_data(restored)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(restored))
    return jnp.asarray(np.asarray(restored))


@contextmanager
def _disk_errors(directory: Path, last: int | None) -> Iterator[None]:
    """Turn a full disk into one line, and give back what the unfinished checkpoint took."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        for _ in range(10):  # writer threads of Orbax outlive the exception, and make the directory again
            _remove_unfinished(directory)
            time.sleep(0.1)
        intact = "no earlier checkpoint exists" if last is None else f"the checkpoint of step {last} is intact"
        raise UserError(
            f"checkpoint not saved in {directory}: {reason}; {intact}; free some space and run again with --resume"
        ) from error


def _remove_unfinished(directory: Path) -> None:
    for unfinished in directory.glob(_TEMPORARY):
        shutil.rmtree(unfinished, ignore_errors=True)


def _disk_error(error: OSError | ValueError) -> str | None:
    """What the disk refused, or None if it is another error. TensorStore puts the errno in its text."""
    if isinstance(error, OSError):
        return _DISK_ERRORS.get(error.errno or 0)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return _DISK_ERRORS.get(int(code.group(1))) if code else None
