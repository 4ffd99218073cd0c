"""A decode layer between two attentions: its jnp twin against float64, and when its kernel is taken. The kernel: `test_decode_layer_mosaic.py`."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Rows, decode_layer, dispatch, has_layer_kernel, interleave_gate, tuning
from tests.pallas_kernels.decode_layers import EPS, expected, random_layer
from tests.pallas_kernels.oracles import relative_error

LLAMA_8B = [(4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096)]
HOPPER = dispatch.Device("gpu", (9, 0), True, "a GPU without measured blocks", True, 132)


@pytest.mark.parametrize("depth", [None, 64])
@pytest.mark.parametrize("qkv", [192, None])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_twin_computes_a_layer(activation, qkv, depth):
    layer = random_layer(np.random.default_rng(0), 5, 128, 256, 160, qkv, depth, group=32)
    attended = layer.parts or Rows(layer.attended)
    counter = jnp.zeros((1,), jnp.int32)
    how = dict(layer=jnp.int32(2), eps=EPS, activation=activation)
    residual, result, _ = decode_layer(attended, layer.residual, layer.norms, layer.matrices, counter, **how)
    want_residual, want = expected(layer, 2, activation)
    assert relative_error(np.asarray(residual, np.float64), want_residual) < 8e-3
    assert relative_error(np.asarray(result, np.float64).reshape(want.shape), want) < 8e-3


def test_gate_and_up_alternate_by_eights():
    rows = jnp.arange(64)[:, None]
    both = interleave_gate(rows)[:, 0].reshape(-1, 2, 8)
    np.testing.assert_array_equal(both[:, 0].ravel(), np.arange(32))
    np.testing.assert_array_equal(both[:, 1].ravel(), np.arange(32, 64))


def test_what_cannot_run_is_said():
    layer = random_layer(np.random.default_rng(0), 5, 128, 128, 128, None)
    arguments = (Rows(layer.attended), layer.residual, layer.norms, layer.matrices, jnp.zeros((1,), jnp.int32))
    how = dict(layer=0, eps=EPS, activation="silu")
    with pytest.raises(ValueError, match="implementation='triton' is unknown"):
        decode_layer(*arguments, **how, implementation="triton")
    with pytest.raises(ValueError, match=r"the kernel cannot run 5 rows with matrices \(\(128, 128\)"):
        decode_layer(*arguments, **how, implementation="mosaic")


def test_heads_that_the_kernel_cannot_merge_are_refused(monkeypatch):
    layer = random_layer(np.random.default_rng(0), 5, 128, 128, 128, None, depth=32)
    monkeypatch.setattr(dispatch, "current_device", lambda: HOPPER)
    with pytest.raises(ValueError, match=r"merges heads of \(64, 128, 256\), got 32; give it merged Rows"):
        decode_layer(
            layer.parts,
            layer.residual,
            layer.norms,
            layer.matrices,
            jnp.zeros((1,), jnp.int32),
            layer=0,
            eps=EPS,
            activation="silu",
        )


@pytest.mark.parametrize(
    ("change", "m", "shapes", "runs"),
    [
        ({}, 64, LLAMA_8B, True),
        ({}, 1, LLAMA_8B[:3], True),
        ({}, 65, LLAMA_8B, False),
        ({"multiprocessors": 114}, 64, LLAMA_8B, True),
        ({"multiprocessors": 16}, 64, LLAMA_8B, False),  # a row has a program of its own
        ({"has_mosaic": False}, 64, LLAMA_8B, False),
        ({"capability": (8, 0)}, 64, LLAMA_8B, False),
        ({}, 64, [(896, 896), (2 * 4864, 896), (896, 4864), (1152, 896)], True),
        ({}, 64, [(960, 960), (2 * 2560, 960), (960, 2560), (1600, 960)], False),  # no multiples of 128
    ],
)
def test_rule(monkeypatch, change, m, shapes, runs):
    device = HOPPER if not change else dispatch.Device(**{**vars(HOPPER), **change})
    monkeypatch.setattr(dispatch, "current_device", lambda: device)
    assert has_layer_kernel(m, shapes, jnp.bfloat16, jnp.bfloat16) == runs
    assert not has_layer_kernel(m, shapes, jnp.float16, jnp.bfloat16)


def test_every_program_has_something_to_multiply(monkeypatch):
    """Unmeasured: K is split as often as leaves no more units than programs, of the gate's product not at all."""
    monkeypatch.setattr(dispatch, "current_device", lambda: HOPPER)
    configs = tuning.decode_layer_configs(64, tuple(LLAMA_8B), 132)
    assert configs is not None
    assert [config.split_k for config in configs] == [4, 1, 4, 2]
    assert len({(c.block_m, c.block_n, c.block_k, c.stages) for c in configs}) == 1
