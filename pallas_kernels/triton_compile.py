"""Triton kernels compiled once: for a process in memory, between processes beside JAX's own compiled programs.

jax-triton 0.3.1 compiles every kernel in every process and keeps nothing; it also makes a second version of a kernel
where a number happens to be 1, which a layer's index is once in an unrolled loop. Tracing a rollout of Qwen2.5-1.5B spent 3.4 of
4.1 s in Triton that way (docs/benchmarks.md). Here a compiled kernel is a file of JSON in `<JAX's compilation cache>/triton`,
under a hash of all that it depends on; without a compilation cache there are no files.

PTX is what XLA's custom call takes, so Triton's stages run up to there: cubins are made by the process that launches.
"""

# pyright: reportMissingImports=false
# Triton is optional.

import contextlib
import functools
import hashlib
import json
import time
import uuid
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import triton
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

COMPILE_EVENT = "/pallas_kernels/triton_compile_duration"
"""JAX's monitoring is told under this name how long each compilation took; kernels from a file are none."""
_STAGES = ("ttir", "ttgir", "llir", "ptx")
POINTER_BYTES = 16
"""What JAX aligns its arrays to; jaxlib's launcher checks it."""


class Compiled(NamedTuple):
    """A kernel as jaxlib launches it."""

    name: str
    """Its symbol in the PTX."""
    shared: int
    """Bytes of shared memory."""
    ptx: str


class Request(NamedTuple):
    """All that a compiled kernel depends on besides its source and Triton's version; hashable."""

    types: tuple[str, ...]
    """Of the arguments, as Triton writes them: `*bf16`, `i32`. A number is never made a constant for its value."""
    constants: tuple[tuple[str, Any], ...]
    """The `tl.constexpr` arguments by name."""
    warps: int
    stages: int
    capability: int
    """Of the GPU, 90 for 9.0."""


@functools.cache
def compiled(kernel: Any, request: Request) -> Compiled:
    """The `triton.jit` function `kernel` for `request`: from memory, a file, or the compiler."""
    file = _file(kernel, request)
    if file is not None and file.is_file():
        return Compiled(**json.loads(file.read_text()))
    began = time.perf_counter()
    result = _compile(kernel, request)
    jax.monitoring.record_event_duration_secs(COMPILE_EVENT, time.perf_counter() - began)
    if file is not None:
        _keep(file, json.dumps(result._asdict()))
    return result


def _file(kernel: Any, request: Request) -> Path | None:
    root = jax.config.values["jax_compilation_cache_dir"]
    if root is None or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    # The kernel's own key covers its source, the functions it calls and the constants of its module.
    content = repr((triton.__version__, kernel.cache_key, request))
    return Path(root, "triton", f"{hashlib.sha256(content.encode()).hexdigest()}.json")


def _keep(file: Path, text: str) -> None:
    """Other processes see the whole file or none; a directory that cannot be written costs a warning, as with JAX's cache."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{uuid.uuid4().hex}")
        partial.write_text(text)
        partial.replace(file)
    except OSError as error:
        warnings.warn(f"compiled kernel not kept in {file.parent}: {error}", stacklevel=2)


def _compile(kernel: Any, request: Request) -> Compiled:
    names = kernel.arg_names[: len(request.types)]
    signature = dict(zip(names, request.types, strict=True)) | {name: "constexpr" for name, _ in request.constants}
    pointers = [(i,) for i, kind in enumerate(request.types) if kind.startswith("*")]
    attributes = {key: [["tt.divisibility", POINTER_BYTES]] for key in pointers}
    source = ASTSource(kernel, signature, dict(request.constants), attributes)
    target = GPUTarget("cuda", request.capability, 32)
    backend: Any = make_backend(target)
    settings = {"num_warps": request.warps, "num_stages": request.stages, "enable_fp_fusion": True}
    options = backend.parse_options(settings)
    context, stages, metadata = ir.context(), {}, {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    with _without_paths():
        module: Any = source.make_ir(
            target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        )
        backend.add_stages(stages, options, source.language)
        for stage in _STAGES:
            module = stages[stage](module, metadata)
    return Compiled(metadata["name"], metadata["shared"], module)


@contextlib.contextmanager
def _without_paths():
    """No line numbers in the PTX: they name the directory of the package, and XLA's cache hashes the PTX."""
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        yield
