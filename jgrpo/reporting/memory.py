"""Memory metrics: the accelerator's allocator where it keeps statistics, the process's size otherwise."""

import resource
import sys
from typing import Any

import jax


def memory_metrics(device: Any = None) -> dict[str, float]:
    """`memory/{peak,in_use}_bytes` of a `jax.Device` (default: the first); on a CPU `memory/host_peak_rss_bytes`.

    JAX's CPU device keeps no statistics (`memory_stats()` is None), and the process's peak resident
    size is not the same thing, so it has another name.
    """
    stats = (device or jax.local_devices()[0]).memory_stats()
    if stats:
        return {"memory/peak_bytes": stats["peak_bytes_in_use"], "memory/in_use_bytes": stats["bytes_in_use"]}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory/host_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
