"""Launch the Triton kernels on torch tensors: in Triton's interpreter on the CPU, or compiled, on a GPU.

`tests/conftest.py` asks for the interpreter (TRITON_INTERPRET=1) unless the caller set it to 0. The interpreter computes
bfloat16 wrongly, so kernels run in float16 or float32 on the CPU; inline PTX has no meaning there, so the plain
unpacking runs. On a GPU both inline PTX and bfloat16 run; float32 would mean tf32 products.
"""

import os

import numpy as np
import torch
import triton.language as tl

from pallas_kernels import (
    add_rms_norm_triton,
    begin_step_triton,
    decode_attention_triton,
    dense_matmul_triton,
    dequantize_triton,
    draw_corrected_triton,
    draw_token_triton,
    gated_activation_triton,
    gated_matmul_triton,
    int4_matmul_triton,
    merge_layer_triton,
    rope_attention_triton,
    rope_cache_triton,
)
from pallas_kernels.codes import NF4, PER_BYTE
from pallas_kernels.completions import Completions, Ends
from pallas_kernels.merge_layer import Source
from pallas_kernels.tuning import WGMMA, AttentionConfig, DenseConfig, GatedConfig, Int4Config

ON_GPU = os.environ["TRITON_INTERPRET"] == "0"
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = ("float16", "bfloat16") if ON_GPU else ("float16", "float32")
TOLERANCE = {"float16": 2e-3, "float32": 2e-6, "bfloat16": 8e-3}


def rounded(array, dtype: str) -> torch.Tensor:
    """The array on the device, in `dtype`."""
    return torch.tensor(np.asarray(array)).to(DEVICE, getattr(torch, dtype))


def float64(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's exact values."""
    return tensor.double().cpu().numpy()


def poisoned(*shape: int) -> torch.Tensor:
    """float32 output that betrays every element the kernel does not write."""
    return torch.full(shape, float("nan"), device=DEVICE)


def scalar(value: int) -> torch.Tensor:
    """An int32 that the kernel reads through a pointer."""
    return torch.tensor([value], dtype=torch.int32, device=DEVICE)


def permuted(x: torch.Tensor) -> torch.Tensor:
    """Rows with the column order of the wgmma form."""
    m, k = x.shape
    return x.reshape(m, k // 16, 4, 2, 2).transpose(2, 3).reshape(m, k).contiguous()


def int4_matmul(x, packed, scales, layer, xa, b, config: Int4Config, pointer: bool = True) -> np.ndarray:
    """The kernel as `int4_matmul_triton.int4_matmul` launches it; `x` gives the compute dtype. float32 result."""
    (m, k), n, group = x.shape, packed.shape[-2], 2 * packed.shape[-1] // scales.shape[-1]
    x = permuted(x) if config.product == WGMMA else x
    packed, scales = (torch.as_tensor(array).to(DEVICE) for array in (packed, scales))
    rank = 0 if xa is None else xa.shape[-1]
    xa_parts = 1 if xa is None or xa.ndim == 2 else xa.shape[0]
    out = poisoned(config.split_k, m, n)
    int4_matmul_triton.int4_matmul_kernel[int4_matmul_triton.grid(m, n, config)](
        x,
        packed,
        scales,
        scalar(layer) if pointer else layer,
        scales if xa is None else xa,
        scales if b is None else b,
        out,
        B_STACKED=b is not None and b.ndim == 3,
        LAYER_IS_POINTER=pointer,
        PTX=ON_GPU,
        DTYPE=getattr(tl, str(x.dtype).removeprefix("torch.")),
        num_warps=config.warps,
        num_stages=config.stages,
        **int4_matmul_triton.kernel_constants(m, n, k, group, rank, config, xa_parts),
    )
    return out.sum(0).cpu().numpy()


def dequantize(packed, scales, layer, dtype: str, code: str = "int4", tail=None, pointer: bool = True) -> np.ndarray:
    """The kernel as `dequantize_triton.dequantize` launches it."""
    table = torch.tensor(NF4, device=DEVICE)
    packed, scales = (torch.as_tensor(array).to(DEVICE) for array in (packed, scales))
    constants = dequantize_triton.kernel_constants(packed, scales, code, 0 if tail is None else tail.shape[-1])
    columns = PER_BYTE[code] * constants["WIDTH"] + constants["R"]
    out = poisoned(constants["N"], columns).to(getattr(torch, dtype))
    dequantize_triton.dequantize_kernel[dequantize_triton.grid(constants)](
        packed,
        scales,
        scalar(layer) if pointer else layer,
        scales if tail is None else tail,
        table,
        out,
        LAYER_IS_POINTER=pointer,
        num_warps=dequantize_triton.WARPS,
        **constants,
    )
    return float64(out)


def dense_matmul(x, weight, layer: int, config: DenseConfig, pointer: bool) -> np.ndarray:
    """The kernel as `dense_matmul_triton.partial_sums` launches it on a stack of weights; float32 result."""
    (m, k), n = x.shape, weight.shape[-2]
    out = poisoned(config.split_k, m, n)
    dense_matmul_triton.dense_matmul_kernel[dense_matmul_triton.grid(m, n, config)](
        x,
        weight,
        scalar(layer) if pointer else layer,
        out,
        LAYER_IS_POINTER=pointer,
        num_warps=config.warps,
        num_stages=config.stages,
        **dense_matmul_triton.kernel_constants(m, n, k, config),
    )
    return out.sum(0).cpu().numpy()


def decode_attention(
    q, prompt_k, prompt_v, lengths, k, v, length, layer, scale, window, config: AttentionConfig, scales=None
):
    """The kernels as `decode_attention_triton.decode_attention` launches them; torch in, float32 numpy out."""
    triton_kernels = decode_attention_triton
    constants = triton_kernels.kernel_constants(q, prompt_k, k, scale, window, config, scales is not None, True)
    rows, depth = int(np.prod(q.shape[:3])), q.shape[-1]
    splits = config.prompt_splits + config.suffix_splits
    parts, results = (poisoned(rows, splits, 2), poisoned(rows, splits, depth)), [poisoned(rows, depth) for _ in "ab"]
    triton_kernels.kernel(config)[triton_kernels.grid(constants)](
        q,
        prompt_k,
        prompt_v,
        torch.tensor(lengths).to(DEVICE),
        k,
        v,
        scalar(length),
        scalar(layer),
        *(scales or parts[:1] * 4),
        *(parts if splits > 1 else results),
        LAYER_IS_POINTER=True,
        LENGTH_IS_POINTER=True,
        num_warps=config.warps,
        num_stages=config.stages,
        **constants,
    )
    if splits > 1:
        sizes = dict(D=depth, SPLITS=splits, SPLITS_PAD=1 << (splits - 1).bit_length(), PERMUTED=True)
        triton_kernels.merge_kernel[(rows,)](*parts, *results, **sizes)
    out, reordered = results
    assert torch.equal(reordered, permuted(out))
    return out.cpu().numpy().reshape(q.shape)


def rope_attention(
    sums, cos, sin, prompt_k, prompt_v, lengths, k, v, slot, layer, norms, bias, eps, scale, window, config, pointers
) -> np.ndarray:
    """The kernel as `rope_attention_triton.rope_attention` launches it, torch in: the outputs, and k and v are written."""
    given = dict(EPS=eps, NORMED=norms is not None, BIASED=bias is not None)
    constants = rope_attention_triton.kernel_constants(sums, prompt_k, k, scale, window, config, True, **given)
    out, reordered = (poisoned(sums.shape[1] * sums.shape[2], constants["H"] * constants["D"]) for _ in "ab")
    rope_attention_triton.rope_attention_kernel[rope_attention_triton.grid(constants)](
        sums,
        cos,
        sin,
        prompt_k,
        prompt_v,
        lengths,
        k,
        v,
        *(norms or (cos, cos)),
        cos if bias is None else bias,
        scalar(slot) if pointers else slot,
        scalar(layer) if pointers else layer,
        k,
        v,
        out,
        reordered,
        DTYPE=getattr(tl, str(k.dtype).removeprefix("torch.")),
        SLOT_IS_POINTER=pointers,
        LAYER_IS_POINTER=pointers,
        PREFETCHED=rope_attention_triton.prefetched(config) if ON_GPU else 0,
        num_warps=config.warps,
        num_stages=config.stages,
        **constants,
    )
    assert torch.equal(reordered, permuted(out))
    return out.cpu().numpy()


def rope_and_cache(sums, cos, sin, k, v, slot, layer, norms, bias, eps):
    """The kernel on torch tensors of values, not codes: k and v are written."""
    constants = rope_cache_triton.kernel_constants(sums, k, eps, norms is not None, bias is not None)
    rope_cache_triton.rope_and_cache_kernel[rope_cache_triton.grid(constants)](
        sums,
        cos,
        sin,
        *(k, v, cos, cos),
        *(norms or (cos, cos)),
        cos if bias is None else bias,
        slot,
        layer,
        poisoned(*sums.shape[1:3], constants["H"], constants["D"]),
        *(k, v, cos, cos),
        DTYPE=getattr(tl, str(k.dtype).removeprefix("torch.")),
        SLOT_IS_POINTER=False,
        LAYER_IS_POINTER=False,
        num_warps=rope_cache_triton.WARPS,
        **constants,
    )


def add_rms_norm(case, layer: int, eps: float, dtype: str, pointer: bool):
    """The kernel on the numpy arrays of `case`; (residual, rows, permuted rows) as numpy, every output poisoned before."""
    residual, scale = rounded(case.residual, dtype), rounded(case.scale, dtype)
    parts = rounded(case.parts, "float32")
    stacks = [None if stack is None else rounded(stack, dtype) for stack in (case.bias, case.branch_scale)]
    outputs = [poisoned(*residual.shape).to(residual.dtype) for _ in range(3)]
    add_rms_norm_triton.add_rms_norm_kernel[(residual.shape[0],)](
        residual,
        parts,
        scale,
        *(residual if stack is None else stack for stack in stacks),
        scalar(layer) if pointer else layer,
        *outputs,
        DTYPE=getattr(tl, dtype),
        LAYER_IS_POINTER=pointer,
        num_warps=add_rms_norm_triton.warps(residual.shape[1]),
        **add_rms_norm_triton.kernel_constants(residual, parts, eps, case.offset, *stacks, permuted=True),
    )
    return [out.float().cpu().numpy() for out in outputs]


def gated_activation(parts, bias, layer: int, activation: str, dtype: str, pointer: bool):
    """The kernel on numpy arrays; (rows, permuted rows) as numpy, both poisoned before."""
    sums = rounded(parts, "float32")
    stack = None if bias is None else rounded(bias, "float32")
    constants = gated_activation_triton.kernel_constants(sums, activation, stack, permuted=True)
    outputs = [poisoned(constants["M"], constants["F"]).to(getattr(torch, dtype)) for _ in range(2)]
    gated_activation_triton.gated_activation_kernel[gated_activation_triton.grid(constants)](
        sums,
        sums if stack is None else stack,
        scalar(layer) if pointer else layer,
        *outputs,
        LAYER_IS_POINTER=pointer,
        num_warps=gated_activation_triton.WARPS,
        **constants,
    )
    return [out.float().cpu().numpy() for out in outputs]


def gated_matmul(x, weight, bias, layer: int, activation: str, config: GatedConfig, pointer: bool) -> np.ndarray:
    """The kernel as `gated_matmul_triton.gated_matmul` launches it; the result, in x's dtype, was poisoned before."""
    constants = gated_matmul_triton.kernel_constants(x, weight, bias, activation, config)
    out = poisoned(constants["M"], constants["F"]).to(x.dtype)
    gated_matmul_triton.gated_matmul_kernel[gated_matmul_triton.grid(constants)](
        x,
        weight,
        x if bias is None else bias,
        scalar(layer) if pointer else layer,
        out,
        LAYER_IS_POINTER=pointer,
        num_warps=config.warps,
        num_stages=config.stages,
        **constants,
    )
    return float64(out)


def begin_step(tokens, table, scale, positions, how: dict, dtype: str, pointer: bool) -> list[np.ndarray]:
    """The kernel on numpy arrays: residual, rows, permuted rows, slot, cos, sin, all poisoned before."""
    table, scale = rounded(table, dtype), rounded(scale, dtype)
    lengths = torch.tensor(positions.lengths, dtype=torch.int32, device=DEVICE)
    rotations = None if positions.rotations is None else rounded(positions.rotations, "float32")
    constants = begin_step_triton.kernel_constants(table, lengths, rotations, permuted=True, **how)
    rows = [poisoned(len(tokens), table.shape[1]).to(table.dtype) for _ in range(3)]
    rotated = [poisoned(len(lengths), constants["R"]) for _ in range(2)]
    outputs = [*rows, scalar(-1), *rotated]
    begin_step_triton.begin_step_kernel[(len(tokens),)](
        torch.tensor(tokens, dtype=torch.int32, device=DEVICE),
        table,
        scale,
        lengths,
        scalar(positions.filled),
        scalar(positions.step) if pointer else positions.step,
        table if rotations is None else rotations,
        *outputs,
        DTYPE=getattr(tl, dtype),
        STEP_IS_POINTER=pointer,
        num_warps=begin_step_triton.warps(table.shape[1]),
        **constants,
    )
    return [out.float().cpu().numpy() for out in outputs]


def merge_layer(into, source: Source, index: int, layer: int, group: int, gate: bool, dtype: str, scales_dtype: str):
    """The kernel on numpy arrays, in place of the stack `into`; (packed, scales) as numpy."""
    constants, grid = merge_layer_triton.kernel_constants(source, group, gate)
    packed, scales = torch.tensor(source.packed, device=DEVICE), rounded(source.scales, "float32")
    factors = [packed, packed] if source.adapter is None else [rounded(factor, "float32") for factor in source.adapter]
    stacks = [torch.tensor(into.packed, device=DEVICE), rounded(into.scales, scales_dtype)]
    merge_layer_triton.merge_layer_kernel[grid](
        packed,
        scales,
        *factors,
        scalar(index),
        scalar(layer),
        *stacks,
        *stacks,
        DTYPE=getattr(tl, dtype),
        num_warps=merge_layer_triton.WARPS,
        **constants,
    )
    return stacks[0].cpu().numpy(), float64(stacks[1])


def draw_token(logits, uniform, *, temperature: float, step: int | None = None, block: int = draw_token_triton.BLOCK):
    """The kernels as `draw_token_triton.draw_token` launches them; (token, log-probability) as numpy, poisoned before."""
    return _draw(logits, uniform, (), [], temperature, step, block)[:2]


def draw_and_record(logits, uniform, completions: Completions, *, temperature: float, step: int, ends: Ends):
    """The kernels as `draw_token_triton.draw_and_record` launches them; as that, in numpy."""
    given, outputs, how = _recording(completions, ends)
    token, _, *left = _draw(logits, uniform, given, outputs, temperature, step, draw_token_triton.BLOCK, **how)
    return token, Completions(*reversed(left))


def draw_corrected(proposal, hidden, head, uniform, *, temperature: float, step: int | None = None):
    """The kernels as `draw_corrected_triton.draw_corrected` launches them; (token, log-probability) as numpy, poisoned before."""
    return _draw_corrected(proposal, hidden, head, uniform, (), [], temperature, step)[:2]


def draw_corrected_and_record(proposal, hidden, head, uniform, completions, *, temperature: float, step: int, ends):
    """The kernels as `draw_corrected_triton.draw_corrected_and_record` launches them; as that, in numpy."""
    given, outputs, how = _recording(completions, ends)
    token, _, *left = _draw_corrected(proposal, hidden, head, uniform, given, outputs, temperature, step, **how)
    return token, Completions(*reversed(left))


def _recording(completions: Completions, ends: Ends) -> tuple[tuple, list, dict]:
    """(arguments, outputs, constants) as of `completions_triton.recording`."""
    remaining, packed = (torch.tensor(np.array(x), device=DEVICE) for x in (completions.remaining, completions.packed))
    stops = torch.tensor(ends.stop_ids or (0,), dtype=torch.int32, device=DEVICE)
    how = dict(RECORD=True, STOPS=len(ends.stop_ids), PAD=ends.pad_id)
    return (remaining, packed, stops), [remaining, packed], how


def _draw(
    logits, uniform, record, outputs, temperature: float, step: int | None, block: int, **how
) -> list[np.ndarray]:
    shared, row = draw_token_triton.kernel_constants(*logits.shape, temperature, block)
    how = {"num_warps": draw_token_triton.WARPS} | row | how
    return _find(draw_token_triton.find_token_kernel, logits, (), uniform, record, outputs, step, shared, **how)


def _draw_corrected(
    proposal, hidden, head, uniform, record, outputs, temperature: float, step: int | None, **how
) -> list[np.ndarray]:
    shape = (*proposal.shape, hidden.shape[1], uniform.shape[-1])
    shared, row = draw_corrected_triton.kernel_constants(*shape, temperature)
    given = tuple(rounded(part, DTYPES[-1]) for part in (hidden, head))
    how = {"num_warps": draw_corrected_triton.WARPS} | row | how
    kernel = draw_corrected_triton.find_corrected_kernel
    return _find(kernel, proposal, given, uniform, record, outputs, step, shared, **how)


def _find(kernel, logits, given, uniform, record, outputs, step: int | None, shared: dict, **how) -> list[np.ndarray]:
    """Statistics of blocks and one of the kernels that find tokens by them; `given` are its arguments between the logits and those."""
    rows = len(logits)
    source, numbers = rounded(logits, "float32"), rounded(uniform, "float32")
    statistics = [poisoned(rows, shared["BLOCKS"]) for _ in "ab"]
    token, logprob = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE), poisoned(rows)
    grid = (rows * shared["BLOCKS"],)
    draw_token_triton.block_sums_kernel[grid](source, *statistics, **shared, num_warps=draw_token_triton.WARPS)
    outputs = [token, logprob, *(outputs or (token, token))]
    kernel[(rows,)](
        source,
        *given,
        *statistics,
        numbers,
        0 if step is None else scalar(step),
        *(record or (source,) * 3),
        *outputs,
        STEPS=step is not None,
        **dict(RECORD=False, STOPS=0, PAD=0) | how,
    )
    return [output.cpu().numpy() for output in outputs]
