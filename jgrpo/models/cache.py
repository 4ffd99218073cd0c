"""The KV cache of a rollout: the prompt once for its whole group, the completions in lockstep.

All rows write the same slot at the same step, so a step is one `dynamic_update_slice` on the stacked cache.
Slots are minor to heads (`[…, K, T, Hd]`): what one kv head of one row reads is contiguous.
"""

import flax.struct
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


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

    @classmethod
    def create(
        cls,
        prompt_kv: tuple[Float[Array, "L Q K P Hd"], Float[Array, "L Q K P Hd"]],
        prompt_lengths: Int[Array, " Q"],
        num_generations: int,
        max_completion_length: int,
    ) -> "KVCache":
        """A cache that holds the prompts and room for `G = num_generations` completions of `C` tokens each."""
        prompt_k, prompt_v = prompt_kv
        layers, questions, heads, _, head_dim = prompt_k.shape
        shape = (layers, questions, num_generations, heads, max_completion_length, head_dim)
        empty = jnp.zeros(shape, prompt_k.dtype)
        return cls(prompt_k, prompt_v, prompt_lengths, empty, jnp.zeros_like(empty), jnp.zeros((), jnp.int32))
