"""Round weights to the levels of a packed form, nearest level, one group at a time.

Int4 chooses its (signed) scale so that the element of largest magnitude in a group lands exactly on -8, the rule of GGML's
Q4_0; int8 puts it on ±127, the rule of Q8_0. fast8 reaches from -128 to 254, and takes the sign of its scale that makes the scale
smaller. The levels are chosen for the scale as it is stored.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jgrpo.errors import UserError
from jgrpo.quantization.weights import Fast8Weight, Int4Weight, Int8Weight, pack_nibbles
from pallas_kernels import codes


def quantize(weight: Float[Any, "*L N K"], group_size: int, scale_dtype: Any = jnp.float32) -> Int4Weight:
    """Round to the nearest of the 16 levels; numpy in, numpy out, and jax in, jax out.

    Raises `UserError` where `group_size` is odd or does not divide K.
    """
    xp, groups = _groups(weight, group_size)
    # The grid reaches from -8 to 7: putting the extreme element on -8 is what uses all 16 levels.
    index = xp.argmax(xp.abs(groups), axis=-1)
    extreme = xp.take_along_axis(groups, index[..., None], axis=-1)[..., 0]
    scales = (extreme / -8.0).astype(scale_dtype)
    nibbles = xp.clip(_levels(groups, scales, xp) + 8, 0, 15).astype(xp.uint8)
    return Int4Weight(pack_nibbles(nibbles.reshape(weight.shape), group_size), scales)


def quantize_int8(weight: Float[Any, "*L N K"], group_size: int, scale_dtype: Any = jnp.float32) -> Int8Weight:
    """The same with 255 levels."""
    xp, groups = _groups(weight, group_size)
    scales = (xp.abs(groups).max(axis=-1) / 127.0).astype(scale_dtype)
    levels = xp.clip(_levels(groups, scales, xp), -127, 127).astype(xp.int8)
    return Int8Weight(levels.reshape(weight.shape), scales)


def quantize_fast8(weight: Float[Any, "*L N K"], group_size: int, scale_dtype: Any = jnp.float32) -> Fast8Weight:
    """The same with 256 levels that are twice as far apart above 0 as below it."""
    _, groups = _groups(weight, group_size)
    return Fast8Weight(*codes.quantize_fast8(groups.reshape(weight.shape), group_size, scale_dtype))


def _groups(weight: Any, group_size: int) -> tuple[Any, Any]:
    xp: Any = np if isinstance(weight, np.ndarray) else jnp
    width = weight.shape[-1]
    if group_size % 2 or width % group_size:
        raise UserError(
            f"group_size {group_size} does not divide the input width {width}; choose another of 32, 64 and 128, or keep "
            "this module unquantized with skip_modules"
        )
    return xp, weight.astype(xp.float32).reshape(*weight.shape[:-1], width // group_size, group_size)


def _levels(groups: Any, scales: Any, xp: Any) -> Any:
    safe = xp.where(scales == 0, 1, scales).astype(xp.float32)
    return xp.round(groups / safe[..., None])
