"""From the start of a process to a run's first token, once with an empty compilation cache (cold) and once more (warm).

    PYTHONPATH=. python scripts/measure_start.py --preset qwen2.5-1.5b --weights auto

Each process does what a training run does before its first token: imports, the device, loading a checkpoint (written by this
script: real shapes, bfloat16, random values) into the int4 base, and the first rollout, whose rows here end after one token.
The program is that of the full length; the loop leaves after its first chunk of up to 32 steps. Compiled programs are kept as
every run on a GPU keeps them, but in `--cache` or an empty temporary directory.

One JSON line a process, in seconds: `import`, `context` (the device), `load`; of the first rollout `trace` (JAX's, without
Triton), `triton`, `xla` (compiling, or reading compiled programs), `run` (the rest: merging the adapter, loading kernels onto
the GPU, prefill, one chunk); `total`; and how many programs came from the cache or did not.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MIN_COMPILE_SECONDS = 0.0
"""As in `jgrpo.training.compilation`, which this process must not import before the one it measures."""
COMPILE_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace",
    "/pallas_kernels/triton_compile_duration": "triton",
    "/jax/core/compile/backend_compile_duration": "xla",
}
"""What JAX reports of making programs -> the part of the start it belongs to."""
CACHE_EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen2.5-1.5b", help="a shape of scripts/shapes.py (default %(default)s)")
    parser.add_argument("--weights", choices=("int4", "int8", "bf16", "auto"), default="auto", help="rollout_weights")
    parser.add_argument("--prompts", type=int, default=8, help="prompts Q (default %(default)s)")
    parser.add_argument("--group", type=int, default=8, help="completions G of each (default %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=256, help="prompt tokens P (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=512, help="new tokens C at most (default %(default)s)")
    parser.add_argument("--cache", type=Path, help="directory to keep compiled programs in; default: a temporary one")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_checkpoint(directory: Path, preset: str) -> None:
    """A checkpoint of the preset's shapes; its values repeat."""
    import ml_dtypes
    import numpy as np
    from shapes import PRESETS

    from jgrpo.checkpoints.names import placements
    from jgrpo.checkpoints.safetensors_io import SafetensorsWriter, TensorSpec

    (directory / "config.json").write_text("{}")
    placed = [tensor for leaf in placements(PRESETS[preset]).values() for tensor in leaf]
    specs = [TensorSpec(tensor.name, tensor.shape, np.dtype(ml_dtypes.bfloat16)) for tensor in placed]
    values = (0.02 * np.random.default_rng(0).standard_normal(2**22)).astype(ml_dtypes.bfloat16)
    with SafetensorsWriter(directory / "model.safetensors", specs) as writer:
        for spec in specs:
            writer.write(np.resize(values, spec.shape))


class Compiling:
    """Listens to what making programs takes from here on."""

    def __init__(self) -> None:
        import jax

        self.spans: dict[str, list[tuple[float, float]]] = {name: [] for name in COMPILE_EVENTS.values()}
        self.counts = dict.fromkeys(CACHE_EVENTS.values(), 0)
        jax.monitoring.register_event_duration_secs_listener(self._timed)
        jax.monitoring.register_event_listener(self._counted)

    def seconds(self) -> dict[str, float]:
        """Seconds of each part; what one part does inside another (tracing inside tracing, Triton inside it) counts once."""
        triton, trace, xla = (self.spans[name] for name in ("triton", "trace", "xla"))
        made = {"triton": covered(triton), "xla": covered(xla)}
        return {"trace": covered([*trace, *triton, *xla]) - sum(made.values()), **made}

    def _timed(self, event: str, seconds: float, **_: Any) -> None:
        if part := COMPILE_EVENTS.get(event):
            now = time.perf_counter()
            self.spans[part].append((now - seconds, now))

    def _counted(self, event: str, **_: Any) -> None:
        if name := CACHE_EVENTS.get(event):
            self.counts[name] += 1


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def start(args: argparse.Namespace) -> dict[str, Any]:
    """The process that is measured."""
    marks = [args.started]
    import jax
    import jax.numpy as jnp
    from shapes import PRESETS

    import jgrpo.train  # noqa: F401 - what a run imports
    from jgrpo.checkpoints.hf import load_base
    from jgrpo.config import LoraConfig, QuantizationConfig, RolloutConfig
    from jgrpo.lora import init_lora
    from jgrpo.models import Transformer
    from jgrpo.rollout import Prompts, generate

    marks.append(time.time())
    device = jax.devices()[0].device_kind
    marks.append(time.time())
    model = Transformer(PRESETS[args.preset], LoraConfig(lora_rank=32, lora_alpha=64.0), jnp.bfloat16)
    base = load_base(args.checkpoint, model.config, QuantizationConfig(), model.dtype)
    lora = init_lora(jax.random.key(0), model.lora, model.config)
    jax.block_until_ready((base, lora))
    marks.append(time.time())
    compiling = Compiling()
    tokens = jnp.ones((args.prompts, args.prompt_len), jnp.int32)
    prompts = Prompts(tokens, jnp.full(args.prompts, args.prompt_len, jnp.int32))
    config = RolloutConfig(args.group, args.new_tokens, rollout_weights=args.weights)
    ends = jnp.ones((args.prompts, args.group), jnp.int32)
    inputs = (model, base, lora, prompts, jax.random.key(1), config)
    jax.block_until_ready(generate(*inputs, eos_ids=(), pad_id=0, row_limits=ends))
    marks.append(time.time())
    imported, started, loaded, first = (after - before for before, after in itertools.pairwise(marks))
    parts = compiling.seconds()
    parts = {"import": imported, "context": started, "load": loaded, **parts, "run": first - sum(parts.values())}
    seconds = {name: round(value, 2) for name, value in (parts | {"total": marks[-1] - marks[0]}).items()}
    return {**seconds, **compiling.counts, "device": device, "jax": jax.__version__}


def main() -> None:
    args = arguments()
    if args.checkpoint:
        print(json.dumps(start(args)))
        return
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name, "checkpoint")
        checkpoint.mkdir()
        write_checkpoint(checkpoint, args.preset)
        cache = args.cache or Path(name, "cache")
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
            "CUDA_CACHE_PATH": str(cache / "cuda"),
        }
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(MIN_COMPILE_SECONDS)
        for state in ("cold", "warm"):
            command = [sys.executable, __file__, *sys.argv[1:], "--checkpoint", str(checkpoint)]
            command += ["--started", str(time.time())]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps({"preset": args.preset, "weights": args.weights, "state": state, **row}), flush=True)


if __name__ == "__main__":
    main()
