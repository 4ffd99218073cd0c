"""Block sizes of the kernels: measured ones from `tuned/<device>.json`, else a heuristic.

`scripts/autotune.py` writes the files. A file lists, for each operation, shapes with the fastest configuration; a shape
that is not listed takes the entry that is nearest in log size among those that fit it. (Of the int4 matmul, the entries of its N and K
come first: `int4_config`.)
"""

import functools
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from importlib import resources

from pallas_kernels import dispatch
from pallas_kernels.codes import PER_BYTE

MMA, MMA_SWAPPED, WGMMA = "mma", "mma_swapped", "wgmma"  # forms of the product, see int4_matmul_triton.py
MOSAIC = "mosaic"  # and int4_matmul_mosaic.py
READS_PERMUTED = (WGMMA, MOSAIC)
LAYER_BLOCK, LAYER_X_STAGES = 128, 4
"""Rows and columns of a block of weights of `decode_layers`, and slots of the ring that brings its rows."""


@dataclass(frozen=True)
class Int4Config:
    """Blocks of the int4 matmul, and which of its forms.

    Of mosaic, 64 of the `block_n` rows of weights are a warp group's, and `warps` counts those that multiply. K is split evenly
    (`split_k`), or its last `rest` blocks are left to the programs that have no tile of their own. Tiles that are more than programs are
    cut into pieces of `cut` rows of x (`mosaic_product_plan.py`).
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    product: str
    warps: int
    stages: int
    rest: int = 0
    cut: int = 0

    @property
    def parts(self) -> int:
        """Partial sums of each result."""
        return 2 if self.rest else self.split_k

    def fits(self, m: int, n: int, k: int, group: int) -> bool:
        """Whether the kernel can run this shape: whole groups in a block, whole blocks in K, one of them at least for each part.

        Of mosaic also whole blocks in N, and groups of 64 and more.
        """
        if self.product == MOSAIC and (n % self.block_n or group < 64):
            return False
        return k % self.block_k == 0 and self.block_k % group == 0 and self.split_k + self.rest <= k // self.block_k

    def most_blocks(self, m: int, n: int, k: int, programs: int) -> int:
        """Blocks of K that one of so many programs multiplies at most; of mosaic."""
        steps, tiles = k // self.block_k, math.ceil(m / self.block_m) * (n // self.block_n)
        if self.rest and tiles < programs:
            return steps - self.rest
        rounds = 1 if self.cut and m <= self.block_m else math.ceil(tiles * self.split_k / programs)
        return rounds * math.ceil(steps / self.split_k)


@dataclass(frozen=True)
class DenseConfig:
    """Blocks of the product with 16-bit weights; swapped: the weights are its left operand."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    swapped: bool
    warps: int
    stages: int

    def fits(self, k: int) -> bool:
        """Whether the kernel can run this K: whole blocks, at least one a split."""
        return k % self.block_k == 0 and self.split_k <= k // self.block_k


@dataclass(frozen=True)
class GatedConfig:
    """Blocks of the product of gate and up with its gate: `block_n + extra_n` columns of both; swapped as in `DenseConfig`."""

    block_m: int
    block_n: int
    extra_n: int
    block_k: int
    swapped: bool
    warps: int
    stages: int

    def fits(self, k: int) -> bool:
        """Whether the kernel can run this K: whole blocks."""
        return k % self.block_k == 0


@dataclass(frozen=True)
class AttentionConfig:
    """Blocks of decode attention: slots a step, query rows a prompt program takes, and programs a suffix or prompt has.

    generations > 0: a program takes so many generations of a question through its prompt and their suffixes
    (`whole_attention_triton.py`), in tiles of `prompt_rows` and `suffix_splits` parts; prompt_splits is then 0.
    """

    block_slots: int
    prompt_rows: int
    suffix_splits: int
    prompt_splits: int
    warps: int
    stages: int
    generations: int = 0

    def tile(self, share: int, group: int) -> tuple[int, int]:
        """(generations, rows) of a program's tile for groups of `group` and `share` query heads a kv head."""
        rows = max(self.prompt_rows, power_of_two(share))
        return min(self.generations, group, max(1, rows // share)), rows

    def takes_new_tokens(self, share: int, group: int) -> bool:
        """Whether a program takes all that its rows see, and its tile has rows for the new key and value of each generation too."""
        generations, rows = self.tile(share, group)
        return self.generations > 0 and self.suffix_splits == 1 and generations * (share + 2) <= rows


def device_file(device_name: str) -> str:
    """'NVIDIA H200' -> 'nvidia_h200.json'."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


@functools.cache
def tuned(device_name: str) -> dict:
    """The measured entries of a device, {} where none were measured."""
    path = resources.files("pallas_kernels") / "tuned" / device_file(device_name)
    return json.loads(path.read_text()) if path.is_file() else {}


def _distance(entry: dict, shape: dict[str, int]) -> float:
    """Log-size distance; rows decide first, because they change which configuration wins more than N and K do."""
    weight = {"m": 4.0}
    return sum(weight.get(key, 1.0) * abs(math.log(entry[key] / value)) for key, value in shape.items())


def int4_config(m: int, n: int, k: int, group: int, *, mosaic: bool = False) -> Int4Config:
    """The blocks for x [M, K] @ W [N, K]^T on the current device; `mosaic`: its form may be chosen (`dispatch.mosaic_problem`).

    A shape may have been measured with both forms, and with other rows: the blocks that should be fastest are taken (`_expected_us`).
    """
    device = dispatch.current_device()
    entries = [e | {"blocks": Int4Config(**e["config"])} for e in tuned(device.name).get("int4_matmul", [])]
    candidates = [e for e in entries if e["blocks"].fits(m, n, k, group) and (mosaic or e["blocks"].product != MOSAIC)]
    if measured := [e for e in candidates if (e["n"], e["k"]) == (n, k)]:
        return min(measured, key=lambda e: (_expected_us(e, m, measured), abs(e["m"] - m)))["blocks"]
    if candidates:
        return min(candidates, key=lambda e: (_distance(e, {"m": m, "n": n, "k": k}), e["us"]))["blocks"]
    if mosaic and (config := mosaic_heuristic(m, n, k)).fits(m, n, k, group) and m > 16:
        return config
    return int4_heuristic(m, n, k, group, hopper=(device.capability or (0, 0)) >= (9, 0))


LAUNCH_US = 1.2
"""Of a kernel that does nothing, on an H200."""


def _expected_us(entry: dict, m: int, measured: list[dict], *, multiprocessors: int = 132) -> float:
    """What the blocks of an entry should take with `m` rows. Where one of these `measured` has them: no longer than with more rows, and unknown with fewer.

    Else as much longer or shorter as a program of mosaic has more or fewer blocks of K; Triton's forms as often as their rows are needed.
    """
    us, rows, blocks = entry["us"], entry["m"], entry["blocks"]
    if any(e["m"] == m for e in measured):
        return us if rows >= m else math.inf
    if blocks.product != MOSAIC:
        return us * math.ceil(m / rows)
    now, then = (blocks.most_blocks(count, entry["n"], entry["k"], multiprocessors) for count in (m, rows))
    return LAUNCH_US + (us - LAUNCH_US) * now / then


SHARED_BYTES = 227 * 1024
"""Shared memory that a program may have on Hopper."""


def mosaic_stages(config: Int4Config, rank: int, code: str = "int4") -> int:
    """Slots of the ring that shared memory holds beside an adapter's x A^T of that rank and sums of a piece, at most 8; 0: not one."""
    m, n, k = config.block_m, config.block_n, config.block_k
    slot, piece = 2 * m * k + n * k // PER_BYTE[code] + 16 * n, 4 * (n - 64) * config.cut
    return min(8, (SHARED_BYTES - 1024 - 2 * m * rank - piece) // slot)


def mosaic_config(
    block_m: int, block_n: int, block_k: int, split_k: int, *, rank: int = 0, code: str = "int4"
) -> Int4Config:
    """The mosaic form with as many stages as fit; the launch takes fewer where the adapter's rank asks for it."""
    config = Int4Config(block_m, block_n, block_k, split_k, MOSAIC, warps=block_n // 16, stages=0)
    return replace(config, stages=mosaic_stages(config, rank, code))


def int8_config(m: int, n: int, k: int, group: int, *, multiprocessors: int = 132) -> Int4Config | None:
    """The blocks for 8-bit weights, which have the mosaic form only, on the current device; None: it cannot run this shape.

    K is not split where the tiles of N alone give every multiprocessor a program, whatever the nearest entry does.
    """
    entries = [
        e | {"blocks": Int4Config(**e["config"])} for e in tuned(dispatch.current_device().name).get("int8_matmul", [])
    ]
    candidates = [e for e in entries if e["blocks"].fits(m, n, k, group)]
    if candidates:
        nearest = min(candidates, key=lambda e: _distance(e, {"m": m, "n": n, "k": k}))["blocks"]
        return nearest if n // nearest.block_n < multiprocessors else replace(nearest, split_k=1, rest=0)
    config = mosaic_heuristic(m, n, k, code="int8")
    return config if config.fits(m, n, k, group) else None


def layer_config(block_m: int, split_k: int) -> Int4Config:
    """Of a product of `decode_layers`, with as many slots for weights as fit beside those for rows of x."""
    slot, room = layer_room(block_m)
    return Int4Config(block_m, LAYER_BLOCK, LAYER_BLOCK, split_k, MOSAIC, warps=8, stages=min(12, room // slot))


def layer_room(block_m: int, others: int = 0) -> tuple[int, int]:
    """(bytes of a slot for weights, with two scales a row at least; bytes for all of them beside those for rows of x, in whose place `others` are)."""
    rows = 2 * LAYER_X_STAGES * block_m * LAYER_BLOCK
    return LAYER_BLOCK * (LAYER_BLOCK + 4), SHARED_BYTES - 1024 - max(rows, others)


def decode_layer_configs(
    m: int, shapes: tuple[tuple[int, int], ...], multiprocessors: int
) -> tuple[Int4Config, ...] | None:
    """The blocks of a layer's products, in order of `shapes` = (N, K) of qkv, out, gate_up and down; None: the kernel cannot run these.

    K is split as often as leaves no more units than programs, or less often where no program has more blocks for it; of gate_up not at
    all, because its gate needs whole sums. On an H200 no other choice that was tried was faster (docs/benchmarks.md).
    """
    block_m = max(16, power_of_two(m))
    splits = []
    for n, k in shapes:
        blocks = k // LAYER_BLOCK
        most = max(1, min(multiprocessors * LAYER_BLOCK // n, blocks))
        splits.append(math.ceil(blocks / math.ceil(blocks / most)))
    splits[2] = 1
    configs = tuple(layer_config(block_m, split) for split in splits)
    fits = all(config.fits(m, n, k, 64) for config, (n, k) in zip(configs, shapes, strict=True))
    return configs if fits and multiprocessors >= block_m else None


def layer_attention_tile(questions: int, group: int, kv_heads: int, share: int, programs: int) -> tuple[int, int]:
    """(generations of a tile of the attention in `decode_layers`, tiles): as few as leave no more tiles than programs, or as many as have room."""
    most = max(1, min(group, dispatch.LAYER_QUERIES // share))
    choices = [(n, questions * kv_heads * math.ceil(group / n)) for n in range(1, most + 1)]
    return next((choice for choice in choices if choice[1] <= programs), choices[-1])


def mosaic_heuristic(m: int, n: int, k: int, *, code: str = "int4", multiprocessors: int = 132) -> Int4Config:
    """All rows up to 256 in one tile, four warp groups while their sums fit the registers, K split until every multiprocessor has a program."""
    block_m = min(max(16, power_of_two(m)), 256 if code == "int4" else 128)
    block_n = 256 if block_m <= 128 and n % 256 == 0 else 128
    block_k = 256 if block_m <= 64 and k % 256 == 0 and code == "int4" else 128
    tiles = math.ceil(m / block_m) * math.ceil(n / block_n)
    split_k = max(1, min(multiprocessors // tiles, k // block_k // 4))
    return mosaic_config(block_m, block_n, block_k, split_k, code=code)


def int4_heuristic(m: int, n: int, k: int, group: int, *, hopper: bool, multiprocessors: int = 132) -> Int4Config:
    """Many small programs for few rows, whole rows of x in one tile for many; K split until the GPU is busy.

    Measured on an H200: up to 32 rows, programs of two warps win, about six a multiprocessor; above, `wgmma` wins, with
    small tiles of weights and about two programs a multiprocessor at 64 rows, with the widest tile of rows beyond.
    """
    block_m = min(max(16, power_of_two(m)), 128 if hopper else 64)
    swapped, narrow = block_m <= 32, hopper and block_m == 64
    sizes = (256, 128, 64, 32) if swapped or narrow else (128, 64, 32)
    block_k = next((size for size in sizes if k % size == 0 and size % group == 0), group)
    block_n = 32 if swapped else 64 if narrow else 128
    tiles = math.ceil(n / block_n) * math.ceil(m / block_m)
    wanted = multiprocessors * (6.0 if swapped else 2.2 if narrow else 1.7)
    split_k = max(1, min(round(wanted / tiles), k // block_k // (2 if narrow else 4)))
    if swapped:
        return Int4Config(block_m, block_n, block_k, split_k, MMA_SWAPPED, warps=2, stages=3)
    product, warps = WGMMA if hopper else MMA, 8 if block_m >= 128 else 4
    return Int4Config(block_m, block_n, block_k, split_k, product, warps, stages=2 if narrow else 3)


def power_of_two(value: int) -> int:
    """The least power of two that is not below."""
    return 1 << (value - 1).bit_length()


def dense_measurement(m: int, n: int, k: int) -> tuple[float, float] | None:
    """Microseconds of (the kernel, the library) for x [M, K] @ W [N, K]^T, its consumer's reads included; None: unmeasured."""
    entry = _product_entry("dense_matmul", m, n, k)
    return None if entry is None else (entry["us"], entry["library_us"])


def dense_config(m: int, n: int, k: int) -> DenseConfig:
    """The blocks for x [M, K] @ W [N, K]^T on the current device."""
    entry = _product_entry("dense_matmul", m, n, k)
    return dense_heuristic(m, n, k) if entry is None else DenseConfig(**entry["config"])


def _product_entry(op: str, m: int, n: int, k: int) -> dict | None:
    """The measurement of this N and K with the fewest rows that are not below M."""
    entries = tuned(dispatch.current_device().name).get(op, [])
    return min((e for e in entries if (e["n"], e["k"]) == (n, k) and e["m"] >= m), key=lambda e: e["m"], default=None)


def dense_heuristic(m: int, n: int, k: int, *, multiprocessors: int = 132) -> DenseConfig:
    """Tiles of 64 weights by all rows up to 128; K split in up to 16 until every multiprocessor has a program."""
    block_m = min(max(16, power_of_two(m)), 128)
    block_k = next(size for size in (128, 64) if k % size == 0)
    tiles = math.ceil(n / 64) * math.ceil(m / block_m)
    split_k = max(1, min(multiprocessors // tiles, k // block_k // 2, 16))
    return DenseConfig(block_m, 64, block_k, split_k, True, warps=4, stages=4 if block_m <= 64 else 3)


def gated_measurement(m: int, n: int, k: int) -> tuple[float, float] | None:
    """Microseconds of (the kernel, the library's product and then the gate) for W [N = 2F, K]; None: unmeasured."""
    entry = _product_entry("gated_matmul", m, n, k)
    return None if entry is None else (entry["us"], entry["library_us"])


def gated_config(m: int, n: int, k: int) -> GatedConfig:
    """The blocks for x [M, K] and W [N = 2F, K] on the current device."""
    entry = _product_entry("gated_matmul", m, n, k)
    if entry is not None:
        return GatedConfig(**entry["config"])
    return gated_heuristic(m, n, hopper=(dispatch.current_device().capability or (0, 0)) >= (9, 0))


def gated_heuristic(m: int, n: int, *, hopper: bool, multiprocessors: int = 132) -> GatedConfig:
    """All rows up to 256 by 64 columns: every tile of weights reads x again, from the L2. More columns where that saves a round.

    Up to 32 rows the weights are the left operand, of which a Hopper GPU takes no fewer than 64 rows at once. Before Hopper, more
    columns would not fit the registers.
    """
    block_m = min(max(16, power_of_two(m)), 256)
    if block_m <= 32:
        return GatedConfig(block_m, 64, 0, 64, True, warps=4, stages=4)
    extra = min(
        (0, 8, 16) if hopper else (0,), key=lambda extra: gated_rounds(m, n, block_m, 64 + extra, multiprocessors)
    )
    return GatedConfig(block_m, 64, extra, 64, False, warps=4 if block_m == 64 else 8, stages=4)


def gated_rounds(m: int, n: int, block_m: int, columns: int, multiprocessors: int = 132) -> int:
    """Rounds of one program a multiprocessor that the tiles of [M, F] take, N = 2F."""
    return math.ceil(math.ceil(m / block_m) * math.ceil(n / 2 / columns) / multiprocessors)


def attention_config(rows: int, prompts: int, head_dim: int, share: int) -> AttentionConfig:
    """The blocks for `rows` = Q * G * K suffixes and `prompts` = Q * K shared prompts, `share` = H / K heads each.

    Programs that read the prompt too are as many as the rows make them: such an entry is taken for no fewer rows than its own.
    """
    entries = tuned(dispatch.current_device().name).get("decode_attention", [])
    candidates = [
        e
        for e in entries
        if e["head_dim"] == head_dim and (rows >= e["rows"] or not AttentionConfig(**e["config"]).generations)
    ]
    if candidates:
        nearest = min(candidates, key=lambda e: _distance(e, {"rows": rows, "prompts": prompts, "share": share}))
        return AttentionConfig(**nearest["config"])
    return attention_heuristic(rows, prompts, head_dim)


def attention_heuristic(rows: int, prompts: int, head_dim: int, *, multiprocessors: int = 132) -> AttentionConfig:
    """Split each suffix until the programs fill the GPU about four times; prompts are few and get as many splits."""
    wanted = 4 * multiprocessors
    suffix_splits = max(1, min(16, power_of_two(math.ceil(wanted / rows))))
    prompt_splits = max(1, min(8, power_of_two(math.ceil(multiprocessors / prompts))))
    return AttentionConfig(64 if head_dim <= 128 else 32, 32, suffix_splits, prompt_splits, warps=4, stages=3)


def as_entry(config: Int4Config | DenseConfig | GatedConfig | AttentionConfig, **shape: int) -> dict:
    """An entry of a tuned file."""
    return {**shape, "config": asdict(config)}
