"""Compile three versions of a small kernel: `python -m tests.pallas_kernels.compile_cached DIRECTORY`.

DIRECTORY is JAX's compilation cache. Prints one line of JSON: how often Triton compiled, and the hash of what came out. Run
apart from the tests, because it needs TRITON_INTERPRET=0 and processes of its own.
"""

import hashlib
import json
import sys

import jax

from pallas_kernels.decode_attention_triton import merge_kernel
from pallas_kernels.triton_compile import COMPILE_EVENT, Request, compiled


def main() -> None:
    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
    times: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: times.append(seconds) if event == COMPILE_EVENT else None
    )
    versions = [
        Request(
            ("*fp32", "*fp32", "*bf16", "*bf16"),
            (("D", depth), ("SPLITS", 3), ("SPLITS_PAD", 4), ("PERMUTED", False)),
            warps,
            3,
            90,
        )
        for depth, warps in ((64, 1), (128, 1), (64, 2), (64, 1))
    ]
    texts = [compiled(merge_kernel, version).ptx for version in versions]
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()
    print(json.dumps({"compiled": len(times), "different": len(set(texts)), "digest": digest}))


if __name__ == "__main__":
    main()
