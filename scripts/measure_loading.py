"""Peak host memory while a synthetic checkpoint of 2 GB is loaded, for every format; on a CPU, where the device is the host.

    python scripts/measure_loading.py [--gigabytes 2] [--formats bf16 nf4 nf4-double gptq awq]

The bound of each: 1.2 x the loaded model + the largest tensor of the file. Each format is loaded in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from jgrpo.checkpoints.names import MATRICES, Placement, placements
from jgrpo.checkpoints.safetensors_io import SafetensorsWriter, TensorSpec
from jgrpo.models import model_config_from_hf
from jgrpo.quantization import NF4

FORMATS = ("bf16", "nf4", "nf4-double", "gptq", "awq")
GROUP, BLOCK, NESTED = 128, 64, 256
_GPTQ = {"bits": 4, "group_size": GROUP}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SETTINGS = {
    "nf4": _BNB,
    "nf4-double": _BNB,
    "gptq": _GPTQ | {"quant_method": "gptq", "sym": False},
    "awq": _GPTQ | {"quant_method": "awq", "version": "gemm"},
}


def stored(placement: Placement, kind: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of the tensors that one tensor is stored as."""
    if kind == "bf16" or placement.leaf not in MATRICES or not placement.modules:
        return [(placement.name, placement.shape, "bfloat16")]
    (rows, width), name = placement.shape, placement.name
    if kind.startswith("nf4"):
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [rows, width]}
        state |= {"nested_blocksize": NESTED, "nested_offset": 0.02} if kind == "nf4-double" else {}
        text, blocks = json.dumps(state), rows * width // BLOCK
        tensors = [(name, (rows * width // 2, 1), "uint8"), (name + ".quant_map", (16,), "map")]
        tensors += [(name + ".quant_state.bitsandbytes__nf4", (len(text),), text)]
        if kind == "nf4":
            return [*tensors, (name + ".absmax", (blocks,), "float32")]
        nested = [(".nested_absmax", (-(-blocks // NESTED),), "float32"), (".nested_quant_map", (256,), "float32")]
        return [*tensors, (name + ".absmax", (blocks,), "uint8"), *((name + suffix, *rest) for suffix, *rest in nested)]
    stem = name.removesuffix("weight")
    words = (width // 8, rows) if kind == "gptq" else (width, rows // 8)
    groups = width // GROUP
    return [(stem + "qweight", words, "int32"), (stem + "qzeros", (groups, rows // 8), "int32"), (stem + "scales", (groups, rows), "float16")]  # fmt: skip


def make(directory: Path, kind: str, gigabytes: float) -> int:
    """Write it; returns the bytes of its largest tensor."""
    width, mlp = 2048, 5632
    per_layer = (4 * width * width + 3 * width * mlp) * (2 if kind == "bf16" else 0.53)
    config = dict(
        model_type="llama", vocab_size=32000, hidden_size=width, intermediate_size=mlp, num_attention_heads=16
    )
    config |= dict(num_hidden_layers=round(gigabytes * 1e9 / per_layer), tie_word_embeddings=True)
    config |= {"quantization_config": SETTINGS[kind]} if kind in SETTINGS else {}
    (directory / "config.json").write_text(json.dumps(config))
    placed = [p for group in placements(model_config_from_hf(config)).values() for p in group]
    tensors = [tensor for placement in placed for tensor in stored(placement, kind)]
    dtypes = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "map": np.dtype("f4")}
    specs = [TensorSpec(n, s, dtypes.get(d) or np.dtype("u1" if d[0] == "{" else d)) for n, s, d in tensors]
    noise = np.random.default_rng(0).integers(0, 256, 2**24, dtype=np.uint8)
    floats = np.random.default_rng(1).uniform(0.01, 0.05, 2**22)
    with SafetensorsWriter(directory / "model.safetensors", specs) as writer:
        for spec, (_, _, kind_of) in zip(specs, tensors, strict=True):
            writer.write(values(spec, kind_of, noise, floats))
    return max(spec.nbytes for spec in specs)


def values(spec: TensorSpec, kind: str, noise: np.ndarray, floats: np.ndarray) -> np.ndarray:
    """Random contents of the right kind."""
    if kind == "map":
        return NF4
    if kind[0] == "{":
        return np.frombuffer(kind.encode(), np.uint8)
    if spec.dtype.kind in "iu":
        return np.resize(noise, spec.nbytes).view(spec.dtype).reshape(spec.shape)
    return np.resize(floats.astype(spec.dtype), spec.shape)


def resident(field: str) -> int:
    """Bytes of resident memory of this process: VmRSS, or its peak VmHWM (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def load(directory: Path) -> None:
    """In a process of its own: load, and print the result's bytes and by how much the peak exceeds the start."""
    import jax
    import jax.numpy as jnp

    from jgrpo.checkpoints.hf import load_base, load_model_config
    from jgrpo.config import QuantizationConfig

    config = load_model_config(directory)
    jnp.zeros(1).block_until_ready()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = resident("VmRSS")
    start = time.perf_counter()
    base = load_base(directory, config, QuantizationConfig(group_size=64), jnp.bfloat16)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    print(json.dumps([sum(leaf.nbytes for leaf in jax.tree.leaves(base)), peak, seconds]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load)
        return
    print(
        "| format | file | loaded model | largest tensor | peak host memory | bound | seconds |\n|---|---|---|---|---|---|---|"
    )
    for kind in args.formats:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            largest = make(directory, kind, args.gigabytes)
            size = (directory / "model.safetensors").stat().st_size
            command = [sys.executable, __file__, "--load", name]
            result, peak, seconds = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            bound = 1.2 * result + largest
            cells = [*(f"{number / 1e9:.2f} GB" for number in (size, result, largest, peak, bound)), f"{seconds:.1f}"]
            print(f"| {kind} | {' | '.join(cells)} |" + ("" if peak <= bound else "  ABOVE THE BOUND"), flush=True)


if __name__ == "__main__":
    main()
