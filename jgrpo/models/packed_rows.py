"""Rows without their padding: the completions of a microbatch one after the other, so that a forward computes no padding.

A microbatch is one sequence: its prompts (P each, padded, once for every `group` rows) and behind them the tokens of all
completions without a gap, in room for `capacity` of them. Everything but attention works position by position on
q·P + capacity positions, however unequal the completions are. Attention gets contiguous (prompt, completion, padding) rows,
as in `shared_prompt`, so that cuDNN's kernel with its row lengths applies: for it packing buys nothing and costs nothing.

Why not the `segments` of `Transformer.__call__`: they keep a row's prompt with each completion, G·(P + C) instead of P + G·C
positions, need a bin for every row (none is split), and cuDNN's public entry knows no segments. Why not rows sorted by length
into microbatches that are cut to a few lengths: with G = 8 completions a prompt the longest of a group is nearly always the
limit, so either prompts are computed again or little is saved (the arithmetic is in docs/memory.md).

Both ways between the layouts are gathers, and so are their gradients: nothing is added up by a scatter, so they are
reproducible on a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped


class PackedRows(struct.PyTreeNode):
    """How the N = q·P + `capacity` positions belong to B rows of T = P + min(C, `capacity`).

    Attributes:
        prompt_lengths: tokens of each row's prompt.
        completion_lengths: tokens of each completion; together at most `capacity`.
        row: whose token stands in each place behind the prompts.
        offset: which of the completion's tokens it is.
        used: whether any does; the rest is padding.
        index: position in the sequence of each of a row's tokens.
        in_prompt, in_completion: which tokens of a row are its prompt's and its completion's; the rest is padding.
        width: positions P of a prompt.
        limit: tokens C that a completion may have.
        group: rows for which a prompt is computed once; they stand next to each other.
    """

    prompt_lengths: Int[Array, " B"]
    completion_lengths: Int[Array, " B"]
    row: Int[Array, " N-q*P"]
    offset: Int[Array, " N-q*P"]
    used: Bool[Array, " N-q*P"]
    index: Int[Array, "B T"]
    in_prompt: Bool[Array, "B T"]
    in_completion: Bool[Array, "B T"]
    width: int = struct.field(pytree_node=False)
    limit: int = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        prompt_lengths: Int[Array, " B"],
        completion_lengths: Int[Array, " B"],
        *,
        width: int,
        limit: int,
        group: int,
        capacity: int,
    ) -> "PackedRows":
        """The layout of rows whose completions have at most `capacity` tokens together."""
        ends, place = jnp.cumsum(completion_lengths), jnp.arange(capacity)
        starts, count = ends - completion_lengths, completion_lengths.shape[0]
        row = jnp.minimum(jnp.searchsorted(ends, place, side="right"), count - 1)
        used = place < ends[-1]
        offset = jnp.where(used, place - starts[row], 0)

        token = jnp.arange(width + min(limit, capacity))
        behind = token - prompt_lengths[:, None]
        in_prompt, in_completion = behind < 0, (behind >= 0) & (behind < completion_lengths[:, None])
        prompt = jnp.arange(count)[:, None] // group * width + token
        completion = count // group * width + starts[:, None] + behind
        index = jnp.where(in_prompt, prompt, jnp.where(in_completion, completion, 0))
        way = (row, offset, used, index, in_prompt, in_completion)
        return cls(prompt_lengths, completion_lengths, *way, width=width, limit=limit, group=group)

    @property
    def starts(self) -> Int[Array, " B"]:
        """Place of each completion's first token."""
        return jnp.cumsum(self.completion_lengths) - self.completion_lengths

    @property
    def prompts(self) -> int:
        """Positions q·P of all prompts."""
        return self.prompt_lengths.shape[0] // self.group * self.width

    def completion_length(self, positions: int) -> int:
        """Tokens that a completion of a row has room for, with that many positions."""
        return min(self.limit, positions - self.prompts)

    def positions(self, total: int) -> Int[Array, "1 N"]:
        """Where each of the `total` tokens stands in its row."""
        prompts = jnp.tile(jnp.arange(self.width), self.prompts // self.width)
        return jnp.concatenate([prompts, self.prompt_lengths[self.row] + self.offset])[None]

    def pack(self, completions: Shaped[Array, "B C"], fill: int = 0) -> Shaped[Array, " N-q*P"]:
        """Values of the completions' tokens, without a gap."""
        return jnp.where(self.used, completions[self.row, self.offset], fill)

    def unpack(self, values: Float[Array, " N-q*P"]) -> Float[Array, "B C"]:
        """The inverse of `pack`, 0 behind the completions."""
        token = jnp.arange(self.limit)
        used = token < self.completion_lengths[:, None]
        place = jnp.where(used, self.starts[:, None] + token, 0)
        return jnp.where(used, _gather(values, place, self.row * self.limit + self.offset, self.used), 0)

    def rows(self, x: Float[Array, "1 N *D"]) -> Float[Array, "B T *D"]:
        """Contiguous rows of the sequence; what stands in their padding is unspecified but finite."""
        return _spread(x, self)

    def sequences(self, rows: Float[Array, "B T *D"]) -> Float[Array, "1 N *D"]:
        """The inverse of `rows`; of a prompt's copies, the first."""
        return _collect(rows, self)

    def predicting(self, hidden: Float[Array, "1 N D"]) -> Float[Array, "N-q*P D"]:
        """What each completion token is predicted from: the token before it, or its prompt's last."""
        before, prompts = hidden[0, self.prompts - 1 : -1], hidden[0, : self.prompts]
        prompts = prompts.reshape(-1, self.width, hidden.shape[-1])
        ends = self.prompt_lengths[:: self.group, None, None] - 1
        last = jnp.take_along_axis(prompts, ends, axis=1, mode="promise_in_bounds")
        last = jnp.repeat(last[:, 0], self.group, axis=0)
        # Rows without a completion share their start with the next: they go nowhere, each to a place of its own.
        nowhere = self.row.shape[0] + jnp.arange(self.starts.shape[0])
        starts = jnp.where(self.completion_lengths > 0, self.starts, nowhere)
        return before.at[starts].set(last, unique_indices=True, mode="drop")


@jax.custom_vjp
def _gather(x: Array, index: Array, inverse: Array, inverse_used: Array) -> Array:
    """x[index]; of it, `inverse` is where each x[n] went, if it is used."""
    return x[index]


def _gather_forward(x: Array, index: Array, inverse: Array, inverse_used: Array) -> tuple[Array, tuple[Array, Array]]:
    return x[index], (inverse, inverse_used)


def _gather_backward(way: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None, None]:
    inverse, used = way
    return jnp.where(used, gradient.reshape(-1)[inverse], 0), None, None, None


_gather.defvjp(_gather_forward, _gather_backward)


def _take(x: Array, index: Any) -> Array:
    return x.at[index].get(mode="promise_in_bounds")


def _masked(x: Array, mask: Array) -> Array:
    return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), x, 0)


def _completions(rows: Array, packed: PackedRows) -> Array:
    """[B, T, …] -> [N − q·P, …]"""
    return _take(rows, (packed.row, packed.prompt_lengths[packed.row] + packed.offset))


def _of_prompts(rows: Array, packed: PackedRows) -> Array:
    """[B, T, …] -> [q, group, P, …]"""
    return rows[:, : packed.width].reshape(-1, packed.group, packed.width, *rows.shape[2:])


@jax.custom_vjp
def _spread(x: Array, packed: PackedRows) -> Array:
    return _take(x[0], packed.index)


def _spread_backward(packed: PackedRows, gradient: Array) -> tuple[Array, None]:
    prompts = _of_prompts(_masked(gradient, packed.in_prompt), packed).sum(axis=1)
    completions = _masked(_completions(gradient, packed), packed.used)
    return jnp.concatenate([prompts.reshape(-1, *completions.shape[1:]), completions])[None], None


@jax.custom_vjp
def _collect(rows: Array, packed: PackedRows) -> Array:
    prompts, completions = _of_prompts(rows, packed)[:, 0], _completions(rows, packed)
    return jnp.concatenate([prompts.reshape(-1, *completions.shape[1:]), completions])[None]


def _collect_backward(packed: PackedRows, gradient: Array) -> tuple[Array, None]:
    is_first = (jnp.arange(packed.index.shape[0]) % packed.group == 0)[:, None]
    return _masked(_take(gradient[0], packed.index), packed.in_completion | packed.in_prompt & is_first), None


_spread.defvjp(lambda x, packed: (_spread(x, packed), packed), _spread_backward)
_collect.defvjp(lambda rows, packed: (_collect(rows, packed), packed), _collect_backward)
