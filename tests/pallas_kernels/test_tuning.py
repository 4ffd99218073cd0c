"""Block sizes: heuristics and tuned files give configurations that the kernels can run, for any shape."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pallas_kernels import dispatch, tuning
from pallas_kernels.tuning import AttentionConfig, DenseConfig, GatedConfig, Int4Config

FILES = sorted((Path(tuning.__file__).parent / "tuned").glob("*.json"))
SHAPES = [
    (n, k, group) for n in (7, 1536, 28672) for k, group in [(896, 64), (896, 128), (1536, 64), (3584, 32), (64, 32)]
]


SHARED_MEMORY = 227 * 1024
"""Bytes that a program may ask for on Hopper."""


def mosaic_shared_bytes(config: Int4Config, rank: int = 0) -> int:
    """The ring of slots (x, packed weights, eight scales a row) and x A^T; each slot's two barriers and the adapter's are 8 bytes each."""
    x, weights = 2 * config.block_m * config.block_k, config.block_n * config.block_k // 2
    return config.stages * (x + weights + 2 * 8 * config.block_n + 2 * 8) + 2 * config.block_m * rank + 8


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("m", [1, 5, 16, 33, 64, 200, 4096])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_int4_heuristic_fits_every_shape(m, n, k, group, hopper):
    config = tuning.int4_heuristic(m, n, k, group, hopper=hopper)
    assert config.fits(m, n, k, group)
    assert config.block_m >= min(m, 64)
    assert hopper or config.product != tuning.WGMMA
    shared = (
        config.stages * config.block_m * config.block_k * 2 + (config.stages - 1) * config.block_n * config.block_k // 2
    )
    assert shared <= (227 if hopper else 163) * 1024


@pytest.mark.parametrize("m", [17, 33, 64, 128, 200, 256, 4096])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(128, 512, 64), (384, 1536, 64), (2048, 1536, 128), (1536, 8960, 64), (4864, 896, 64), (28672, 4096, 128)],
)
def test_mosaic_heuristic_fits_and_fills_no_more_than_shared_memory(m, n, k, group):
    config = tuning.mosaic_heuristic(m, n, k)
    assert config.product == tuning.MOSAIC
    assert config.fits(m, n, k, group)
    assert config.block_m >= min(m, 256)
    assert 2 <= config.stages <= 8
    assert mosaic_shared_bytes(config) <= SHARED_MEMORY


@pytest.mark.parametrize("rank", [0, 16, 128, 256])
@pytest.mark.parametrize("blocks", [(16, 128, 256), (64, 256, 256), (128, 256, 128), (256, 128, 128)])
def test_stages_of_the_mosaic_form_are_the_most_that_fit(blocks, rank):
    config = tuning.mosaic_config(*blocks, split_k=2)
    stages = tuning.mosaic_stages(config, rank)
    assert mosaic_shared_bytes(replace(config, stages=stages), rank) <= SHARED_MEMORY
    assert stages == 8 or mosaic_shared_bytes(replace(config, stages=stages + 1), rank) > SHARED_MEMORY - 1024


@pytest.mark.parametrize(
    ("n", "k", "group", "fits"),
    [
        (1536, 1536, 64, True),
        (1536, 2048, 128, True),
        (1600, 1536, 64, False),  # N is not whole blocks
        (1536, 1536, 32, False),
        (1536, 8960, 64, True),  # 140 scales a row, not a multiple of the 8 that one copy brings
        (1536, 1536, 128, True),
        (1536, 1536, 512, False),  # a group is wider than a block
        (1536, 896, 64, False),  # K is not whole blocks
    ],
)
def test_shapes_of_the_mosaic_form(n, k, group, fits):
    mosaic = tuning.mosaic_config(64, 128, 256, 2)
    assert mosaic.fits(64, n, k, group) == fits
    assert not replace(mosaic, split_k=k // 256 + 1).fits(64, n, k, group)
    # Of K in two parts, the programs with a tile keep a block at least.
    assert not replace(mosaic, split_k=1, rest=k // 256).fits(64, n, k, group)
    assert replace(mosaic, split_k=1, rest=1).fits(64, n, k, group) == fits


@pytest.fixture
def measured(monkeypatch) -> list[dict]:
    """The measurements of the int4 product on the device that this process takes itself for; empty."""
    entries: list[dict] = []
    monkeypatch.setattr(dispatch, "current_device", lambda: dispatch.Device("gpu", (9, 0), True, "H", has_mosaic=True))
    monkeypatch.setattr(tuning, "tuned", lambda name: {"int4_matmul": entries})
    return entries


@pytest.mark.parametrize("mosaic_first", [False, True])
@pytest.mark.parametrize(("mosaic_us", "faster"), [(5.0, True), (7.0, False)])
def test_the_faster_form_of_a_shape_is_taken(measured, mosaic_us, faster, mosaic_first):
    shape = {"m": 64, "n": 1536, "k": 1536}
    mosaic, triton = tuning.mosaic_config(64, 128, 256, 2), Int4Config(64, 64, 128, 2, tuning.WGMMA, 4, 2)
    both = [tuning.as_entry(mosaic, **shape, us=mosaic_us), tuning.as_entry(triton, **shape, us=6.0)]
    measured.extend(both if mosaic_first else reversed(both))
    assert tuning.int4_config(64, 1536, 1536, 64, mosaic=True) == (mosaic if faster else triton)
    assert tuning.int4_config(64, 1536, 1536, 64) == triton
    assert tuning.int4_config(64, 1536, 1536, 32, mosaic=True) == triton  # mosaic does not fit


def test_a_shape_measured_in_the_mosaic_form_only_is_left_to_the_others_where_that_cannot_run(measured):
    mosaic = tuning.mosaic_config(64, 128, 256, 2)
    measured.append(tuning.as_entry(mosaic, m=64, n=1536, k=1536, us=5.0))
    assert tuning.int4_config(64, 1536, 1536, 64, mosaic=True) == mosaic
    assert tuning.int4_config(64, 1536, 1536, 64) == tuning.int4_heuristic(64, 1536, 1536, 64, hopper=True)


def test_unmeasured_shapes_get_a_heuristic_that_fits(measured):
    del measured  # none
    for m, n, k, mosaic in [(64, 1536, 1536, True), (256, 28672, 4096, True), (16, 1536, 1536, False)]:
        want = tuning.mosaic_heuristic(m, n, k) if mosaic else tuning.int4_heuristic(m, n, k, 64, hopper=True)
        assert tuning.int4_config(m, n, k, 64, mosaic=True) == want
        assert tuning.int4_config(m, n, k, 64).product != tuning.MOSAIC
    for n, k, group in [(1600, 1536, 64), (1536, 1600, 64), (1536, 1536, 32)]:
        want = tuning.int4_heuristic(64, n, k, group, hopper=True)
        assert tuning.int4_config(64, n, k, group, mosaic=True) == want


@pytest.mark.parametrize(("split", "rest"), [(5, 0), (1, 2)])
@pytest.mark.parametrize(("n", "whole"), [(151_936, True), (132 * 128, True), (3072, False)])
def test_k_of_weights_in_8_bits_is_not_split_where_their_rows_fill_the_gpu(n, whole, split, rest, monkeypatch):
    nearest = tuning.mosaic_config(64, 128, 128, split, code="int8")
    nearest = replace(nearest, rest=rest)
    entries = [tuning.as_entry(nearest, m=64, n=3072, k=3072, us=9.0)]
    monkeypatch.setattr(tuning, "tuned", lambda name: {"int8_matmul": entries})
    assert tuning.int8_config(64, n, 896, 64) == (replace(nearest, split_k=1, rest=0) if whole else nearest)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_tuned_files_hold_configurations_that_fit_their_shape(file):
    entries = json.loads(file.read_text())
    for entry in entries["int4_matmul"]:
        config = Int4Config(**entry["config"])
        assert config.fits(entry["m"], entry["n"], entry["k"], 64)
        assert config.product in (tuning.MMA, tuning.MMA_SWAPPED, tuning.WGMMA, tuning.MOSAIC)
        assert config.product != tuning.MOSAIC or (config.stages >= 2 and mosaic_shared_bytes(config) <= SHARED_MEMORY)
    for entry in entries["decode_attention"]:
        # 64 query rows would make Triton choose asynchronous products, see test_triton_compiles.py.
        config = AttentionConfig(**entry["config"])
        assert config.prompt_rows <= 32
        assert config.suffix_splits >= 1
        assert (config.prompt_splits == 0) == (config.generations > 0)
        assert not config.generations or config.block_slots >= 16 * config.warps
    for entry in entries.get("dense_matmul", []):
        assert DenseConfig(**entry["config"]).fits(entry["k"])
        assert min(entry["us"], entry["library_us"]) > 0
    for entry in entries.get("gated_matmul", []):
        assert GatedConfig(**entry["config"]).fits(entry["k"])
        assert min(entry["us"], entry["library_us"]) > 0


def test_nearest_tuned_entry_that_fits_is_taken(monkeypatch):
    monkeypatch.setattr(dispatch, "current_device", lambda: dispatch.Device("gpu", (9, 0), True, "NVIDIA H200"))
    slowest_first = sorted(tuning.tuned("NVIDIA H200")["int4_matmul"], key=lambda e: -e["us"])
    fastest = {(e["m"], e["n"], e["k"]): e["config"] for e in slowest_first}
    entries = {(e["m"], e["n"], e["k"]): e["config"] for e in slowest_first if e["config"]["product"] != tuning.MOSAIC}
    for m in (16, 64, 256):
        assert tuning.int4_config(m, 28672, 4096, 64, mosaic=True) == Int4Config(**fastest[m, 28672, 4096])
    assert tuning.int4_config(16, 28672, 4096, 64) == Int4Config(**entries[16, 28672, 4096])
    assert tuning.int4_config(61, 28000, 4096, 64) == Int4Config(**entries[64, 28672, 4096])
    odd = tuning.int4_config(16, 4864, 896, 64)
    assert odd.fits(16, 4864, 896, 64)
    assert tuning.attention_config(2048, 256, 128, 4).suffix_splits == 1


def test_blocks_measured_with_more_rows_are_taken_where_they_were_faster(monkeypatch):
    slow, fast = (tuning.mosaic_config(block_m, 128, 128, 1) for block_m in (64, 128))
    shape = {"n": 512, "k": 1024}
    entries = [tuning.as_entry(slow, m=64, us=9.0, **shape), tuning.as_entry(fast, m=128, us=8.0, **shape)]
    monkeypatch.setattr(tuning, "tuned", lambda name: {"int4_matmul": entries})
    assert tuning.int4_config(64, 512, 1024, 64, mosaic=True) == fast
    # The nearest: of another shape, times say nothing.
    assert tuning.int4_config(64, 512, 2048, 64, mosaic=True) == slow
    entries[1]["us"] = 9.5
    assert tuning.int4_config(64, 512, 1024, 64, mosaic=True) == slow
    # With more rows than the first: four more tiles are for multiprocessors that have none, 132 more are a second round.
    assert tuning.int4_config(65, 512, 1024, 64, mosaic=True) == slow
    for entry in entries:
        entry["n"] = 132 * 128
    assert tuning.int4_config(65, 132 * 128, 1024, 64, mosaic=True) == fast


@pytest.mark.parametrize(
    ("config", "m", "want"),
    [
        (tuning.mosaic_config(64, 128, 128, 1), 64, 8),
        (tuning.mosaic_config(64, 128, 128, 1), 256, 8 * 2),  # 160 tiles for 132 programs
        (tuning.mosaic_config(64, 128, 128, 3), 64, 3),
        (tuning.mosaic_config(64, 128, 128, 3), 128, 3 * 2),
        (replace(tuning.mosaic_config(64, 128, 128, 1), rest=3), 64, 5),
        (replace(tuning.mosaic_config(64, 128, 128, 1), rest=3), 256, 8 * 2),  # no program is left over
        (replace(tuning.mosaic_config(256, 128, 128, 1), cut=16), 256, 8),
    ],
)
def test_blocks_of_the_busiest_program(config, m, want):
    assert config.most_blocks(m, 40 * 128, 1024, 132) == want


def test_rows_between_measured_ones_take_what_should_be_fastest(measured):
    """1,024 rows of 1536 x 2048: tiles of 256 rows would leave half of the multiprocessors idle, those of 512 rows fill them."""
    wide, narrow = tuning.mosaic_config(256, 128, 64, 1), tuning.mosaic_config(128, 128, 256, 1)
    shape = {"n": 2048, "k": 1536}
    measured += [tuning.as_entry(narrow, m=512, us=8.5, **shape), tuning.as_entry(wide, m=2048, us=20.2, **shape)]
    assert tuning.int4_config(1024, 2048, 1536, 64, mosaic=True) == narrow
    assert tuning.int4_config(2048, 2048, 1536, 64, mosaic=True) == wide
    assert tuning.int4_config(512, 2048, 1536, 64, mosaic=True) == narrow


def test_attention_that_reads_the_prompt_in_every_program_is_not_taken_for_fewer_rows(monkeypatch):
    whole, split = AttentionConfig(64, 16, 1, 0, 4, 3, generations=2), AttentionConfig(64, 32, 2, 2, 4, 3)
    shapes = [(512, 64, whole), (2048, 256, split)]
    entries = [tuning.as_entry(how, rows=rows, prompts=prompts, head_dim=128, share=6) for rows, prompts, how in shapes]
    monkeypatch.setattr(tuning, "tuned", lambda name: {"decode_attention": entries})
    assert tuning.attention_config(512, 64, 128, 6) == tuning.attention_config(800, 100, 128, 7) == whole
    assert tuning.attention_config(500, 64, 128, 6) == split
    entries.pop()
    assert tuning.attention_config(500, 64, 128, 6) == tuning.attention_heuristic(500, 64, 128)


def test_device_without_a_file_gets_the_heuristic(monkeypatch):
    device = dispatch.Device("gpu", (8, 0), True, "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(dispatch, "current_device", lambda: device)
    assert tuning.device_file(device.name) == "nvidia_a100_sxm4_80gb.json"
    assert tuning.int4_config(16, 4096, 4096, 64) == tuning.int4_heuristic(16, 4096, 4096, 64, hopper=False)
    assert tuning.attention_config(128, 16, 128, 6) == tuning.attention_heuristic(128, 16, 128)
