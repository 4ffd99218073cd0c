"""x @ quantized weight^T with a LoRA epilogue, over a stack of layers; differentiable in x, xa and lora_b.

The backward keeps the packed weights only and dequantizes them again: dx = g @ W, dxa = g @ B, dB = g^T xa. The base
is frozen by design, so differentiating `scales` raises instead of returning zeros (`packed` is an integer array, which
JAX itself refuses to differentiate).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import dequantized, dispatch, reference, tuning
from pallas_kernels.codes import PER_BYTE
from pallas_kernels.rows import Rows, joined


def int4_matmul(
    x: Float[Array, "M K"],
    packed: UInt8[Array, "*L N K2"],
    scales: Float[Array, "*L N K_g"],
    *,
    layer: Int[Array, ""] | int | None = None,
    xa: Float[Array, "M R"] | None = None,
    lora_b: Float[Array, "*L N R"] | None = None,
    out_dtype=None,
    implementation: str | None = None,
    code: str = "int4",
) -> Float[Array, "M N"]:
    """x @ dequant(W[layer])^T (+ xa @ lora_b[layer]^T).

    Args:
      x: activations.
      packed: the bytes of the weights, read by `code`, one layer or a stack of them.
      scales: one scale a group of input elements.
      layer: index into the stack, a Python int or a traced scalar; None when there is no stack.
      xa: x @ A^T, already times the LoRA scale. Given together with `lora_b`.
      lora_b: one layer's [N, R] also when `packed` is a stack, or a stack [L, N, R].
      out_dtype: x's dtype by default. Accumulation is float32.
      implementation: "reference", "triton", or None for the rule in `dispatch.py`.
      code: "int4" (symmetric), "nf4", "int8" or "fast8"; see `codes.py`.

    Raises:
      ValueError: shapes do not fit, or the named implementation cannot run here.
      TypeError: under differentiation with respect to `scales`.
    """
    _check_shapes(x, packed, scales, layer, xa, lora_b, code)
    chosen = _implementation(x, packed, scales, code, implementation)
    # A Python index stays one: the kernel then gets it as an argument instead of reading it from memory first.
    static = layer if layer is None or isinstance(layer, int) else None
    traced = None if layer is static else jnp.asarray(layer, jnp.int32)
    return _int4_matmul(jnp.dtype(out_dtype or x.dtype), (chosen, code), static, x, packed, scales, traced, xa, lora_b)


def int4_partial_sums(
    rows: Rows,
    packed: UInt8[Array, "*L N K2"],
    scales: Float[Array, "*L N K_g"],
    *,
    layer: Int[Array, ""] | int | None = None,
    xa: Float[Array, "*P M R"] | None = None,
    lora_b: Float[Array, "*L N R"] | None = None,
    out_dtype=None,
    implementation: str | None = None,
    code: str = "int4",
) -> Float[Array, "S M N"]:
    """`int4_matmul` as the partial sums that the kernel leaves, for a consumer that adds them; not differentiable.

    One part in `out_dtype`, or several where the kernel splits K: float32, and of its Mosaic GPU form `out_dtype`, each rounded before
    they are added, about as much as rounding a product once. Arguments and errors are those of `int4_matmul`,
    except that `rows` may bring their permuted columns along (without them, an operation of its own permutes them) and that
    `xa` may come as partial sums.
    """
    x = rows.plain
    parts = xa if xa is None or xa.ndim == 3 else xa[None]
    _check_shapes(x, packed, scales, layer, None if parts is None else parts[0], lora_b, code)
    if rows.permuted is not None and rows.permuted.shape != x.shape:
        raise ValueError(f"int4_partial_sums: permuted rows must be {x.shape}, got {rows.permuted.shape}")
    layer = layer if layer is None or isinstance(layer, int) else jnp.asarray(layer, jnp.int32)
    chosen, out_dtype = _implementation(x, packed, scales, code, implementation), jnp.dtype(out_dtype or x.dtype)
    if chosen == dispatch.MOSAIC:
        return _int8_partial_sums(rows, packed, scales, layer, xa, lora_b, out_dtype, code)
    if chosen == dispatch.TRITON:
        from pallas_kernels.int4_matmul_triton import partial_sums

        return partial_sums(x, rows.permuted, packed, scales, layer, xa, lora_b, out_dtype)
    b = None if lora_b is None else _lora_layer(lora_b, layer)
    xa = None if parts is None else joined(parts, x.dtype)
    return _many_rows(chosen)(x, packed, scales, layer, xa, b, out_dtype, code)[None]


def reads_permuted(
    m: int, dtype, packed: UInt8[Array, "*L N K2"], scales: Float[Array, "*L N K_g"], code: str = "int4"
) -> bool:
    """Whether the product with these weights reads its M rows with permuted columns, on this device."""
    group, (n, k) = reference.group_size(packed, scales, code), (packed.shape[-2], PER_BYTE[code] * packed.shape[-1])
    if PER_BYTE[code] == 1:
        return has_int8_kernel(m, n, k, group, dtype, scales.dtype)
    rule, product = _int4_rule(m, n, k, group, dtype, scales.dtype, code)
    return rule == dispatch.TRITON and product in tuning.READS_PERMUTED


def _int4_rule(m: int, n: int, k: int, group: int, dtype, scales_dtype, code: str) -> tuple[str, str]:
    """What `dispatch.int4_matmul_rule` says for M rows and weights [N, K] on this device, and the form of the kernel if it runs."""
    device = dispatch.current_device()
    mosaic = dispatch.mosaic_problem(device, dtype, scales_dtype, group) is None
    product = tuning.int4_config(m, n, k, group, mosaic=mosaic).product
    mosaic = product == tuning.MOSAIC
    return dispatch.int4_matmul_rule(device, dtype, m, k, group, code, mosaic=mosaic), product


def has_int8_kernel(m: int, n: int, k: int, group: int, dtype, scales_dtype) -> bool:
    """Whether M rows are multiplied by 8-bit weights [N, K] in one kernel on this device, or the weights dequantized first."""
    return _int8_config(m, n, k, group, dtype, scales_dtype) is not None


def _int8_config(m: int, n: int, k: int, group: int, dtype, scales_dtype) -> tuning.Int4Config | None:
    """The blocks of the kernel for 8-bit weights and few rows; None where it cannot run."""
    if m > dispatch.INT8_ROWS or dispatch.mosaic_problem(dispatch.current_device(), dtype, scales_dtype, group):
        return None
    return tuning.int8_config(m, n, k, group)


def _int8_partial_sums(rows: Rows, packed, scales, layer, xa, lora_b, out_dtype, code: str) -> Float[Array, "S M N"]:
    """What that kernel leaves, in `out_dtype`: several parts where it splits K."""
    from pallas_kernels.int4_matmul_mosaic import partial_sums

    m, (n, k), group = rows.plain.shape[0], packed.shape[-2:], reference.group_size(packed, scales, code)
    config = tuning.int8_config(m, n, k, group)
    assert config is not None
    permuted = rows.in_permuted_order()
    return partial_sums(permuted, packed, scales, layer, xa, lora_b, out_dtype, config, code)


def _implementation(x, packed, scales, code: str, implementation: str | None) -> str:
    device, group = dispatch.current_device(), reference.group_size(packed, scales, code)
    (m, k), n = x.shape, packed.shape[-2]
    if implementation is None and PER_BYTE[code] == 1 and has_int8_kernel(m, n, k, group, x.dtype, scales.dtype):
        return dispatch.MOSAIC
    return dispatch.resolve(
        "int4_matmul",
        implementation,
        _int4_rule(m, n, k, group, x.dtype, scales.dtype, code)[0],
        dispatch.int4_matmul_problem(device, x.dtype, k, group, code),
    )


def _check_shapes(x, packed, scales, layer, xa, lora_b, code) -> None:
    width = PER_BYTE[code] * packed.shape[-1]
    if packed.ndim != (2 if layer is None else 3) or scales.ndim != packed.ndim:
        raise ValueError(
            f"int4_matmul: layer={layer!r} wants packed and scales {'[N, .]' if layer is None else '[L, N, .]'}, "
            f"got {packed.shape} and {scales.shape}"
        )
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"int4_matmul: x must be [M, {width}] for packed {packed.shape}, got {x.shape}")
    byte = jnp.int8 if code == "int8" else jnp.uint8
    if packed.dtype != byte or x.shape[1] % scales.shape[-1] or packed.shape[:-1] != scales.shape[:-1]:
        raise ValueError(
            f"int4_matmul: {code} bytes and scales must agree, got {packed.dtype}{packed.shape}, {scales.shape}"
        )
    if (xa is None) != (lora_b is None):
        raise ValueError("int4_matmul: give xa and lora_b together")
    if xa is not None and lora_b is not None:
        layers = () if lora_b.ndim == 2 or layer is None else packed.shape[:1]
        if lora_b.shape != (*layers, packed.shape[-2], xa.shape[1]) or xa.shape[0] != x.shape[0]:
            raise ValueError(
                f"int4_matmul: xa {xa.shape} and lora_b {lora_b.shape} do not fit {x.shape}, {packed.shape}"
            )


def _lora_layer(lora_b, layer):
    return reference.take_layer(lora_b, layer if lora_b.ndim == 3 else None)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _int4_matmul(
    out_dtype, how: tuple[str, str], static_layer: int | None, x, packed, scales, traced_layer, xa, lora_b
):
    layer = static_layer if traced_layer is None else traced_layer
    implementation, code = how
    if implementation == dispatch.TRITON:
        from pallas_kernels.int4_matmul_triton import int4_matmul as fused

        return fused(x, packed, scales, layer, xa, lora_b, out_dtype)
    if implementation == dispatch.MOSAIC:
        return joined(_int8_partial_sums(Rows(x), packed, scales, layer, xa, lora_b, out_dtype, code), out_dtype)
    b = None if lora_b is None else _lora_layer(lora_b, layer)
    return _many_rows(implementation)(x, packed, scales, layer, xa, b, out_dtype, code)


def _many_rows(implementation: str):
    return reference.int4_matmul if implementation == dispatch.REFERENCE else dequantized.matmul


def _forward(out_dtype, how, static_layer, x, packed, scales, traced_layer, xa, lora_b):
    if scales.perturbed:
        raise TypeError("int4_matmul: quantized weights are frozen; differentiate the adapter, not the base")
    primals = (x, packed, scales, traced_layer, xa, lora_b)
    primals = tuple(None if primal is None else primal.value for primal in primals)
    out = _int4_matmul(out_dtype, how, static_layer, *primals)
    like_x = jnp.zeros((0,), x.value.dtype)  # keeps x's dtype without keeping x
    return out, (like_x, *primals[1:])


def _backward(out_dtype, how, static_layer, residuals, g):
    like_x, packed, scales, traced_layer, xa, lora_b = residuals
    layer = static_layer if traced_layer is None else traced_layer
    if isinstance(g, SymbolicZero):
        return None, None, None, None, None, None
    g = g.astype(like_x.dtype)
    layer_weight = reference.layer_weight if how[0] == dispatch.REFERENCE else dequantized.layer_weight
    g, dx = reference.transposed_product(g, packed, scales, layer, how[1], layer_weight)
    if xa is None:
        return dx, None, None, None, None, None
    b = _lora_layer(lora_b, layer).astype(g.dtype)
    dxa = reference.einsum_f32("mn,nr->mr", g, b).astype(xa.dtype)
    db = reference.einsum_f32("mn,mr->nr", g, xa.astype(g.dtype)).astype(lora_b.dtype)
    if lora_b.ndim == 3:
        db = jnp.zeros_like(lora_b).at[layer].set(db)
    return dx, None, None, None, dxa, db


_int4_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
