"""Checkpoints in the public 4-bit formats, written here from the definitions of the formats, word by word.

Every format is given random levels, scales and zero-points, packed as its own library packs them (the loops below follow
bitsandbytes' `QuantState`, AutoGPTQ's `pack` and AutoAWQ's packing), next to the values that its library would
compute from them: the oracle of the tests.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

Tensors = dict[str, torch.Tensor]
Packer = Callable[[str, tuple[int, int], torch.Generator], tuple[Tensors, torch.Tensor]]
"""(module, [out, in], random numbers) -> (stored tensors, float32 values [out, in])."""

GROUP, BLOCK, NESTED_BLOCK = 32, 64, 8
# QLoRA (arXiv:2305.14314), appendix E.
_NF4 = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
NF4_LEVELS = torch.tensor([float(level) for level in _NF4.split()])


def pack_nf4(double: bool) -> Packer:
    def pack(module: str, shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        count = shape[0] * shape[1]
        codes = torch.randint(0, 16, (count,), generator=generator, dtype=torch.uint8)
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(shape)}
        scale = 2.0 / shape[1] ** 0.5
        name = f"{module}.weight"
        # bitsandbytes: the first of two elements in the high nibble, over the flattened matrix.
        stored = {name: (codes[0::2] * 16 + codes[1::2])[:, None], f"{name}.quant_map": NF4_LEVELS.clone()}
        if double:
            levels = torch.sort(torch.rand(256, generator=generator) * 2 - 1).values
            absmax_codes = torch.randint(0, 256, (count // BLOCK,), generator=generator, dtype=torch.uint8)
            nested = torch.rand(-(-absmax_codes.numel() // NESTED_BLOCK), generator=generator) * 0.2 * scale
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(scale)}
            stored |= {f"{name}.absmax": absmax_codes, f"{name}.nested_absmax": nested}
            stored[f"{name}.nested_quant_map"] = levels
            offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
            absmax = levels[absmax_codes.long()] * nested.repeat_interleave(NESTED_BLOCK)[: count // BLOCK] + offset
        else:
            absmax = (0.5 + torch.rand(count // BLOCK, generator=generator)) * scale
            stored[f"{name}.absmax"] = absmax
        text = json.dumps(state).encode()
        stored[f"{name}.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8).clone()
        values = NF4_LEVELS[codes.long()] * absmax.repeat_interleave(BLOCK)
        return stored, values.reshape(shape)

    return pack


def _words(nibbles: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 words of eight nibbles along the last axis; nibble i of a word is element `order[i]` of its eight."""
    eights = nibbles.reshape(*nibbles.shape[:-1], -1, 8).long()
    words = sum(eights[..., element] << (4 * i) for i, element in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _random_int4(
    shape: tuple[int, int], generator: torch.Generator, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels [in, out], zero-points [groups, out] and float16 scales [groups, out]."""
    out, width = shape
    levels = torch.randint(0, 16, (width, out), generator=generator)
    zeros = torch.randint(1, 16, (width // GROUP, out), generator=generator)
    zeros = torch.full_like(zeros, 8) if symmetric else zeros
    scales = (0.5 + torch.rand(width // GROUP, out, generator=generator)) / 5 / width**0.5
    return levels, zeros, scales.half()


def _int4_values(levels: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    group = torch.arange(levels.shape[0]) // GROUP
    return ((levels - zeros[group]).float() * scales[group].float()).T.contiguous()


def pack_gptq(symmetric: bool, version: int = 1) -> Packer:
    def pack(module: str, shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        levels, zeros, scales = _random_int4(shape, generator, symmetric)
        stored_zeros = zeros - 1 if version == 1 else zeros
        return {
            f"{module}.qweight": _words(levels.T).T.contiguous(),
            f"{module}.qzeros": _words(stored_zeros),
            f"{module}.scales": scales,
            f"{module}.g_idx": (torch.arange(shape[1]) // GROUP).to(torch.int32),
        }, _int4_values(levels, zeros, scales)

    return pack


def pack_awq(module: str, shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    levels, zeros, scales = _random_int4(shape, generator, symmetric=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{module}.qweight": _words(levels, order),
        f"{module}.qzeros": _words(zeros, order),
        f"{module}.scales": scales,
    }, _int4_values(levels, zeros, scales)


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMATS: dict[str, tuple[Packer, dict]] = {
    "nf4": (pack_nf4(double=False), _BNB | {"bnb_4bit_use_double_quant": False}),
    "nf4-double": (pack_nf4(double=True), _BNB | {"bnb_4bit_use_double_quant": True}),
    "gptq-sym": (pack_gptq(symmetric=True), _GPTQ | {"sym": True}),
    "gptq-asym": (pack_gptq(symmetric=False), _GPTQ | {"sym": False}),
    "gptq-v2": (pack_gptq(symmetric=False, version=2), _GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}),
    "awq": (pack_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
}


def quantize_checkpoint(source: Path, out: Path, format_name: str, skip: tuple[str, ...] = ()) -> Tensors:
    """Copy `source` to `out` with its linear layers in a format, all but those whose name contains one of `skip`.

    Returns the float32 values of every tensor, named as in an unquantized checkpoint.
    """
    pack, settings = FORMATS[format_name]
    shutil.copytree(source, out)
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    stored: Tensors = {}
    values: Tensors = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if "_proj.weight" in name and not any(part in name for part in skip):
            packed, values[name] = pack(module, tuple(tensor.shape), generator)
            stored |= packed
        else:
            stored[name] = values[name] = tensor
    safetensors.torch.save_file(stored, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return values
