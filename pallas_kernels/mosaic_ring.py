"""Rings of slots in shared memory: one warp group fills them with blocks, others multiply what they have."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax


class Slots(NamedTuple):
    """Slots in shared memory that are filled with blocks and multiplied, and their barriers."""

    data: tuple[Any, ...]
    full: Any
    empty: Any

    @property
    def stages(self) -> int:
        """Slots."""
        return self.full.shape[0]

    def at(self, block) -> "Slots":
        """The slot of a block, by its number among all that the ring brings."""
        slot = lax.rem(block, self.stages)
        return Slots(tuple(ref.at[slot] for ref in self.data), self.full.at[slot], self.empty.at[slot])

    def claim(self, block) -> "Slots":
        """The slot of a block, once all who multiply have read what it had."""
        slot = self.at(block)

        @pl.when(block >= self.stages)
        def _():
            plgpu.barrier_wait(slot.empty)

        return slot

    def await_block(self, block) -> None:
        """Wait until a block has come. Who waits for one has to wait for all, in their order."""
        plgpu.barrier_wait(self.at(block).full)

    def drain(self, used) -> None:
        """Wait until all of the `used` blocks are read: what the interpreter asks of who fills them, and a GPU does not need.

        Nor should it have it: for some shapes ptxas (CUDA 13) adds to `used` what the loop before it counted, and this one never ends.
        """

        @pl.loop(jnp.maximum(0, used - self.stages), used)
        def _(block):
            plgpu.barrier_wait(self.at(block).empty)
