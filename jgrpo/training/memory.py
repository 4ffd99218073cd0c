"""What a run needs of the device's memory, from shapes alone: no weights, no GPU, no compilation.

The peak of a step is what lives through it plus the larger of its two halves:

    total = base + adapter + optimizer + runtime + max(rollout, update)
    rollout = KV cache + max(prefill, sampling)                  (freed before the update)
    update = gradients + max(layer inputs + max(layer, log-probs), optimizing)
                                                                 (a layer's backward and the head's never coincide)

Terms, with b the bytes of the compute dtype, S = q·P + B·C the positions of a microbatch (q prompts, B rows), R = B·(P + C)
those of its attention rows, and W = (H + 2K)·Hd:

- optimizer: AdamW's two moments, float32 or 8 bits (`jgrpo.training.adam8bit`); gradients: the sum over microbatches, float32,
  which the backward of the layers adds to (`jgrpo.gradient_sums`), and on a CPU half as much again: XLA copies moments of 32
  bits there long before it updates them. Embedding, head and final norm of a trained model have the microbatch's own too, which
  count as layer inputs. Optimizing: with moments of 8 bits, one leaf's gradient after clipping, in whose place the update's
  direction is written, beside the sum; with 32 bits XLA makes neither.
- PPO's critic is an adapter and a head that are trained like the policy's: adapter, optimizer and gradients twice, and twice the
  layer inputs, since both forwards of a microbatch come before its backwards. Online DPO's rows are pairs, two to a prompt. A
  reference adapter (`reference_adapter`, `reference_sync_steps`) is one more adapter; a reference forward needs no more than a layer.
- layer inputs: L·S·D·b, which remat keeps; on the host with `offload`, where two stay on the device in passing.
- layer: the largest moment of one layer's backward. In the MLP: gate, up, their product, and the gradients of all three, 6·F a
  position, beside what the layer recomputed before (7·D, W, H·Hd a position, W + 2·H·Hd an attention row). In attention: its
  outputs, rows and their gradients. Where attention is not cuDNN's (a CPU, float32), also the scores of one block of
  queries, three times: XLA sets the space of that inner loop aside for the whole layer. Plus what exists of the layer's
  largest matrix in the compute dtype (`row_block`). Without remat each layer keeps its products, W + D + 2·F a position, and
  the largest moment is without them and what they are recomputed from.
- log-probs: the logits of a chunk in float32 and their gradient (`logprob_chunk`; with a packed head also a slice of it, and
  the sums of its gradient: `packed_head_chunks`), and the hidden states of the completions, twice.
- KV cache: of the prompts that are sampled at the same time (`prompts_at_once`).
- prefill: one layer over their prompts, in the MLP: 3·F and 3·D a position, and the dequantized matrix.
- sampling: V float32 logits for each row, twice (drawn from, and their cumulated or perturbed copy), and what decodes
  beside the base: the adapter in the compute dtype, its B's laid out for the base's matrices (`jgrpo.lora.fuse`), or
  the merged copy.
- full fine-tuning (`lora: null`): the weights, float32, take the adapter's place; base is the copy of their start that the loss
  compares them with; the rollout decodes with a copy in the compute dtype, of `rollout_weights: int8` with its matrices in 8 bits
  and a copy of the head in 8 bits beside it, and the head is cast to the compute dtype as a packed one is.
- runtime: workspaces of cuBLAS and cuDNN and compiled programs, 80 MB measured on an H200; none on a CPU.

The coefficients are those of the layer's own data flow; tests hold them to 10 % of what XLA plans for compiled steps.
"""

from dataclasses import dataclass
from functools import cache
from math import gcd, prod
from typing import Any

import jax
import jax.numpy as jnp

from jgrpo.checkpoints.hf import leaf_group_size
from jgrpo.config import QuantizationConfig, TrainConfig
from jgrpo.lora import module_shapes, own_modules
from jgrpo.models import ModelConfig, Transformer, base_shapes
from jgrpo.models.attention import QUERY_BLOCK
from jgrpo.rollout.weights import at_once, cache_bytes, fused_bytes, has_proposal_head, matrix_shapes, merged_bytes
from jgrpo.training.adam8bit import state_bytes
from jgrpo.training.forward import logprob_chunk, packed_head_chunks
from jgrpo.training.preference import CHOSEN_THEN_REJECTED, largest_divisor
from jgrpo.training.trained import keeps_start
from pallas_kernels.reference import row_block

RUNTIME_BYTES = 80_000_000
SCALE_BYTES = 2
"""Scales are bfloat16."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of everything that a step holds at once, or after each other."""

    base: int
    adapter: int
    optimizer: int
    runtime: int
    kv_cache: int
    prefill: int
    sampling: int
    gradients: int
    layer_inputs: int
    layer: int
    logprobs: int
    optimizing: int
    host: int
    """In the host's memory, not counted in the total."""
    is_full: bool = False
    """The whole model is trained: it stands in the adapter's place, and the base is what the loss compares it with."""

    @property
    def resident(self) -> int:
        """What lives through the whole step."""
        return self.base + self.adapter + self.optimizer + self.runtime

    @property
    def rollout(self) -> int:
        """The rollout's own."""
        return self.kv_cache + max(self.prefill, self.sampling)

    @property
    def update(self) -> int:
        """The update's own: the temporaries of its compiled program."""
        return self.gradients + max(self.layer_inputs + max(self.layer, self.logprobs), self.optimizing)

    @property
    def total(self) -> int:
        """Peak of a step."""
        return self.resident + max(self.rollout, self.update)

    def alive(self) -> dict[str, int]:
        """What exists at the peak, by the names of the fields: the terms that `total` adds up."""
        names = ["base", "adapter", "optimizer", "runtime"]
        if self.update >= self.rollout:
            in_backward = ["layer_inputs", "layer" if self.layer >= self.logprobs else "logprobs"]
            at_its_end = self.update == self.gradients + self.optimizing
            names += ["gradients", *(["optimizing"] if at_its_end else in_backward)]
        else:
            names += ["kv_cache", "prefill" if self.prefill > self.sampling else "sampling"]
        return {name: getattr(self, name) for name in names}

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark) in the order of the table."""
        peak = "update" if self.update >= self.rollout else "rollout"
        work = self.alive().keys()
        at_peak = lambda name: "update" + (": at its peak" if name in work else "")  # noqa: E731
        on_host = f", {self.host / 1e9:.2f} GB on the host" if self.host else ""
        return [
            ("base", self.base, "frozen copy of the start: reference" if self.is_full else "frozen weights"),
            ("weights", self.adapter, "trained, float32; a synced reference too")
            if self.is_full
            else ("adapter", self.adapter, "LoRA, float32; a critic's and a reference's too"),
            ("optimizer", self.optimizer, "AdamW's moments"),
            ("runtime", self.runtime, "workspaces of the libraries"),
            ("KV cache", self.kv_cache, "rollout"),
            ("prefill", self.prefill, "rollout"),
            ("sampling", self.sampling, f"rollout: logits, {'copy' if self.is_full else 'adapter or merged copy'}"),
            ("gradients", self.gradients, "update"),
            ("activations", self.layer_inputs, f"update: layer inputs{on_host}"),
            ("one layer", self.layer, at_peak("layer")),
            ("log-prob workspace", self.logprobs, at_peak("logprobs")),
            ("one leaf's update", self.optimizing, at_peak("optimizing")),
            ("total", self.total, f"peak in the {peak}"),
        ]


def plan_memory(config: TrainConfig, shape: ModelConfig, dtype: Any, prompt_width: int, cudnn: bool) -> MemoryPlan:
    """The plan of a run with these settings.

    Args:
        config: settings.
        shape: the model's.
        dtype: compute dtype.
        prompt_width: P that prompts are padded to; at most `max_prompt_length`.
        cudnn: whether attention is cuDNN's, as on a GPU in 16 bits.
    """
    model = Transformer(shape, config.lora, dtype)
    trained = trained_sizes(config, shape)
    forwards = 2 if config.algorithm.algorithm == "ppo" else 1
    layer_inputs, kept, peak = _activations(config, shape, jnp.dtype(dtype).itemsize, prompt_width, cudnn)
    eight_bits = config.optimizer.optimizer_bits == 8
    offloaded = config.training.offload and config.training.remat
    layers = shape.num_layers
    prompts = at_once(config.rollout, config.training.prompts_per_step)
    rows = prompts * config.rollout.num_generations
    wide = 3 * (shape.hidden_size + shape.intermediate_size) * jnp.dtype(dtype).itemsize
    return MemoryPlan(
        base=_start_bytes(config, shape, dtype) if config.lora.is_full else base_bytes(config, shape, dtype),
        adapter=4 * sum(trained) + reference_bytes(config, shape),
        optimizer=state_bytes(trained, config.optimizer.optimizer_bits),
        runtime=RUNTIME_BYTES if cudnn else 0,
        kv_cache=cache_bytes(model, config.rollout, (config.training.prompts_per_step, prompt_width)),
        prefill=prompts * prompt_width * wide + _dequantized(shape, jnp.dtype(dtype).itemsize),
        sampling=2 * rows * shape.vocab_size * 4 + _decoding_bytes(config, model),
        gradients=4 * sum(trained) + (0 if cudnn or eight_bits else 2 * sum(trained)),
        layer_inputs=forwards * ((2 if offloaded else layers) * layer_inputs + layers * kept)
        + _own_gradients(config, shape),
        layer=peak,
        logprobs=_logprob_bytes(config, model),
        optimizing=4 * max(trained) if eight_bits else 0,
        host=forwards * layers * layer_inputs if offloaded else 0,
        is_full=config.lora.is_full,
    )


def base_bytes(config: TrainConfig, shape: ModelConfig, dtype: Any) -> int:
    """Bytes of the frozen weights as the loader stores them; with `quantization: dynamic` at its whole budget."""
    return _base_bytes(config.quantization, shape, jnp.dtype(dtype).itemsize)


@cache  # a search over settings asks thousands of times about few bases
def _base_bytes(quantization: QuantizationConfig, shape: ModelConfig, item: int) -> int:
    def leaf(path: Any, array: Any) -> int:
        name = tuple(key.key for key in path)
        group = leaf_group_size(name, shape, quantization)
        if group is None:
            return prod(array.shape) * item
        return prod(array.shape) // 2 + prod(array.shape) // group * SCALE_BYTES

    total = sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(leaf, base_shapes(shape, jnp.float32))))
    return round(total * (1 + quantization.dynamic_budget)) if quantization.quantization == "dynamic" else total


def trained_sizes(config: TrainConfig, shape: ModelConfig) -> list[int]:
    """Elements of each leaf that is trained: the adapter's, and PPO's critic's, which is an adapter and a linear head."""
    adapter = adapter_sizes(config, shape)
    return [*adapter, *adapter, shape.hidden_size, 1] if config.algorithm.algorithm == "ppo" else adapter


def _own_gradients(config: TrainConfig, shape: ModelConfig) -> int:
    """Bytes of a microbatch's gradients beside their sum: of what is trained and no layer's."""
    shapes = base_shapes(shape) if config.lora.is_full else {}
    return 4 * sum(prod(leaf.shape) for name, leaf in shapes.items() if name != "layers")


def reference_bytes(config: TrainConfig, shape: ModelConfig) -> int:
    """Bytes of a reference policy's own adapter; one that is loaded is taken for one of the trained adapter's rank."""
    algorithm = config.algorithm
    has_one = algorithm.reference_adapter is not None or algorithm.reference_sync_steps > 0
    return 4 * sum(adapter_sizes(config, shape)) if has_one else 0


def microbatch(config: TrainConfig) -> tuple[int, int]:
    """(rows B of a microbatch, rows that a prompt is computed for); pairs of completions in online DPO, as many as it holds."""
    batch, group = config.training.microbatch_size, config.rollout.num_generations
    if config.algorithm.algorithm == "online_dpo":
        questions = config.training.prompts_per_step // config.algorithm.num_minibatches
        group = CHOSEN_THEN_REJECTED
        batch = group * largest_divisor(questions, batch // group)
    return batch, gcd(batch, group) if config.training.share_prompt else 1


def _start_bytes(config: TrainConfig, shape: ModelConfig, dtype: Any) -> int:
    """Bytes of the frozen copy that a whole model is compared with while it is trained."""
    return base_bytes(config, shape, dtype) if keeps_start(config.algorithm) else 0


def _decoding_bytes(config: TrainConfig, model: Transformer) -> int:
    """Bytes of what decodes beside the base or the trained weights."""
    form = config.rollout.rollout_weights
    rows = at_once(config.rollout, config.training.prompts_per_step) * config.rollout.num_generations
    packed = not config.lora.is_full and _has_packed_head(config, model.config)
    head = form == "int8" and has_proposal_head(model, config.rollout, rows, packed)
    if config.lora.is_full and jnp.dtype(model.dtype).itemsize < 4:
        whole = base_bytes(config, model.config, model.dtype)
        return whole - merged_bytes(model) + merged_bytes(model, form, head) if form == "int8" else whole
    if form in ("bf16", "int8"):
        return merged_bytes(model, form, head)
    return 0 if config.lora.is_full else fused_bytes(model)


def _has_packed_head(config: TrainConfig, shape: ModelConfig) -> bool:
    leaf = ("embed",) if shape.tie_embeddings else ("head",)
    return leaf_group_size(leaf, shape, config.quantization) is not None


def adapter_sizes(config: TrainConfig, shape: ModelConfig) -> list[int]:
    """Elements of each leaf of the policy: of the whole model, or B and A of every module, stacked over the layers."""
    if config.lora.is_full:
        return [prod(leaf.shape) for leaf in jax.tree.leaves(base_shapes(shape))]
    modules = module_shapes(shape)
    widths = [width for name in own_modules(config.lora.target_modules, shape) for width in modules[name]]
    return [shape.num_layers * config.lora.lora_rank * width for width in widths]


def _activations(
    config: TrainConfig, shape: ModelConfig, item: int, prompt_width: int, cudnn: bool
) -> tuple[int, int, int]:
    """(input of one layer, the products it keeps without remat, the peak of its backward) of one microbatch, in bytes."""
    (batch, group), length = microbatch(config), config.rollout.max_completion_length
    positions = batch // group * prompt_width + batch * length
    rows = batch * (prompt_width + length)
    width, mlp, heads = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    qkv = sum(shape.qkv_splits)
    attention = positions * (3 * width + qkv + heads) + rows * (qkv + heads)
    forward = attention + positions * (2 * width + 3 * mlp)
    in_mlp = forward + positions * (2 * width + 3 * mlp) + rows * heads
    in_attention = attention + positions * (width + heads + qkv) + rows * (qkv + 2 * heads)
    scores = 0 if cudnn else 3 * batch * shape.num_heads * min(QUERY_BLOCK, rows // batch) * (rows // batch) * 4
    kept = 0
    if not config.training.remat:
        kept = positions * (qkv + width + 2 * mlp)
        in_mlp, in_attention = positions * 4 * (width + mlp), in_attention - positions * (qkv + width)
    return positions * width * item, kept * item, max(in_mlp, in_attention) * item + scores + _dequantized(shape, item)


def _dequantized(shape: ModelConfig, item: int) -> int:
    """The most of a layer's matrix that exists in the compute dtype at the same time."""
    return max(row_block(out, width, item) * width for out, width in matrix_shapes(shape).values()) * item


def _logprob_bytes(config: TrainConfig, model: Transformer) -> int:
    item = jnp.dtype(model.dtype).itemsize
    completion = microbatch(config)[0] * config.rollout.max_completion_length
    chunk, width = logprob_chunk(model, config.training.logprob_workspace), model.config.hidden_size
    states = 2 * completion * width * item
    if not _has_packed_head(config, model.config):
        cast = model.config.vocab_size * width * item if config.lora.is_full and item < 4 else 0
        return min(chunk, completion) * model.config.vocab_size * (4 + item) + states + cast
    chunk, entries = packed_head_chunks(model.config, item, chunk)
    return min(chunk, completion) * (entries * (4 + item) + 8 * width) + entries * width * item + states
