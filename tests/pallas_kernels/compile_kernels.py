"""Compile the kernels for GPUs this machine does not have: `python -m tests.pallas_kernels.compile_kernels 80 90`.

Prints one line a kernel: name, shared memory in bytes, bytes of registers spilled to the stack. Triton brings ptxas and
cuobjdump, so no GPU and no CUDA installation are needed. Run apart from the tests, because it needs TRITON_INTERPRET=0.
"""

import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import triton
import triton.language as tl
from jax import ShapeDtypeStruct
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
    tuning,
)
from pallas_kernels.merge_layer import Source


def unfinished_products(ttgir: str) -> int:
    """Asynchronous tensor-core products of a loop's body, less the waits for them in the same body.

    One left over would still read its registers while the next iteration writes them (see int4_matmul_triton.py). Only
    products whose left operand lies in registers count; shared memory is guarded by Triton's own barriers.
    """
    unfinished = 0
    for body in re.findall(r"scf\.for(.*?)scf\.yield", ttgir, re.DOTALL):
        products = re.findall(r"warp_group_dot .*isAsync = true.*: tensor<", body)
        waits = re.findall(r"warp_group_dot_wait .*pendings = 0", body)
        unfinished += max(0, len(products) - len(waits))
    return unfinished


def scattered_tiles(ttgir: str) -> list[str]:
    """Shared memory of bytes whose axes do not lie there in their own order: `ldmatrix` would meet one bank many times."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg.swizzled_shared<.*order = \[([\d, ]+)\]", ttgir, re.MULTILINE))
    used = set(re.findall(r"memdesc<[\dx]+xi8, (#\w+),", ttgir))
    return [
        name
        for name in used & set(layouts)
        if layouts[name] != ", ".join(sorted(layouts[name].split(", "), reverse=True))
    ]


CACHE_TYPES = {"bfloat16": "*bf16", "int8": "*i8", "float8_e4m3fn": "*fp8e4nv"}


def compile_kernel(kernel, types: dict[str, str], constants: dict, config, capability: int) -> tuple[int, int]:
    """(shared memory, stack) of the compiled kernel; pointers are 16-byte aligned, as JAX's are."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [(i,) for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = ASTSource(kernel, signature, constants, {key: [["tt.divisibility", 16]] for key in aligned})
    options = {"num_warps": config.warps, "num_stages": config.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    assert unfinished_products(compiled.asm["ttgir"]) == 0
    assert scattered_tiles(compiled.asm["ttgir"]) == []
    stack = re.search(r"STACK:(\d+)", usage.stdout)
    assert stack is not None, usage.stdout
    return compiled.metadata.shared, int(stack[1])


def int4_matmul(rows: int, capability: int, rank: int = 32, xa_parts: int = 1) -> tuple[int, int]:
    """The heuristic's kernel for one product of an 8B model."""
    n, k, group = 6144, 4096, 64
    config = tuning.int4_heuristic(rows, n, k, group, hopper=capability >= 90)
    types = dict.fromkeys(("x_ptr", "scales_ptr", "xa_ptr", "b_ptr", "out_ptr"), "*bf16")
    constants = int4_matmul_triton.kernel_constants(rows, n, k, group, rank, config, xa_parts)
    constants |= {"B_STACKED": True, "LAYER_IS_POINTER": True, "PTX": True, "DTYPE": tl.bfloat16}
    types |= {"xa_ptr": "*bf16" if xa_parts == 1 else "*fp32"}
    types |= {"packed_ptr": "*u8", "layer_ptr": "*i32"}
    return compile_kernel(int4_matmul_triton.int4_matmul_kernel, types, constants, config, capability)


def decode_attention(
    head_dim: int, capability: int, cache: str = "bfloat16", config: tuning.AttentionConfig | None = None
) -> tuple[int, int]:
    """A kernel for 8 groups of 8, the heuristic's by default."""
    q = ShapeDtypeStruct((8, 8, 12, head_dim), "bfloat16")
    prompt, suffix = (
        ShapeDtypeStruct(shape, cache) for shape in [(2, 8, 2, 256, head_dim), (2, 8, 8, 2, 512, head_dim)]
    )
    config = config or tuning.attention_heuristic(128, 16, head_dim)
    types = dict.fromkeys(("prompt_k_ptr", "prompt_v_ptr", "k_ptr", "v_ptr"), CACHE_TYPES[cache]) | {"q_ptr": "*bf16"}
    types |= dict.fromkeys(("prompt_k_scale_ptr", "prompt_v_scale_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32")
    types |= dict.fromkeys(("prompt_lengths_ptr", "length_ptr", "layer_ptr"), "*i32")
    parts = config.prompt_splits + config.suffix_splits > 1
    types |= dict.fromkeys(
        ("stats_ptr", "values_ptr", "first_out_ptr", "second_out_ptr"), "*fp32" if parts else "*bf16"
    )
    shape = (q, prompt, suffix, 0.1, 100)
    constants = decode_attention_triton.kernel_constants(*shape, config, cache != "bfloat16", permuted=True)
    constants |= {"LAYER_IS_POINTER": True, "LENGTH_IS_POINTER": True}
    return compile_kernel(decode_attention_triton.kernel(config), types, constants, config, capability)


def rope_and_cache(capability: int, layer_type: str, cache_type: str = "bfloat16") -> tuple[int, int]:
    """With norms, the layer behind a pointer or as a number (of which Triton makes a constant where it is 1)."""
    qkv, cache = ShapeDtypeStruct((3, 8, 8, 16 * 128), "float32"), ShapeDtypeStruct((2, 8, 8, 2, 512, 128), cache_type)
    constants = rope_cache_triton.kernel_constants(qkv, cache, 1e-6, True, True)
    constants |= {"DTYPE": tl.bfloat16, "SLOT_IS_POINTER": True, "LAYER_IS_POINTER": layer_type == "*i32"}
    types = dict.fromkeys(("k_in_ptr", "v_in_ptr", "k_ptr", "v_ptr"), CACHE_TYPES[cache_type])
    types |= dict.fromkeys(("cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr", "qkv_ptr"), "*fp32")
    types |= dict.fromkeys(("k_scale_in_ptr", "v_scale_in_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32")
    types |= dict.fromkeys(("bias_ptr", "q_ptr"), "*bf16")
    types |= {"slot_ptr": "*i32", "layer_ptr": layer_type}
    if layer_type == "constexpr":
        constants["layer_ptr"] = 1
    blocks = SimpleNamespace(warps=rope_cache_triton.WARPS, stages=1)
    return compile_kernel(rope_cache_triton.rope_and_cache_kernel, types, constants, blocks, capability)


def rope_attention(capability: int, config: tuning.AttentionConfig) -> tuple[int, int]:
    """With norms, a bias and three partial sums."""
    qkv = ShapeDtypeStruct((3, 8, 8, 16 * 128), "float32")
    prompt, suffix = (ShapeDtypeStruct(shape, "bfloat16") for shape in [(2, 8, 2, 256, 128), (2, 8, 8, 2, 512, 128)])
    rotation = dict(EPS=1e-6, NORMED=True, BIASED=True)
    constants = rope_attention_triton.kernel_constants(qkv, prompt, suffix, 0.1, 100, config, True, **rotation)
    constants |= {"DTYPE": tl.bfloat16, "SLOT_IS_POINTER": True, "LAYER_IS_POINTER": True}
    constants["PREFETCHED"] = rope_attention_triton.prefetched(config)
    halves = ("prompt_k_ptr", "prompt_v_ptr", "k_in_ptr", "v_in_ptr", "k_ptr", "v_ptr", "out_ptr", "permuted_ptr")
    types = dict.fromkeys((*halves, "bias_ptr"), "*bf16")
    types |= dict.fromkeys(("qkv_ptr", "cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr"), "*fp32")
    types |= dict.fromkeys(("prompt_lengths_ptr", "slot_ptr", "layer_ptr"), "*i32")
    return compile_kernel(rope_attention_triton.rope_attention_kernel, types, constants, config, capability)


def dequantize(capability: int) -> tuple[int, int]:
    """A layer of a stack, with the adapter's columns."""
    packed, scales = ShapeDtypeStruct((2, 17920, 768), "uint8"), ShapeDtypeStruct((2, 17920, 24), "bfloat16")
    constants = dequantize_triton.kernel_constants(packed, scales, "int4", 64) | {"LAYER_IS_POINTER": True}
    types = {"packed_ptr": "*u8", "scales_ptr": "*bf16", "layer_ptr": "*i32", "tail_ptr": "*fp32", "table_ptr": "*fp32"}
    blocks = SimpleNamespace(warps=dequantize_triton.WARPS, stages=1)
    kernel = dequantize_triton.dequantize_kernel
    return compile_kernel(kernel, {**types, "out_ptr": "*bf16"}, constants, blocks, capability)


def dense_matmul(rows: int, capability: int, swapped: bool) -> tuple[int, int]:
    """The heuristic's kernel for the product after the attention of an 8B model, and the other order of its operands."""
    n = k = 4096
    config = dataclasses.replace(tuning.dense_heuristic(rows, n, k), swapped=swapped)
    types = dict.fromkeys(("x_ptr", "weight_ptr"), "*bf16") | {"layer_ptr": "*i32", "out_ptr": "*fp32"}
    constants = dense_matmul_triton.kernel_constants(rows, n, k, config) | {"LAYER_IS_POINTER": True}
    return compile_kernel(dense_matmul_triton.dense_matmul_kernel, types, constants, config, capability)


def gated_matmul(rows: int, capability: int, swapped: bool) -> tuple[int, int]:
    """The heuristic's kernel for the gate of a 1.5B model, where it has two tiles side by side; swapped: one, other order."""
    x, weight, bias = (ShapeDtypeStruct(shape, "bfloat16") for shape in [(rows, 1536), (28, 17920, 1536), (28, 17920)])
    config = tuning.gated_heuristic(rows, 17920, hopper=capability >= 90)
    config = dataclasses.replace(config, swapped=True, extra_n=0) if swapped else config
    constants = gated_matmul_triton.kernel_constants(x, weight, bias, "silu", config) | {"LAYER_IS_POINTER": True}
    types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16") | {"layer_ptr": "*i32"}
    return compile_kernel(gated_matmul_triton.gated_matmul_kernel, types, constants, config, capability)


def add_rms_norm(width: int, capability: int) -> tuple[int, int]:
    """Eight partial sums, a bias, a norm of the branch and permuted columns."""
    residual, parts = ShapeDtypeStruct((64, width), "bfloat16"), ShapeDtypeStruct((8, 64, width), "float32")
    constants = add_rms_norm_triton.kernel_constants(residual, parts, 1e-6, 0.0, parts, parts, permuted=True)
    constants |= {"DTYPE": tl.bfloat16, "LAYER_IS_POINTER": True}
    types = dict.fromkeys(("residual_ptr", "scale_ptr", "sum_ptr", "rows_ptr", "permuted_ptr"), "*bf16")
    types |= {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "branch_scale_ptr": "*bf16", "layer_ptr": "*i32"}
    blocks = SimpleNamespace(warps=add_rms_norm_triton.warps(width), stages=1)
    return compile_kernel(add_rms_norm_triton.add_rms_norm_kernel, types, constants, blocks, capability)


def begin_step(width: int, capability: int) -> tuple[int, int]:
    """With rotations, a factor of the embedding and permuted columns."""
    table, lengths = ShapeDtypeStruct((1000, width), "bfloat16"), ShapeDtypeStruct((8,), "int32")
    rotations = ShapeDtypeStruct((2, 768, 64), "float32")
    constants = begin_step_triton.kernel_constants(table, lengths, rotations, 1e-6, 0.0, 39.25, permuted=True)
    constants |= {"DTYPE": tl.bfloat16, "STEP_IS_POINTER": True}
    types = dict.fromkeys(("table_ptr", "scale_ptr", "residual_ptr", "rows_ptr", "permuted_ptr"), "*bf16")
    types |= dict.fromkeys(("tokens_ptr", "lengths_ptr", "filled_ptr", "step_ptr", "slot_ptr"), "*i32")
    types |= dict.fromkeys(("rotations_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    blocks = SimpleNamespace(warps=begin_step_triton.warps(width), stages=1)
    return compile_kernel(begin_step_triton.begin_step_kernel, types, constants, blocks, capability)


def merge_layer(rank: int, capability: int) -> tuple[int, int]:
    """Gate and up of a 1.5B; rank 0: no adapter."""
    shapes = [((28, 17920, 768), "uint8"), ((28, 17920, 24), "bfloat16")]
    factors = [((28, rank, 1536), "float32"), ((28, 17920, rank), "float32")]
    adapter = tuple(ShapeDtypeStruct(*shape) for shape in factors) if rank else None
    source = Source(*(ShapeDtypeStruct(*shape) for shape in shapes), adapter)
    constants, _ = merge_layer_triton.kernel_constants(source, 64, gate=True)
    types = dict.fromkeys(("packed_ptr", "into_packed_ptr", "packed_out_ptr"), "*u8") | {"scales_ptr": "*bf16"}
    types |= dict.fromkeys(("into_scales_ptr", "scales_out_ptr"), "*bf16") | dict.fromkeys(("a_ptr", "b_ptr"), "*fp32")
    types |= dict.fromkeys(("index_ptr", "layer_ptr"), "*i32")
    blocks = SimpleNamespace(warps=merge_layer_triton.WARPS, stages=3)
    constants |= {"DTYPE": tl.bfloat16}
    return compile_kernel(merge_layer_triton.merge_layer_kernel, types, constants, blocks, capability)


def gated_activation(activation: str, capability: int) -> tuple[int, int]:
    """Two partial sums, a bias and permuted columns."""
    parts = ShapeDtypeStruct((2, 64, 17920), "float32")
    constants = gated_activation_triton.kernel_constants(parts, activation, parts, permuted=True)
    constants |= {"LAYER_IS_POINTER": True}
    types = {
        "parts_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "layer_ptr": "*i32",
        "rows_ptr": "*bf16",
        "permuted_ptr": "*bf16",
    }
    blocks = SimpleNamespace(warps=gated_activation_triton.WARPS, stages=1)
    return compile_kernel(gated_activation_triton.gated_activation_kernel, types, constants, blocks, capability)


DRAW_TYPES = dict.fromkeys(("logits_ptr", "highest_ptr", "sums_ptr", "uniform_ptr", "logprob_ptr"), "*fp32")
DRAW_TYPES |= dict.fromkeys(("step_ptr", "remaining_ptr", "packed_ptr", "stops_ptr"), "*i32")
DRAW_TYPES |= dict.fromkeys(("token_ptr", "remaining_out_ptr", "packed_out_ptr"), "*i32")
RECORDING = {"STEPS": True, "RECORD": True, "STOPS": 2, "PAD": 0}


def draw_token(capability: int) -> dict[str, tuple[int, int]]:
    """Statistics of blocks, and the search with a record, of a vocabulary that the blocks do not divide."""
    shared, row = draw_token_triton.kernel_constants(64, 151_936, 0.7)
    blocks = SimpleNamespace(warps=draw_token_triton.WARPS, stages=1)
    kernels = {"block_sums": shared, "find_token": row | RECORDING}
    return {
        name: compile_kernel(getattr(draw_token_triton, f"{name}_kernel"), DRAW_TYPES, constants, blocks, capability)
        for name, constants in kernels.items()
    }


def draw_corrected(width: int, vocab: int, capability: int) -> tuple[int, int]:
    """The search for candidates with a record, in rows that are a part of a block of columns and in rows of several, of many blocks of logits and of one."""
    _, row = draw_corrected_triton.kernel_constants(64, vocab, width, 7, 0.7)
    types = DRAW_TYPES | dict.fromkeys(("hidden_ptr", "head_ptr"), "*bf16")
    blocks = SimpleNamespace(warps=draw_corrected_triton.WARPS, stages=1)
    return compile_kernel(draw_corrected_triton.find_corrected_kernel, types, row | RECORDING, blocks, capability)


if __name__ == "__main__":
    for target in map(int, sys.argv[1:]):
        print(f"dequantize-sm_{target}", *dequantize(target), flush=True)
        for rows in (16, 64, 128):
            print(f"int4_matmul-{rows}-sm_{target}", *int4_matmul(rows, target), flush=True)
            print(f"int4_matmul-{rows}-parts-sm_{target}", *int4_matmul(rows, target, 96, 6), flush=True)
        for head_dim in (64, 128, 256):
            print(f"decode_attention-{head_dim}-sm_{target}", *decode_attention(head_dim, target), flush=True)
        for generations, parts in ((1, 1), (2, 1), (2, 2)):
            whole = tuning.AttentionConfig(64, 16, parts, 0, 4, 3, generations)
            name = f"whole_attention-{generations}-{parts}-sm_{target}"
            print(name, *decode_attention(128, target, config=whole), flush=True)
        for generations in (1, 2):
            whole = tuning.AttentionConfig(64, 16, 1, 0, 4, 3, generations)
            print(f"rope_attention-{generations}-sm_{target}", *rope_attention(target, whole), flush=True)
        for layer_type in ("*i32", "i32", "constexpr"):
            print(f"rope_and_cache-{layer_type}-sm_{target}", *rope_and_cache(target, layer_type), flush=True)
        for rows, swapped in ((16, True), (64, False), (64, True), (128, True)):
            print(f"dense_matmul-{rows}-{swapped}-sm_{target}", *dense_matmul(rows, target, swapped), flush=True)
        for rows, swapped in ((16, True), (64, False), (64, True), (200, False), (200, True)):
            print(f"gated_matmul-{rows}-{swapped}-sm_{target}", *gated_matmul(rows, target, swapped), flush=True)
        for width in (1536, 8192):
            print(f"add_rms_norm-{width}-sm_{target}", *add_rms_norm(width, target), flush=True)
            print(f"begin_step-{width}-sm_{target}", *begin_step(width, target), flush=True)
        for rank in (0, 64, 96):
            print(f"merge_layer-{rank}-sm_{target}", *merge_layer(rank, target), flush=True)
        for activation in ("silu", "gelu_tanh"):
            print(f"gated_activation-{activation}-sm_{target}", *gated_activation(activation, target), flush=True)
        for name, usage in draw_token(target).items():
            print(f"{name}-sm_{target}", *usage, flush=True)
        for width, vocab in ((896, 151_936), (1536, 151_936), (4096, 3_000), (64, 700)):
            print(f"find_corrected-{width}-{vocab}-sm_{target}", *draw_corrected(width, vocab, target), flush=True)
        for cache in ("int8", "float8_e4m3fn")[: 2 if target >= 89 else 1]:
            print(f"decode_attention-{cache}-sm_{target}", *decode_attention(128, target, cache), flush=True)
            print(f"rope_and_cache-{cache}-sm_{target}", *rope_and_cache(target, "i32", cache), flush=True)
