"""The scripts that measure on a GPU run on a CPU too."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> list[dict]:
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_asymmetric_and_mixed_weights_decode_unrolled():
    forms = ("int4-asymmetric", "mixed")
    _, *results = run("check_gpu_formats.py", "--dtype", "float32", "--head-dims", "64", "--forms", *forms)
    assert [result["form"] for result in results] == list(forms)
    for result in results:
        assert all(result[name]["rms"] < 1e-5 for name in ("prefill", "decode", "forward"))


def test_ways_of_rounding_to_four_bits():
    nearest, plain, calibrated = run("measure_gptq.py", "--random", "1", "--tokens", "2048")
    assert [row["rounding"] for row in (nearest, plain, calibrated)] == ["nearest level", "plain GPTQ", "calibrated"]
    assert nearest["random tokens"]["share"] < plain["random tokens"]["share"] < calibrated["random tokens"]["share"]
    assert calibrated["export"]["seconds"] > 0


def test_peaks_while_loading():
    (result,) = run("measure_loading.py", "--gigabytes", "0.1", "--formats", "gptq", "--json")
    assert result["ok"]
    assert 0 < result["model"] < result["bound"]
    assert result["host_peak"] > 0.5 * result["model"]  # on a CPU the device is the host
    assert sum(result["host_left"].values()) > 0.5 * result["model"]
