"""Peak memory while a synthetic checkpoint of 2 GB is loaded, for every format, on the device that JAX finds.

    PYTHONPATH=. python scripts/measure_loading.py [--gigabytes 2] [--formats bf16 nf4 nf4-double gptq awq] [--json]

On a CPU the device is the host. On a GPU its allocator's peak is reported too, with preallocation off. The bound of each: 1.2 x
the loaded model + the largest tensor of the file. Each format is loaded in a process of its own; with a peak above its
bound the exit code is 1. Host memory is what is resident beyond the start of the load: the kernel's high-water mark, or,
where that cannot be reset, samples every millisecond (`host_method`). `host_left` is what has stayed when the load is done, by
kind: anonymous memory, file pages (libraries; weights are read, not mapped) and shared memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

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


KINDS = {"anonymous": "RssAnon", "file": "RssFile", "shared": "RssShmem"}


class HostPeak:
    """Context: by how much the resident memory of this process has exceeded its start, in `.bytes`; what stayed in `.left`."""

    def __enter__(self) -> "HostPeak":
        self.kinds = {kind: resident(field) for kind, field in KINDS.items()}
        self.before, self.method, self.done = resident("VmRSS"), "high-water mark", threading.Event()
        self.highest = self.before
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
        except OSError:
            self.method = "samples"
        self.thread = threading.Thread(target=self._sample, daemon=True)
        if self.method == "samples":
            self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.001):
            self.highest = max(self.highest, resident("VmRSS"))

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        peak = resident("VmHWM") if self.method == "high-water mark" else max(self.highest, resident("VmRSS"))
        self.bytes = peak - self.before
        self.left = {kind: resident(field) - self.kinds[kind] for kind, field in KINDS.items()}


def load(directory: Path) -> None:
    """In a process of its own: load, and print the bytes of the result and the peaks on the way there."""
    import jax
    import jax.numpy as jnp

    from jgrpo.checkpoints.hf import load_base, load_model_config
    from jgrpo.config import QuantizationConfig

    config = load_model_config(directory)
    jnp.zeros(1).block_until_ready()
    start = time.perf_counter()
    with HostPeak() as host:
        base = load_base(directory, config, QuantizationConfig(group_size=64), jnp.bfloat16)
        jax.block_until_ready(base)
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    result = {"device": device.device_kind, "model": sum(leaf.nbytes for leaf in jax.tree.leaves(base))}
    result |= {"host_peak": host.bytes, "host_method": host.method, "device_peak": stats.get("peak_bytes_in_use")}
    result |= {"host_left": host.left}
    print(json.dumps(result | {"seconds": round(time.perf_counter() - start, 1)}))


def measure(kind: str, gigabytes: float) -> dict[str, Any]:
    """Make a checkpoint in a temporary directory, load it in another process, and compare the peaks with the bound."""
    with tempfile.TemporaryDirectory() as name:
        largest = make(Path(name), kind, gigabytes)
        size = (Path(name) / "model.safetensors").stat().st_size
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, __file__, "--load", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    result = json.loads(done.stdout.splitlines()[-1])
    bound = int(1.2 * result["model"] + largest)
    peaks = [peak for peak in (result["host_peak"], result["device_peak"]) if peak is not None]
    return {"format": kind, "file": size, "largest": largest, "bound": bound} | result | {"ok": max(peaks) <= bound}


def row(result: dict[str, Any]) -> str:
    """A line of the table in docs/models.md."""
    numbers = (result[key] for key in ("file", "model", "largest", "host_peak", "device_peak", "bound"))
    cells = ["" if number is None else f"{number / 1e9:.2f} GB" for number in numbers]
    return f"| {result['format']} | {' | '.join(cells)} | {result['seconds']} |" + ("" if result["ok"] else "  ABOVE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--json", action="store_true", help="one JSON object a format, in bytes, instead of a table")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load)
        return 0
    if not args.json:
        print("| format | file | loaded model | largest tensor | peak host | peak device | bound | seconds |")
        print("|---|---|---|---|---|---|---|---|")
    good = True
    for kind in args.formats:
        result = measure(kind, args.gigabytes)
        good &= result["ok"]
        print(json.dumps(result) if args.json else row(result), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
