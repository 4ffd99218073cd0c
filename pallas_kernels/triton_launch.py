"""Launching a Triton kernel from JAX so that XLA can record the launch into a CUDA graph.

jax-triton 0.3.1, the release that works with triton 3.6, compiles a kernel and lowers it to a custom call of XLA's old
registry. XLA never puts those into a command buffer (its name for a CUDA graph), and a decode step is hundreds of
launches of a few microseconds each, so the host becomes the bottleneck. jaxlib has the same launcher under the typed
FFI, `triton_kernel_call_ffi`, marked as safe to record. `triton_call` is a primitive whose lowering is jax-triton's with
the resulting operation turned into a call of that target. jax-triton 0.4 does the same by itself.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax_triton import triton_lib  # pyright: ignore[reportMissingImports] - of the GPU extra
from jaxlib.mlir import ir

_TARGET = "triton_kernel_call_ffi"
_TYPED_FFI = 4

_triton_call_p = Primitive("triton_call")
_triton_call_p.multiple_results = True


@_triton_call_p.def_abstract_eval
def _abstract(*_: Any, out_shapes: Sequence[jax.ShapeDtypeStruct], **__: Any) -> list[Any]:
    return [ShapedArray(out.shape, out.dtype) for out in out_shapes]


def _lower(ctx: Any, *operands: Any, **params: Any) -> Any:
    results = triton_lib.triton_kernel_call_lowering(triton_lib.get_cuda_backend, ctx, *operands, **params)
    call = results[0].owner
    opaque = ir.StringAttr(call.attributes["backend_config"])
    call.attributes["call_target_name"] = ir.StringAttr.get(_TARGET)
    call.attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), _TYPED_FFI)
    call.attributes["backend_config"] = ir.DictAttr.get({"opaque": opaque})
    return results


mlir.register_lowering(_triton_call_p, _lower, platform="cuda")


def triton_call(
    *args: Any,
    kernel: Any,
    out_shape: Any,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int | None = None,
    input_output_aliases: dict[int, int] | None = None,
    **constants: Any,
) -> Any:
    """`jax_triton.triton_call`, recordable: launch `kernel` on `grid` and return arrays of `out_shape`.

    Args:
      args: arrays, and Python numbers, which become scalar arguments.
      kernel: a `triton.jit` function; it takes pointers to the outputs after `args`, then `constants`.
      out_shape: a `jax.ShapeDtypeStruct` or a sequence of them.
      grid: programs along each axis.
      num_warps, num_stages: Triton's compile options.
      input_output_aliases: {argument: output} that share a buffer.
      constants: the kernel's `tl.constexpr` arguments.
    """
    numbers = [(i, triton_lib.get_triton_type(arg), arg) for i, arg in enumerate(args) if isinstance(arg, int | float)]
    arrays = [arg for arg in args if not isinstance(arg, int | float)]
    outs, tree = jax.tree.flatten(out_shape)
    results = _triton_call_p.bind(
        *arrays,
        fn=kernel,
        scalar_args=tuple(numbers),
        name="",
        custom_call_target_name=_TARGET,
        out_shapes=tuple(outs),
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        num_ctas=1,
        compute_capability=None,
        enable_fp_fusion=True,
        input_output_aliases=tuple((input_output_aliases or {}).items()),
        zeroed_outputs=(),
        debug=False,
        serialized_metadata=b"",
        **constants,
    )
    return jax.tree.unflatten(tree, results)
