"""The dispatch rules, read for devices that the machine running the tests does not have."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Device

CPU = Device("cpu")
T4 = Device("gpu", (7, 5), True, "Tesla T4")
A100 = Device("gpu", (8, 0), True, "NVIDIA A100")
H100 = Device("gpu", (9, 0), True, "NVIDIA H100")
H100_MOSAIC = Device("gpu", (9, 0), True, "NVIDIA H100", has_mosaic=True)
H100_BARE = Device("gpu", (9, 0), False, "NVIDIA H100")


@pytest.mark.parametrize(
    ("device", "dtype", "m", "group", "want"),
    [
        (CPU, jnp.bfloat16, 16, 64, "reference"),
        (T4, jnp.float16, 16, 64, "reference"),
        (H100_BARE, jnp.bfloat16, 16, 64, "reference"),
        (H100, jnp.float32, 16, 64, "reference"),
        (H100, jnp.bfloat16, 16, 48, "reference"),
        (H100, jnp.bfloat16, 16, 64, "triton"),
        (A100, jnp.float16, 64, 128, "triton"),
        (H100, jnp.bfloat16, 8192, 64, "dequantize"),
        (A100, jnp.bfloat16, 8192, 64, "dequantize"),
        (H100, jnp.float32, 8192, 64, "reference"),
        (H100, jnp.bfloat16, 8192, 48, "reference"),
    ],
)
def test_int4_matmul_rule(device, dtype, m, group, want):
    assert dispatch.int4_matmul_rule(device, dtype, m, 4096, group) == want


@pytest.mark.parametrize(("m", "want"), [(256, "triton"), (257, "triton"), (2048, "triton"), (2049, "dequantize")])
def test_the_mosaic_form_is_taken_for_more_rows(m, want):
    assert dispatch.int4_matmul_rule(H100_MOSAIC, jnp.bfloat16, m, 4096, 64, mosaic=True) == want
    assert dispatch.int4_matmul_rule(H100_MOSAIC, jnp.bfloat16, m, 4096, 64) == ("triton" if m == 256 else "dequantize")


def test_mosaic_form_runs_on_hopper():
    for group in (64, 128):
        assert dispatch.mosaic_problem(H100_MOSAIC, jnp.bfloat16, jnp.bfloat16, group) is None


@pytest.mark.parametrize(
    ("device", "dtype", "scales_dtype", "group", "reason"),
    [
        (CPU, jnp.bfloat16, jnp.bfloat16, 64, "needs an NVIDIA GPU"),
        (T4, jnp.bfloat16, jnp.bfloat16, 64, "needs compute capability 8.0"),
        (H100_BARE, jnp.bfloat16, jnp.bfloat16, 64, "jax-triton is not installed"),
        (H100_MOSAIC, jnp.float32, jnp.bfloat16, 64, "bfloat16 or float16 activations, got float32"),
        (H100_MOSAIC, jnp.bfloat16, jnp.bfloat16, 48, "group size must be one of"),
        (replace(A100, has_mosaic=True), jnp.bfloat16, jnp.bfloat16, 64, "written for compute capability 9"),
        (replace(H100_MOSAIC, capability=(10, 0)), jnp.bfloat16, jnp.bfloat16, 64, "written for compute capability 9"),
        (H100, jnp.bfloat16, jnp.bfloat16, 64, "needs jax >= 0.11.2"),
        (H100_MOSAIC, jnp.float16, jnp.float16, 64, "bfloat16 rows and scales, got float16 and float16"),
        (H100_MOSAIC, jnp.bfloat16, jnp.float32, 64, "bfloat16 rows and scales, got bfloat16 and float32"),
    ],
)
def test_why_the_mosaic_form_cannot_run(device, dtype, scales_dtype, group, reason):
    assert reason in str(dispatch.mosaic_problem(device, dtype, scales_dtype, group))


@pytest.mark.parametrize("code", ["nf4", "int8"])
def test_other_codes_are_unpacked_and_multiplied(code):
    assert dispatch.int4_matmul_rule(H100, jnp.bfloat16, 16, 4096, 64, code) == "dequantize"


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "want"),
    [
        (CPU, jnp.bfloat16, 128, "reference"),
        (T4, jnp.float16, 128, "reference"),
        (H100, jnp.float32, 128, "reference"),
        (H100, jnp.bfloat16, 80, "reference"),
        (H100, jnp.bfloat16, 128, "triton"),
        (A100, jnp.float16, 64, "triton"),
    ],
)
def test_decode_attention_rule(device, dtype, head_dim, want):
    assert dispatch.decode_attention_rule(device, dtype, head_dim) == want


def test_resolve_names_the_reason():
    assert dispatch.resolve("op", None, "triton", None) == "triton"
    assert dispatch.resolve("op", "reference", "triton", None) == "reference"
    with pytest.raises(ValueError, match="op: implementation='triton' cannot run: too odd"):
        dispatch.resolve("op", "triton", "reference", "too odd")


def test_the_device_of_this_process_is_known():
    assert dispatch.current_device().backend in ("cpu", "gpu", "tpu")


def test_a_softcap_takes_the_reference_and_says_why():
    assert dispatch.decode_attention_rule(H100, jnp.bfloat16, 128, softcap=50.0) == "reference"
    assert "soft-cap" in str(dispatch.decode_attention_problem(H100, jnp.bfloat16, 128, softcap=50.0))
