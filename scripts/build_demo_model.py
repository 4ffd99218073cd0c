"""Make the checkpoint that jgrpo ships as its demo model (`jgrpo/demo/model`).

A Qwen2 of under a million parameters is trained from scratch, supervised, on worked Countdown solutions
(`jgrpo.demo.worked_solutions`) over the training split only. The last part of the run rounds the linear layers to
int4 in the forward pass (straight-through gradients), so that the model survives the quantization that the demo
applies to it. Same seed, same machine: same bytes.

    python scripts/build_demo_model.py [--output jgrpo/demo/model] [--seed 0] [--batches 6000]
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from jgrpo.checkpoints.safetensors_io import write_tensors
from jgrpo.data.countdown import problems, prompt_text
from jgrpo.demo.tokenizer import build_tokenizer
from jgrpo.demo.worked_solutions import Writer, draw_tries, solution_text
from jgrpo.models import ModelConfig, Transformer, init_base, model_config_from_hf
from jgrpo.quantization import dequantize, quantize

GROUP_SIZE = 64
MATRICES = ("qkv", "out", "gate_up", "down")
WIDTHS = (32, 64, 128)
"""Row lengths that examples are sorted into; one compiled program each."""


def hf_config(vocab_size: int, eos_id: int, args: argparse.Namespace) -> dict[str, Any]:
    """The `config.json`."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": args.width,
        "intermediate_size": args.mlp_width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "torch_dtype": "bfloat16",
    }


class Examples:
    """Endless (prompt ids, completion ids) pairs, from one random stream."""

    def __init__(self, seed: int, writer: Writer) -> None:
        self.rng = np.random.default_rng(seed)
        self.tokenizer = build_tokenizer()
        self.writer = writer
        self.problems = problems("train")

    def draw(self, count: int) -> list[tuple[list[int], list[int]]]:
        """`count` examples: a problem with its numbers in random order, and one worked solution."""
        prompts, completions = [], []
        for index in self.rng.integers(len(self.problems), size=count):
            numbers, target = self.problems[index]
            numbers = tuple(numbers[k] for k in self.rng.permutation(3))
            prompts.append(f"<|user|>{prompt_text(numbers, target)}<|end|><|assistant|>")
            completions.append(solution_text(draw_tries(numbers, target, self.writer, self.rng), target) + "<|end|>")
        encode = partial(self.tokenizer, add_special_tokens=False)
        return list(zip(encode(prompts)["input_ids"], encode(completions)["input_ids"], strict=True))

    def batches(self, tokens_per_batch: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens [B, T], lengths [B], loss mask [B, T]) with T one of WIDTHS and B·T about the same."""
        waiting: dict[int, list] = {width: [] for width in WIDTHS}
        while True:
            for example in self.draw(512):
                total = len(example[0]) + len(example[1])
                width = next(width for width in WIDTHS if total <= width)
                waiting[width].append(example)
                if len(waiting[width]) == tokens_per_batch // width:
                    yield _pad(waiting[width], width)
                    waiting[width] = []


def _pad(examples: list, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = np.zeros((len(examples), width), np.int32)
    mask = np.zeros((len(examples), width), np.float32)
    lengths = np.zeros(len(examples), np.int32)
    for row, (prompt, completion) in enumerate(examples):
        lengths[row] = len(prompt) + len(completion)
        tokens[row, : lengths[row]] = prompt + completion
        mask[row, len(prompt) : lengths[row]] = 1
    return tokens, lengths, mask


def fake_quantize(base: dict[str, Any]) -> dict[str, Any]:
    """The matrices rounded to int4 in the forward, identity in the backward (straight-through estimator)."""

    def rounded(w: jax.Array) -> jax.Array:
        return w + jax.lax.stop_gradient(dequantize(quantize(w, GROUP_SIZE)) - w)

    layers = {name: rounded(w) if name in MATRICES else w for name, w in base["layers"].items()}
    return {**base, "layers": layers}


def loss(
    base: dict[str, Any], tokens: jax.Array, lengths: jax.Array, mask: jax.Array, *, model: Transformer, qat: bool
):
    """Mean cross-entropy of the completion tokens."""
    base = fake_quantize(base) if qat else base
    hidden = model.apply({"params": base}, tokens, lengths)
    logits = model.apply({"params": base}, hidden[:, :-1], method=Transformer.logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses * mask[:, 1:]) / jnp.sum(mask[:, 1:])


def train(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """The supervised run."""
    model = Transformer(config)
    base = init_base(jax.random.key(args.seed), config)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, min(100, args.batches // 10), args.batches, 1e-5
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    state = optimizer.init(base)

    @partial(jax.jit, static_argnames="qat", donate_argnums=(0, 1))
    def step(base, state, tokens, lengths, mask, qat):
        value, grads = jax.value_and_grad(loss)(base, tokens, lengths, mask, model=model, qat=qat)
        updates, state = optimizer.update(grads, state, base)
        return optax.apply_updates(base, updates), state, value

    start, recent = time.time(), []
    batches = Examples(args.seed, args.writer).batches(args.tokens_per_batch)
    for index, batch in zip(range(args.batches), batches, strict=False):
        base, state, value = step(base, state, *batch, qat=index >= args.batches * (1 - args.qat_share))
        recent.append(float(value))
        if (index + 1) % 250 == 0:
            print(f"{index + 1:6d}  loss {np.mean(recent):.4f}  {time.time() - start:6.0f} s", flush=True)
            recent = []
    return base


def hf_tensors(base: dict[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """The tree under transformers' names, in bfloat16."""
    layers = base["layers"]
    tensors = {"model.embed_tokens.weight": base["embed"], "model.norm.weight": base["final_norm"]}
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        q, k, v = np.split(np.asarray(layers["qkv"][index]), np.cumsum(config.qkv_splits)[:2])
        q_bias, k_bias, v_bias = np.split(np.asarray(layers["qkv_bias"][index]), np.cumsum(config.qkv_splits)[:2])
        gate, up = np.split(np.asarray(layers["gate_up"][index]), 2)
        for name, value in {
            "input_layernorm.weight": layers["input_norm"][index],
            "post_attention_layernorm.weight": layers["post_norm"][index],
            "self_attn.q_proj.weight": q,
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.q_proj.bias": q_bias,
            "self_attn.k_proj.bias": k_bias,
            "self_attn.v_proj.bias": v_bias,
            "self_attn.o_proj.weight": layers["out"][index],
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": layers["down"][index],
        }.items():
            tensors[prefix + name] = value
    return {name: np.asarray(value).astype(ml_dtypes.bfloat16) for name, value in tensors.items()}


def main() -> None:
    """Train and write the checkpoint directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "jgrpo/demo/model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, default=7000)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--qat-share", type=float, default=0.3, help="last part of the run that sees int4 weights")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--mlp-width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--patient", type=float, default=Writer.patient)
    parser.add_argument("--give-up", type=float, default=Writer.give_up)
    parser.add_argument("--insight", type=float, default=Writer.insight)
    args = parser.parse_args()
    args.writer = Writer(args.patient, args.give_up, args.insight)

    tokenizer = build_tokenizer()
    hf = hf_config(len(tokenizer), tokenizer.eos_token_id, args)
    config = model_config_from_hf(hf)
    base = train(config, args)
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.output)
    write_tensors(args.output / "model.safetensors", hf_tensors(base, config))
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "do_sample": True}
    for name, content in {"config.json": hf, "generation_config.json": generation}.items():
        (args.output / name).write_text(json.dumps(content, indent=2) + "\n")
    print(f"{args.output}: {sum(p.stat().st_size for p in args.output.iterdir()) / 2**20:.2f} MB")


if __name__ == "__main__":
    main()
