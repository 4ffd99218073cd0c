"""Launching a Triton kernel from JAX so that XLA can record the launch into a CUDA graph.

jax-triton 0.3.1, the release that works with triton 3.6, lowers a kernel to a custom call of XLA's old registry. XLA never
puts those into a command buffer (its name for a CUDA graph), and a decode step is hundreds of launches of a few microseconds
each, so the host becomes the bottleneck. jaxlib has the same launcher under the typed FFI, `triton_kernel_call_ffi`,
marked as safe to record: `triton_call` is a primitive that is lowered to it. jax-triton 0.4 does the same by itself.
Compiling is `triton_compile.py`'s.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax_triton import triton_lib  # pyright: ignore[reportMissingImports] - of the GPU extra
from jaxlib.mlir import ir

from pallas_kernels import dispatch
from pallas_kernels.triton_compile import POINTER_BYTES, Request, compiled

_jaxlib: Any = triton_lib.triton_kernel_call_lib
_TARGET = "triton_kernel_call_ffi"
_UNTYPED, _TYPED_FFI = 2, 4
_STAGES = 3
"""Triton's own default."""

_triton_call_p = Primitive("triton_call")
_triton_call_p.multiple_results = True


@_triton_call_p.def_abstract_eval
def _abstract(*_: Any, out_shapes: Sequence[jax.ShapeDtypeStruct], **__: Any) -> list[Any]:
    return [ShapedArray(out.shape, out.dtype) for out in out_shapes]


def _lower(
    ctx: Any,
    *operands: Any,
    kernel: Any,
    numbers: tuple[tuple[int, int | float], ...],
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    aliases: tuple[tuple[int, int], ...],
    constants: tuple[tuple[str, Any], ...],
) -> Any:
    arguments: list[Any] = list(ctx.avals_in)
    for position, number in numbers:
        arguments.insert(position, number)
    arguments += ctx.avals_out
    types = tuple(map(triton_lib.get_triton_type, arguments))
    capability = dispatch.current_device().capability
    assert capability is not None, "the rule in dispatch.py takes Triton on NVIDIA GPUs only"
    request = Request(types, constants, num_warps, num_stages, 10 * capability[0] + capability[1])
    opaque = _opaque(kernel, request, grid, tuple(arg for _, arg in numbers))
    rule = jax.ffi.ffi_lowering(_TARGET, api_version=_UNTYPED, operand_output_aliases=dict(aliases))
    results: Any = rule(ctx, *operands)
    # `ffi_lowering` cannot write bytes into a typed call's dictionary.
    call = results[0].owner
    call.attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), _TYPED_FFI)
    call.attributes["backend_config"] = ir.DictAttr.get({"opaque": ir.StringAttr.get(opaque)})
    return results


@functools.lru_cache(maxsize=1024)
def _opaque(kernel: Any, request: Request, grid: tuple[int, ...], numbers: tuple[int | float, ...]) -> bytes:
    """What jaxlib's launcher reads: the compressed description of one launch."""
    binary = compiled(kernel, request)
    # The Triton IR in front of the capability is for debugging only; without it the program is half as long.
    loaded = _jaxlib.TritonKernel(binary.name, request.warps, 1, binary.shared, binary.ptx, "", request.capability)
    values = iter(numbers)
    parameters = [
        _jaxlib.create_array_parameter(0, POINTER_BYTES)
        if kind.startswith("*")
        else _jaxlib.create_scalar_parameter(next(values), kind)
        for kind in request.types
    ]
    call = _jaxlib.TritonKernelCall(loaded, *grid, *(1,) * (3 - len(grid)), parameters)
    return zlib.compress(call.to_proto("", b""))


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
    numbers = [(i, arg) for i, arg in enumerate(args) if isinstance(arg, int | float)]
    arrays = [arg for arg in args if not isinstance(arg, int | float)]
    outs, tree = jax.tree.flatten(out_shape)
    results = _triton_call_p.bind(
        *arrays,
        kernel=kernel,
        numbers=tuple(numbers),
        out_shapes=tuple(outs),
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages or _STAGES,
        aliases=tuple((input_output_aliases or {}).items()),
        constants=tuple(sorted(constants.items())),
    )
    return jax.tree.unflatten(tree, results)
