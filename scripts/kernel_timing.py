"""What the tuning of every kernel shares: compiling ahead, timing from a CUDA graph, checking, reporting."""

import json
import multiprocessing
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
import triton

from pallas_kernels import tuning

CACHE_BYTES = 256 * 2**20
"""Of a stack of layers that does not fit the L2 cache."""
PLAIN = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""Compiler options of what a kernel is compared with: XLA does not measure ways to multiply, which takes longer than all else."""
PARTIAL_SUM_BYTES_PER_US = 3e6
BANDWIDTH_BYTES_PER_US = 4.3e6  # of a copy on an H200, for the bound in the JSON lines only


def check(out, expected) -> float:
    """Relative error of partial sums or a result."""
    total = out.float().sum(0) if out.ndim > expected.ndim else out.float()
    return float((total - expected).norm() / expected.norm())


def graph_time(launch, layers: int, repeats: int = 5) -> float:
    """Microseconds a launch, replayed from a CUDA graph over all layers; median of `repeats`."""
    stream = torch.cuda.Stream()
    # A result may lie where a finished call's operands lay, say the float32 copies of which `expected` is the product. The allocator
    # hands such memory out before the work that reads it is done, trusting one stream's order, so this one joins that order.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch(0)
        graph = torch.cuda.CUDAGraph()
        count = layers * max(1, 40 // layers)
        with torch.cuda.graph(graph, stream=stream):
            for step in range(count):
                launch((count - step) % layers)  # ends with layer 1, whose result the caller checks
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / count)
    return sorted(times)[repeats // 2]


def right_time(launch, out, expected, layers: int) -> float | str:
    """Microseconds a launch of a kernel that fills `out`, or what is wrong with it; `launch(1)` gives `expected`."""
    try:
        launch(1)
    except triton.runtime.errors.OutOfResources as error:
        return str(error)
    if not (error := check(out, expected)) < 1e-2:
        return f"wrong by {error}"
    us = graph_time(launch, layers)
    return us if check(out, expected) < 1e-2 else "wrong under load"


def fastest(candidates: list, time_of, report, **shape: int) -> tuple[float, Any] | None:
    """(microseconds, configuration) of the fastest candidate that is also right; `time_of` one is as of `right_time`."""
    best = None
    for config in candidates:
        result = time_of(config)
        report({**shape, "config": vars(config), "result": result})
        if isinstance(result, float) and (best is None or result < best[0]):
            best = (result, config)
    return best


def tuned_entry(best: tuple[float, Any] | None, *, library: float | None = None, **sizes: int) -> dict | None:
    """An entry of a tuned file, with the library's time where there is one; None where no candidate was right."""
    if best is None:
        return None
    beside = {} if library is None else {"library_us": round(library, 2)}
    return {**tuning.as_entry(best[1], **sizes), "us": round(best[0], 2), **beside}


def partial_sum_us(m: int, n: int, split: int) -> float:
    """What a consumer is charged for reading float32 parts instead of one 16-bit result."""
    return 0 if split == 1 else (4 * split - 2) * m * n / PARTIAL_SUM_BYTES_PER_US


def compile_all(function, jobs: list[tuple], deadline: float) -> None:
    """Compile in parallel; a job that is not done by the deadline compiles when it is launched."""
    start, failures = time.time(), []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        for future in as_completed(futures):
            if future.exception() is not None:
                failures.append(repr(future.exception())[:300])
            if time.time() > deadline:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    print(
        f"compiled {len(jobs)} kernels in {time.time() - start:.0f} s; failed: {len(failures)} {failures[:2]}",
        flush=True,
    )


def sample(items: list, limit: int) -> list:
    """At most `limit` of the items, the same ones in every run."""
    return items if len(items) <= limit else random.Random(0).sample(items, limit)


def summary(op: str, entry: dict, moved: float) -> str:
    """A JSON line about a tuned shape that moves at least that many bytes."""
    gb_per_s, bound = moved / entry["us"] / 1e3, moved / BANDWIDTH_BYTES_PER_US
    about = {"gb_per_s": round(gb_per_s), "bound_us": round(bound, 2), "of_bound": round(bound / entry["us"], 3)}
    return json.dumps({"op": op, **entry, **about})
