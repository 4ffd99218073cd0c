"""The KV cache of a rollout: the prompt once for its whole group, the completions in lockstep.

All rows write the same slot at the same step, so a step is one `dynamic_update_slice` on the stacked cache.
Slots are minor to heads (`[…, K, T, Hd]`): what one kv head of one row reads is contiguous.
"""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import cache_codes


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer; the loop carries it, so that it is updated in place."""

    prompt_k: Float[Array, "L Q K P Hd"]
    """Keys of the prompts, right-padded."""
    prompt_v: Float[Array, "L Q K P Hd"]
    """Values of the prompts, right-padded."""
    prompt_lengths: Int[Array, " Q"]
    """Tokens of each prompt."""
    k: Float[Array, "L Q G K C Hd"]
    """Keys of the completions."""
    v: Float[Array, "L Q G K C Hd"]
    """Values of the completions."""
    length: Int[Array, ""]
    """Completion slots written so far, the same for every row."""
    prompt_scales: tuple[Float[Array, "L Q K P"], Float[Array, "L Q K P"]] | None = None
    """Scales of the prompts' keys and values; None where the cache holds no codes."""
    scales: tuple[Float[Array, "L Q G K C"], Float[Array, "L Q G K C"]] | None = None
    """Scales of the completions' keys and values; None likewise."""

    @classmethod
    def create(
        cls,
        prompt_kv: tuple[Float[Array, "L Q K P Hd"], Float[Array, "L Q K P Hd"]],
        prompt_lengths: Int[Array, " Q"],
        num_generations: int,
        max_completion_length: int,
        dtype: Any = None,
    ) -> "KVCache":
        """A cache that holds the prompts and room for `G = num_generations` completions of `C` tokens each.

        `dtype` int8 or float8_e4m3fn stores 8 bits and a scale for each slot and head (`pallas_kernels.cache_codes`).
        """
        prompt_k, prompt_v = prompt_kv
        prompt_scales = scales = None
        if dtype is not None:
            (prompt_k, k_scales), (prompt_v, v_scales) = (cache_codes.encode(part, dtype) for part in prompt_kv)
            prompt_scales = (k_scales, v_scales)
        layers, questions, heads, _, head_dim = prompt_k.shape
        shape = (layers, questions, num_generations, heads, max_completion_length, head_dim)
        empty = jnp.zeros(shape, prompt_k.dtype)
        if prompt_scales is not None:
            scales = (jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape[:-1], jnp.float32))
        length = jnp.zeros((), jnp.int32)
        return cls(prompt_k, prompt_v, prompt_lengths, empty, jnp.zeros_like(empty), length, prompt_scales, scales)

    def written(self, k: Array, v: Array, scales: tuple[Array, Array] | None) -> "KVCache":
        """The same with other keys, values and scales of the completions."""
        return dataclasses.replace(self, k=k, v=v, scales=scales)

    @property
    def positions(self) -> int:
        """Positions that a row may have: its prompt's and its completion's."""
        return self.prompt_k.shape[3] + self.k.shape[4]

    @property
    def all_scales(self) -> tuple[Array, Array, Array, Array] | None:
        """The prompts' and the completions' scales, as `pallas_kernels.decode_attention` takes them."""
        return None if self.prompt_scales is None or self.scales is None else (*self.prompt_scales, *self.scales)
