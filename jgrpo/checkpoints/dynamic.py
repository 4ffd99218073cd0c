"""`quantization: dynamic`: which matrices stay in 8 or 16 bits, under a memory budget.

The unit is one matrix of one layer (q, k and v are one matrix, so are gate and up), because that is what is stored in one
form. For each unit and each form, two relative errors are measured against the checkpoint's weights W, with Q the
rounded ones and E x² the mean square of each input over a few prompts, seen by the uniform int4 model:

    weight error      |W - Q|² / |W|²
    activation error  Σ_nk (W - Q)²_nk E x²_k  /  Σ_nk W²_nk E x²_k     (inputs taken as uncorrelated)

The score of a form is the sum of the two. Units are widened greedily, by fall of the score for each byte added, until
the budget is spent; after its first step a unit may take another one (int4 -> int8 -> dense). The idea of looking at both
errors is Unsloth's dynamic 4-bit quantization (https://unsloth.ai/blog/dynamic-4bit); the rule is ours.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgrpo.checkpoints.formats import Tensor, read_scheme, readers
from jgrpo.checkpoints.hf import SCALE_DTYPE, leaf_group_size, load_base
from jgrpo.checkpoints.names import Leaf, Placement, placements
from jgrpo.checkpoints.source import read_config, resolve_checkpoint, tensor_index
from jgrpo.config import QuantizationConfig
from jgrpo.errors import UserError
from jgrpo.lora import matrix_modules
from jgrpo.models import ModelConfig, Transformer
from jgrpo.quantization import dequantize, quantize, quantize_int8

PROMPTS = (
    "The capital of France is Paris. The capital of Japan is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Question: A train travels 60 miles in 1.5 hours. How fast is it going?\nAnswer: Let's think step by step.",
    "Using the numbers [3, 7, 25, 50], create an equation that equals 82.",
)
_ROUND = {"int4": quantize, "int8": quantize_int8}
_STEPS = {"int4": "int8", "int8": "dense"}


@dataclass(frozen=True)
class Unit:
    """One matrix of one layer."""

    matrix: str
    layer: int
    score: Mapping[str, float]
    """Weight error + activation error of each form."""
    nbytes: Mapping[str, int]
    """Memory of each form."""

    def gain(self, form: str) -> float:
        """Fall of the score for each byte that the step from `form` to the next one adds."""
        wider = _STEPS[form]
        return (self.score[form] - self.score[wider]) / (self.nbytes[wider] - self.nbytes[form])


def resolve_quantization(
    path: str | Path, model_config: ModelConfig, quantization: QuantizationConfig, dtype: Any, tokenizer: Any
) -> QuantizationConfig:
    """The same settings with `wide_matrices` chosen, if they are dynamic and nothing is chosen yet.

    Reads the checkpoint twice, and holds the uniform int4 model meanwhile. A checkpoint that is already quantized is left
    as it is.
    """
    directory = resolve_checkpoint(path)
    quantized = read_config(directory).get("quantization_config")
    if quantization.quantization != "dynamic" or quantization.wide_matrices or quantized:
        return quantization
    if not 0 <= quantization.dynamic_budget <= 3:
        raise UserError(f"dynamic_budget is {quantization.dynamic_budget}: expected a part of int4's memory, 0 to 3")
    uniform = dataclasses.replace(quantization, quantization="int4")
    base = load_base(directory, model_config, uniform, dtype)
    tokens, lengths = _tokens(tokenizer, model_config)
    model = Transformer(model_config, dtype=jnp.dtype(dtype))
    moments = jax.jit(lambda base: model.apply({"params": base}, tokens, lengths, method="input_moments"))(base)
    budget = quantization.dynamic_budget * sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    units = measure(directory, model_config, uniform, jax.tree.map(np.asarray, moments), jnp.dtype(dtype).itemsize)
    chosen = choose(units, budget)
    entries = tuple(f"{layer}.{matrix}={form}" for (layer, matrix), form in chosen.items())
    return dataclasses.replace(quantization, wide_matrices=entries)


def measure(
    directory: Path,
    model_config: ModelConfig,
    quantization: QuantizationConfig,
    moments: Mapping[str, np.ndarray],
    dense_bytes: int,
) -> list[Unit]:
    """Scores and sizes of every unit that `quantization` stores in int4; streams through the checkpoint."""
    index, plan = tensor_index(directory), placements(model_config)
    tensors = readers(index, plan, read_scheme(read_config(directory), str(directory)))
    units = []
    for matrix in matrix_modules(model_config):
        leaf: Leaf = ("layers", matrix)
        group_size = leaf_group_size(leaf, model_config, quantization)
        if group_size is None:
            continue
        for layer in range(model_config.num_layers):
            placed = [placement for placement in plan[leaf] if placement.layer == layer]
            units.append(_measure_unit(matrix, layer, placed, tensors, group_size, moments[matrix][layer], dense_bytes))
    return units


def _measure_unit(
    matrix: str,
    layer: int,
    placed: list[Placement],
    tensors: Mapping[str, Tensor],
    group_size: int,
    moment: np.ndarray,
    dense_bytes: int,
) -> Unit:
    power, errors = np.zeros(2), {form: np.zeros(2) for form in _ROUND}
    for weight in _blocks(placed, tensors):
        power += _powers(weight, moment)
        for form, rounded in _ROUND.items():
            error = weight - dequantize(rounded(weight, group_size, jnp.dtype(SCALE_DTYPE)), np.float32)
            errors[form] += _powers(error, moment)
    # A matrix of zeros, or one whose inputs are all zero, loses nothing.
    score = {form: float((error / np.where(power == 0, 1, power)).sum()) for form, error in errors.items()}
    count = sum(int(np.prod(placement.shape)) for placement in placed)
    scales = count // group_size * jnp.dtype(SCALE_DTYPE).itemsize
    nbytes = {"int4": count // 2 + scales, "int8": count + scales, "dense": count * dense_bytes}
    return Unit(matrix, layer, score | {"dense": 0.0}, nbytes)


def _blocks(placed: list[Placement], tensors: Mapping[str, Tensor]) -> Iterator[np.ndarray]:
    for placement in placed:
        tensor = tensors[placement.name]
        for window in tensor.blocks():
            yield tensor.read(*window).astype(np.float32)


def _powers(values: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """(Σ v², Σ v² E x²)."""
    columns = np.square(values, dtype=np.float64).sum(0)
    return np.asarray([columns.sum(), columns @ moment])


def choose(units: list[Unit], budget: float) -> dict[tuple[int, str], str]:
    """{(layer, matrix): form} of the units that are widened within `budget` bytes, in the order of the layers."""
    forms = dict.fromkeys(range(len(units)), "int4")
    while True:
        steps = [
            (units[i].gain(form), i) for i, form in forms.items() if form in _STEPS and _cost(units[i], form) <= budget
        ]
        if not steps or (best := max(steps))[0] <= 0:
            break
        unit, form = units[best[1]], forms[best[1]]
        budget -= _cost(unit, form)
        forms[best[1]] = _STEPS[form]
    wide = {(units[i].layer, units[i].matrix): form for i, form in forms.items() if form != "int4"}
    return dict(sorted(wide.items()))


def _cost(unit: Unit, form: str) -> int:
    return unit.nbytes[_STEPS[form]] - unit.nbytes[form]


def _tokens(tokenizer: Any, model_config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    rows = [tokenizer.encode(prompt)[: min(128, model_config.max_position_embeddings)] for prompt in PROMPTS]
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, lengths
