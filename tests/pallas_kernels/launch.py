"""Launch the Triton kernels on torch tensors: in Triton's interpreter on the CPU, or compiled, on a GPU.

`tests/conftest.py` asks for the interpreter (TRITON_INTERPRET=1) unless the caller set it to 0. The interpreter computes
bfloat16 wrongly, so kernels run in float16 or float32 on the CPU; inline PTX has no meaning there, so the plain
unpacking runs. On a GPU both inline PTX and bfloat16 run; float32 would mean tf32 products.
"""

import os

import numpy as np
import torch
import triton.language as tl

from pallas_kernels import decode_attention_triton, dequantize_triton, int4_matmul_triton
from pallas_kernels.codes import NF4, PER_BYTE
from pallas_kernels.tuning import WGMMA, AttentionConfig, Int4Config

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


def int4_matmul(x, packed, scales, layer, xa, b, config: Int4Config, pointer: bool = True) -> np.ndarray:
    """The kernel as `int4_matmul_triton.int4_matmul` launches it; `x` gives the compute dtype. float32 result."""
    (m, k), n, group = x.shape, packed.shape[-2], 2 * packed.shape[-1] // scales.shape[-1]
    x = x.reshape(m, k // 16, 4, 2, 2).transpose(2, 3).reshape(m, k).contiguous() if config.product == WGMMA else x
    packed, scales = (torch.as_tensor(array).to(DEVICE) for array in (packed, scales))
    rank = 0 if xa is None else xa.shape[1]
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
        **int4_matmul_triton.kernel_constants(m, n, k, group, rank, config),
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


def decode_attention(
    q, prompt_k, prompt_v, lengths, k, v, length, layer, scale, window, config: AttentionConfig, scales=None
):
    """Both kernels as `decode_attention_triton.decode_attention` launches them; torch in, float32 numpy out."""
    constants = decode_attention_triton.kernel_constants(q, prompt_k, k, scale, window, config, scales is not None)
    rows, depth = int(np.prod(q.shape[:3])), q.shape[-1]
    splits = config.prompt_splits + config.suffix_splits
    stats, values, out = poisoned(rows, splits, 2), poisoned(rows, splits, depth), poisoned(rows, depth)
    decode_attention_triton.decode_attention_kernel[decode_attention_triton.grid(constants)](
        q,
        prompt_k,
        prompt_v,
        torch.tensor(lengths).to(DEVICE),
        k,
        v,
        scalar(length),
        scalar(layer),
        *(scales or (stats,) * 4),
        stats,
        values,
        LAYER_IS_POINTER=True,
        LENGTH_IS_POINTER=True,
        num_warps=config.warps,
        num_stages=config.stages,
        **constants,
    )
    padded = 1 << (splits - 1).bit_length()
    decode_attention_triton.merge_kernel[(rows,)](stats, values, out, D=depth, SPLITS=splits, SPLITS_PAD=padded)
    return out.cpu().numpy().reshape(q.shape)
