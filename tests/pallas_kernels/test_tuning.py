"""Block sizes: heuristics and tuned files give configurations that the kernels can run, for any shape."""

import json
from pathlib import Path

import pytest

from pallas_kernels import dispatch, tuning
from pallas_kernels.tuning import AttentionConfig, DenseConfig, GatedConfig, Int4Config

FILES = sorted((Path(tuning.__file__).parent / "tuned").glob("*.json"))
SHAPES = [
    (n, k, group) for n in (7, 1536, 28672) for k, group in [(896, 64), (896, 128), (1536, 64), (3584, 32), (64, 32)]
]


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


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_tuned_files_hold_configurations_that_fit_their_shape(file):
    entries = json.loads(file.read_text())
    for entry in entries["int4_matmul"]:
        config = Int4Config(**entry["config"])
        assert config.fits(entry["m"], entry["n"], entry["k"], 64)
        assert config.product in (tuning.MMA, tuning.MMA_SWAPPED, tuning.WGMMA)
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
    entries = {(e["m"], e["n"], e["k"]): e["config"] for e in tuning.tuned("NVIDIA H200")["int4_matmul"]}
    assert tuning.int4_config(16, 28672, 4096, 64) == Int4Config(**entries[16, 28672, 4096])
    assert tuning.int4_config(61, 28000, 4096, 64) == Int4Config(**entries[64, 28672, 4096])
    odd = tuning.int4_config(16, 4864, 896, 64)
    assert odd.fits(16, 4864, 896, 64)
    assert tuning.attention_config(2048, 256, 128, 4).suffix_splits == 1


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
