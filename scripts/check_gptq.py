"""GPTQ exports of every family in another reader: transformers' GPTQ loader with GPTQModel, on a CPU.

    PYTHONPATH=. python scripts/check_gptq.py            # needs: pip install gptqmodel optimum

Tiny random models with an adapter, rounded on random tokens in groups of 64 inputs, their logits on 40 tokens against jgrpo's on the same files. A
line for each family; the exit code is 1 where a logit differs by more than 0.01 (GPTQModel's CPU kernels round to 16 bits)
or another token is the most likely one. Not part of the tests: GPTQModel wants newer releases of torch than they pin.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from jgrpo.checkpoints.calibrated import CalibratedRounding
from jgrpo.checkpoints.gptq import GPTQEncoding
from jgrpo.checkpoints.hf import load_base, load_model_config
from jgrpo.checkpoints.merged import export_merged
from jgrpo.config import QuantizationConfig
from jgrpo.models import Transformer
from tests.parity.conftest import CASES, LORA, UNQUANTIZED, our_logits, random_adapter
from tests.tiny_checkpoints import make_checkpoint

NAMES = ("llama-biases", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3")
BOUND = 0.01


def export(name: str, directory: Path) -> Path:
    """A checkpoint in GPTQ's layout, of sizes that GPTQModel's kernels take."""
    family, overrides = CASES[name]
    sizes: dict[str, Any] = dict(hidden_size=128, intermediate_size=256)
    sizes |= {"head_dim": 32} if family.startswith("gemma") else {}
    source = make_checkpoint(directory / "source", family, **sizes, **overrides)
    config = load_model_config(source)
    base, lora = load_base(source, config, UNQUANTIZED), random_adapter(config, LORA)
    rows = np.random.default_rng(1).integers(0, 263, (16, 40)).tolist()
    encoding = GPTQEncoding(np.dtype(np.float32), 64, CalibratedRounding(config, rows))
    return export_merged(directory / "gptq", source, lora, LORA, config, base=base, encoding=encoding)


@torch.no_grad()
def compare(path: Path) -> tuple[set[str], float, bool]:
    """(their modules, largest difference of a logit, whether all most likely tokens agree)."""
    tokens = np.random.default_rng(0).integers(0, 263, (1, 40)).astype(np.int32)
    theirs = AutoModelForCausalLM.from_pretrained(path, device_map="cpu", dtype=torch.float32)
    expected = theirs(torch.tensor(tokens)).logits[0].float().numpy()
    config = load_model_config(path)
    base = load_base(path, config, QuantizationConfig(), jnp.float32)
    ours = our_logits(Transformer(config), base, {}, tokens, np.asarray([40], np.int32))
    modules = {type(module).__name__ for module in theirs.modules() if hasattr(module, "qweight")}
    return modules, float(np.abs(ours - expected).max()), bool((ours.argmax(-1) == expected.argmax(-1)).all())


def main() -> int:
    if missing := [name for name in ("gptqmodel", "optimum") if importlib.util.find_spec(name) is None]:
        sys.exit(f"check_gptq needs {' and '.join(missing)}: pip install gptqmodel optimum")
    good = True
    for name in NAMES:
        with tempfile.TemporaryDirectory() as directory:
            modules, difference, same = compare(export(name, Path(directory)))
        good &= bool(modules) and difference <= BOUND and same
        print(
            f"{name}: {', '.join(sorted(modules))}; logits differ by {difference:.1e}, tokens {'equal' if same else 'DIFFER'}"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
