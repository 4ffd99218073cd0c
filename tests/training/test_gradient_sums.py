"""Gradients that are added to a sum in the backward: the same numbers as adding afterwards, and one tree of them in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jgrpo.gradient_sums import Summed, entered, is_summed, scan_layers
from jgrpo.lora import WEIGHTS, variables_of
from jgrpo.training.step import accumulate

LAYERS, WIDTH, ROWS = 5, 24, 4


class Minibatch(struct.PyTreeNode):
    """Microbatches, or one."""

    x: jax.Array
    mask: jax.Array


def arrays(seed: int, width: int = WIDTH) -> dict:
    """Stacks of two leaves, and a vector that no layer reads."""
    rng = np.random.default_rng(seed)
    shapes = {"stacks": {"w": (LAYERS, width, width), "b": (LAYERS, width)}, "last": (width,)}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s) / 5, jnp.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )


def model(params: dict, x: jax.Array, remat: bool) -> jax.Array:
    """A few layers that know which they are, and a vector behind them."""

    def layer_of(x, layer, own):
        return jnp.tanh(x @ own["w"] + own["b"] * (1 + layer))

    body = jax.checkpoint(layer_of, prevent_cse=False) if remat else layer_of
    return scan_layers(body, x, params["stacks"], LAYERS) @ entered(params["last"])


def loss(params: dict, part: Minibatch, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = model(params, part.x, remat=True)
    return jnp.sum(out**2) * (1 + index), out


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("summed", [("w",), ("b",), ("w", "b"), ()], ids=str)
def test_gradients_are_the_sum_and_the_new_ones(summed: tuple, remat: bool) -> None:
    params, sums, x = (
        arrays(0),
        arrays(1),
        jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, WIDTH)), jnp.float32),
    )

    def value(params):
        carried = {
            name: Summed(leaf, sums["stacks"][name]) for name, leaf in params["stacks"].items() if name in summed
        }
        given = {"stacks": params["stacks"] | carried, "last": Summed(params["last"], sums["last"])}
        return jnp.sum(model(given, x, remat) ** 2)

    def plain(params):
        for w, b, layer in zip(params["stacks"]["w"], params["stacks"]["b"], range(LAYERS), strict=True):
            params = params | {"x": jnp.tanh(params.get("x", x) @ w + b * (1 + layer))}
        return jnp.sum((params["x"] @ params["last"]) ** 2)

    (got_value, got), (want_value, want) = (jax.jit(jax.value_and_grad(f))(params) for f in (value, plain))
    np.testing.assert_allclose(got_value, want_value, rtol=1e-6)
    expected = want | {"last": want["last"] + sums["last"], "stacks": dict(want["stacks"])}
    for name in summed:
        expected["stacks"][name] += sums["stacks"][name]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def naive(params: dict, minibatch: Minibatch) -> dict:
    """What `accumulate` is equal to: whole gradients, added."""

    def step(sums, inputs):
        part, index = inputs
        return jax.tree.map(jnp.add, sums, jax.grad(lambda p: loss(p, part, index)[0])(params)), None

    xs = minibatch, jnp.arange(minibatch.x.shape[0])
    return jax.lax.scan(step, jax.tree.map(jnp.zeros_like, params), xs)[0]


def minibatch(width: int = WIDTH) -> Minibatch:
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, ROWS, width)), jnp.float32)
    return Minibatch(x=x, mask=jnp.ones((3, ROWS), bool))


def test_microbatches_add_up() -> None:
    params = arrays(0)
    total, got, terms = jax.jit(lambda p, m: accumulate(loss, p, m))(params, minibatch())
    want = jax.jit(naive)(params, minibatch())
    assert terms.shape == (3, ROWS)
    np.testing.assert_allclose(
        total, sum(loss(params, Minibatch(x, x), i)[0] for i, x in enumerate(minibatch().x)), rtol=1e-5
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_one_tree_of_gradients_exists() -> None:
    """The result is one tree, which temporaries do not count: adding afterwards takes another one, this a layer's."""
    width = 256
    params, data = arrays(0, width), minibatch(width)
    tree = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def temporaries(function) -> int:
        return jax.jit(function).lower(params, data).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(naive) > tree
    assert temporaries(lambda p, m: accumulate(loss, p, m)[1]) < 0.6 * tree


def test_a_whole_model_enters_what_no_layer_reads() -> None:
    weights = {"embed": jnp.ones(3), "layers": {"w": jnp.ones((2, 3))}}
    params = variables_of({}, {WEIGHTS: jax.tree.map(lambda w: Summed(w, w), weights)})["params"]
    assert not is_summed(params["embed"])
    assert is_summed(params["layers"]["w"])


def test_a_second_forward_is_refused() -> None:
    """It would start from the sum again."""
    params, x = arrays(0), minibatch().x[0]

    def twice(params: dict, part: Minibatch, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, out = loss(params, part, index)
        return first + model(params, x, remat=False).sum(), out

    with pytest.raises(ValueError, match=r"second forward .* \(5, 24\)"):
        accumulate(twice, params, minibatch())
    summed = Summed(params["last"], params["last"])
    entered({"last": summed})
    with pytest.raises(ValueError, match="second forward"):
        entered(jax.tree.map(lambda leaf: leaf, summed))


def test_branches_of_a_program_each_make_their_forward() -> None:
    """As `packed_at_length` has them: one for each size of a microbatch, of which one runs."""

    def branches(function, part):
        return jax.lax.switch(1, [function, function], part)

    got = accumulate(loss, arrays(0), minibatch(), branches)
    jax.tree.map(np.testing.assert_array_equal, got, accumulate(loss, arrays(0), minibatch()))
