"""Completions of one prompt in one sequence, so that a forward over them computes the prompt once.

A sequence is the prompt (P, right-padded) and G completions (C each) behind it: P + G·C positions instead of the G·(P + C) of
separate rows. Everything but attention works position by position and does not see the difference. Attention gets
the rows back: contiguous (prompt, completion, padding), so that cuDNN's kernel with its row lengths applies as it is. All
rows of a prompt compute the same prompt outputs; the first row's are kept.

Between the two layouts lies a permutation in each row. Its gradient is the inverse permutation, a gather as well, and
that of the prompt's copies is a sum: no scatter, so the gradient is reproducible.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, Int


class SharedPrompt(struct.PyTreeNode):
    """How the positions of `[Q, P + G·C]` sequences belong to `[Q·G, P + C]` rows."""

    prompt_lengths: Int[Array, " Q"]
    """Tokens of each prompt."""
    width: int = struct.field(pytree_node=False)
    """Positions P of the prompts."""
    group: int = struct.field(pytree_node=False)
    """Completions G behind each prompt."""

    def completion_length(self, positions: int) -> int:
        """C of sequences with P + G·C positions."""
        return (positions - self.width) // self.group

    def positions(self, total: int) -> Int[Array, "Q S"]:
        """Where each of the S = `total` tokens stands in its row; a prompt's padding counts on behind its completion."""
        order = _to_sequence(self.prompt_lengths, self.width, self.completion_length(total))
        prompt, completion = order[:, : self.width], order[:, self.width :]
        return jnp.concatenate([prompt, jnp.tile(completion, (1, self.group))], axis=1)

    def rows(self, x: Float[Array, "Q S *D"]) -> Float[Array, "B T *D"]:
        """Contiguous rows of the sequences; B = Q·G, completions of a prompt next to each other."""
        prompt, completions = x[:, : self.width], x[:, self.width :]
        questions, rest, length = x.shape[0], x.shape[2:], self.completion_length(x.shape[1])
        completions = completions.reshape(questions, self.group, length, *rest)
        prompts = jnp.broadcast_to(prompt[:, None], (questions, self.group, *prompt.shape[1:]))
        rows = jnp.concatenate([prompts, completions], axis=2).reshape(-1, self.width + length, *rest)
        return _permute(rows, *self._orders(length)[::-1])

    def sequences(self, rows: Float[Array, "B T *D"]) -> Float[Array, "Q S *D"]:
        """The inverse of `rows`; of a prompt's copies, the first."""
        questions, rest, length = self.prompt_lengths.shape[0], rows.shape[2:], rows.shape[1] - self.width
        split = jnp.reshape(_permute(rows, *self._orders(length)), (questions, self.group, -1, *rest))
        completions = split[:, :, self.width :].reshape(questions, self.group * length, *rest)
        return jnp.concatenate([split[:, 0, : self.width], completions], axis=1)

    def _orders(self, length: int) -> tuple[Array, Array]:
        prompts = jnp.repeat(self.prompt_lengths, self.group)
        return _to_sequence(prompts, self.width, length), _to_row(prompts, self.width, length)


def _to_sequence(prompt_lengths: Int[Array, " B"], width: int, length: int) -> Int[Array, "B T"]:
    """Position in the contiguous row of each of (padded prompt, completion); a prompt's padding goes to the row's end."""
    index, used = jnp.arange(width + length), prompt_lengths[:, None]
    return jnp.where(index < used, index, jnp.where(index < width, index + length, index - width + used))


def _to_row(prompt_lengths: Int[Array, " B"], width: int, length: int) -> Int[Array, "B T"]:
    """The inverse permutation."""
    index, used = jnp.arange(width + length), prompt_lengths[:, None]
    return jnp.where(index < used, index, jnp.where(index < used + length, index - used + width, index - length))


@partial(jax.custom_vjp)
def _permute(x: Array, order: Array, inverse: Array) -> Array:
    """x[b, order[b, t]]; `inverse` undoes `order`."""
    index = order.reshape(*order.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


def _permute_forward(x: Array, order: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return _permute(x, order, inverse), (order, inverse)


def _permute_backward(orders: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    return _permute(gradient, *orders[::-1]), None, None


_permute.defvjp(_permute_forward, _permute_backward)
