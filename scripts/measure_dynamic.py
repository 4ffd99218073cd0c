"""What `quantization: dynamic` buys: logit error and memory against uniform int4, on a checkpoint or a random model.

python scripts/measure_dynamic.py --model demo
python scripts/measure_dynamic.py --random 100        # millions of parameters, heavy-tailed as trained weights are
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jgrpo.checkpoints.dynamic import resolve_quantization
from jgrpo.checkpoints.hf import load_base, load_model_config, load_tokenizer, resolve_checkpoint
from jgrpo.checkpoints.merged import side_files
from jgrpo.checkpoints.names import placements
from jgrpo.checkpoints.safetensors_io import SafetensorsWriter, TensorSpec
from jgrpo.config import QuantizationConfig
from jgrpo.models import Transformer, model_config_from_hf

HELD_OUT = ("Once upon a time there was a", "Solve 12 * (7 - 3) + 5 =", "import numpy as np\nx = np.")


def random_checkpoint(directory: Path, millions: int) -> Path:
    """Student-t weights (5 degrees of freedom), each layer and matrix of its own scale; a byte-level tokenizer."""
    width = 64 * round((millions * 1e6 / (12 * 12)) ** 0.5 / 64)
    config = dict(
        model_type="llama", vocab_size=1024, hidden_size=width, intermediate_size=64 * round(width * 8 / 3 / 64)
    )
    config |= dict(num_hidden_layers=12, num_attention_heads=width // 64, num_key_value_heads=width // 64)
    (directory / "config.json").write_text(json.dumps(config | dict(max_position_embeddings=2048)))
    rng = np.random.default_rng(0)
    ordered = [p for placed in placements(model_config_from_hf(config)).values() for p in placed]
    with SafetensorsWriter(
        directory / "model.safetensors", [TensorSpec(p.name, p.shape, np.dtype("f4")) for p in ordered]
    ) as out:
        for p in ordered:
            weight = np.ones(p.shape, np.float32)
            if len(p.shape) == 2:
                weight = (rng.standard_t(5, p.shape) / (5 / 3) ** 0.5 * p.shape[1] ** -0.5).astype(np.float32)
                weight *= np.exp(rng.normal(size=p.shape[1]) * 0.5).astype(np.float32) if p.modules else 1
            out.write(weight)
    for file in side_files(resolve_checkpoint("demo")):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--random", type=int, help="millions of parameters of a random model instead")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--group-size", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = random_checkpoint(Path(directory), args.random) if args.random else resolve_checkpoint(args.model)
        report(path, QuantizationConfig(group_size=args.group_size, dynamic_budget=args.budget))


def report(path: Path, settings: QuantizationConfig) -> None:
    config, tokenizer = load_model_config(path), load_tokenizer(path)
    rows = [tokenizer.encode(text) for text in HELD_OUT]
    lengths = np.asarray([len(row) for row in rows])
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    model = Transformer(config)
    dynamic = resolve_quantization(
        path, config, dataclasses.replace(settings, quantization="dynamic"), jnp.float32, tokenizer
    )
    results = {}
    for name, quantization in {
        "none": dataclasses.replace(settings, quantization="none"),
        "int4": settings,
        "dynamic": dynamic,
    }.items():
        base = load_base(path, config, quantization, jnp.float32)
        hidden = jax.jit(lambda base: model.apply({"params": base}, tokens, lengths))(base)
        logits = np.asarray(model.apply({"params": base}, hidden, method="logits"))[real]
        results[name] = logits, sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    exact, int4_bytes = results["none"][0], results["int4"][1]
    parameters = sum(int(np.prod(p.shape)) for placed in placements(config).values() for p in placed)
    print(f"{path}: {parameters / 1e6:.1f} M parameters, logits of standard deviation {exact.std():.3f}")
    for name in ("int4", "dynamic"):
        logits, nbytes = results[name]
        error = np.sqrt(np.mean((logits - exact) ** 2))
        print(f"{name:8s} {nbytes / 1e6:9.2f} MB ({nbytes / int4_bytes - 1:+.3%})  logit error (RMS) {error:.4f}")
    print(f"wider: {', '.join(dynamic.wide_matrices) or 'nothing'}")


if __name__ == "__main__":
    main()
