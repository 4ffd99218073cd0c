"""The memory plan: against what XLA plans, against what an H200 measured, and what the commands make of it."""

import dataclasses
import io
import json
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jgrpo import plan as command
from jgrpo.cli import resolve_config
from jgrpo.config import LINEAR_MODULES, TrainConfig
from jgrpo.errors import UserError
from jgrpo.lora import WEIGHTS, init_lora
from jgrpo.models import PROPOSAL_HEAD, KVCache, ModelConfig, Transformer, base_shapes
from jgrpo.quantization import Int4Weight
from jgrpo.rollout.weights import decoded
from jgrpo.settings import flatten
from jgrpo.training import TrainState
from jgrpo.training.algorithms import ALGORITHMS
from jgrpo.training.compiled_memory import batch_shapes
from jgrpo.training.fitting import alternatives, best_fit, check_memory, parse_bytes, refusal, setting_flags
from jgrpo.training.memory import RUNTIME_BYTES, plan_memory
from tests.training.setup import cached_optimizer, settings

SHAPE = ModelConfig("qwen2", 4096, 256, 1024, 6, 4, 2, 64, qkv_bias=True, tie_embeddings=True)
PROMPT = 64
QWEN = dict(
    model_type="qwen2",
    vocab_size=151_936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    hidden_act="silu",
    tie_word_embeddings=True,
)


def config(**values):
    small = dict(num_generations=4, max_completion_length=192, lora_rank=8, microbatch_size=4, logprob_workspace=1.0)
    return settings(**{**small, "group_size": 64, "target_modules": ("q_proj", "down_proj"), **values})


@cache
def compiled(config):
    """XLA's own figures for a step, from shapes alone."""
    optimizer = cached_optimizer(config.optimizer)
    base, lora = _base_and_trained(config)
    algorithm = ALGORITHMS[config.algorithm.algorithm]
    critic = jax.eval_shape(lambda: (algorithm.init_critic or (lambda *_: {}))(jax.random.key(2), config.lora, SHAPE))
    state = jax.eval_shape(
        lambda *trained: TrainState.create(trained[0], optimizer, jax.random.key(1), trained[1]), lora, critic
    )
    if config.algorithm.reference_sync_steps:
        state = state.replace(reference=lora)
    batch = batch_shapes(config, PROMPT)
    model = Transformer(SHAPE, config.lora)
    how = dict(model=model, optimizer=optimizer, config=config)
    return algorithm.step.lower(state, base, batch, **how).compile().memory_analysis()


def _base_and_trained(config):
    base = base_shapes(SHAPE, jnp.float32)
    if config.lora.is_full:
        return (base if config.algorithm.beta else {}), {WEIGHTS: base}
    base["layers"] = {name: _packed(leaf, name, config) for name, leaf in base["layers"].items()}
    if not config.quantization.skip_modules:
        base["embed"] = _packed(base["embed"], "down", config)
    return base, jax.eval_shape(lambda: init_lora(jax.random.key(0), config.lora, SHAPE))


def _packed(leaf, name, config):
    if name not in ("qkv", "out", "gate_up", "down"):
        return leaf
    *lead, width = leaf.shape
    groups = jax.ShapeDtypeStruct((*lead, width // config.quantization.group_size), jnp.bfloat16)
    return Int4Weight(jax.ShapeDtypeStruct((*lead, width // 2), jnp.uint8), groups)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"microbatch_size": 8, "share_prompt": False},
        {"remat": False},
        {"logprob_workspace": 100.0, "microbatch_size": 16},
        {"target_modules": LINEAR_MODULES, "lora_rank": 64},
        {"target_modules": LINEAR_MODULES, "lora_rank": 64, "optimizer_bits": 8},
        {"skip_modules": (), "logprob_workspace": 60.0, "microbatch_size": 16},
        {"length_buckets": 2, "microbatch_size": 8},
        {"algorithm": "ppo", "lora_rank": 64},
        {"algorithm": "ppo", "num_iterations": 2, "beta": 0.1},
        {"algorithm": "online_dpo", "microbatch_size": 8},
        {"algorithm": "online_dpo", "microbatch_size": 2, "prompts_per_step": 6},
        {"beta": 0.1, "reference_sync_steps": 5, "lora_rank": 64},
        {"lora": None, "quantization": "none"},
        {"lora": None, "quantization": "none", "optimizer_bits": 8, "beta": 0.1},
    ],
    ids=[
        "shared prompt",
        "separate rows",
        "no remat",
        "large batch",
        "large adapter",
        "8-bit moments",
        "packed head",
        "packed completions",
        "ppo",
        "ppo off policy",
        "dpo",
        "dpo, a pair",
        "reference",
        "all weights",
        "all weights, 8 bits",
    ],
)
def test_plan_is_what_xla_plans(values):
    chosen = config(**values)
    plan, analysis = plan_memory(chosen, SHAPE, jnp.float32, PROMPT, cudnn=False), compiled(chosen)
    assert plan.update == pytest.approx(analysis.temp_size_in_bytes, rel=0.1)
    arguments = plan.base + plan.adapter + plan.optimizer
    assert arguments == pytest.approx(analysis.argument_size_in_bytes, rel=0.02)


@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
def test_cache_is_the_rollouts(kv_cache):
    chosen = config(kv_cache=kv_cache)
    prompts = jax.ShapeDtypeStruct((6, 4, 2, PROMPT, 64), jnp.float32)
    made = jax.eval_shape(
        lambda kv: KVCache.create(
            (kv, kv), jnp.zeros(4, jnp.int32), 4, 192, *([] if kv_cache == "auto" else [kv_cache])
        ),
        prompts,
    )
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
    plan = plan_memory(chosen, SHAPE, jnp.float32, PROMPT, cudnn=False)
    assert plan.kv_cache == pytest.approx(expected, rel=1e-4)


def test_all_weights_are_counted():
    """Bytes a parameter: 4 for weights, 2.03 for moments, 4 for gradients, 2 for the copy that decodes, 2 for the reference."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(base_shapes(SHAPE)))
    full = plan_memory(
        config(lora=None, quantization="none", optimizer_bits=8, beta=0.1), SHAPE, jnp.bfloat16, 64, True
    )
    assert (full.adapter, full.gradients, full.base) == (4 * parameters, 4 * parameters, 2 * parameters)
    assert full.optimizer == pytest.approx(2.03125 * parameters, rel=0.01)
    rows = full.rows()
    assert ("weights", 4 * parameters, "trained, float32; a synced reference too") in rows
    without = plan_memory(config(lora=None, quantization="none"), SHAPE, jnp.bfloat16, 64, True)
    assert (without.base, without.optimizer) == (0, 8 * parameters)
    sampled = 2 * 16 * SHAPE.vocab_size * 4
    assert without.sampling - sampled == 2 * parameters
    synced = config(lora=None, quantization="none", beta=0.1, reference_sync_steps=4)
    plan = plan_memory(synced, SHAPE, jnp.bfloat16, 64, True)
    assert (plan.base, plan.adapter) == (0, 8 * parameters)


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize(
    "values",
    [{}, {"skip_modules": ()}, {"top_p": 0.9}, {"lora": None, "quantization": "none"}],
    ids=["adapter", "packed head", "top-p", "all weights"],
)
def test_what_decodes_is_counted(values, form):
    """Of all weights, what is cast beside the matrices too; of a copy in 8 bits the head that proposes tokens."""
    chosen = config(rollout_weights=form, **values)
    model, trained = Transformer(SHAPE, chosen.lora, jnp.bfloat16), _base_and_trained(chosen)
    made = jax.eval_shape(lambda *weights: decoded(model, *weights, chosen.rollout, (4, PROMPT)), *trained)
    has_head = form == "int8" and not {"skip_modules", "top_p"} & values.keys()
    assert (PROPOSAL_HEAD in made.merged) == has_head
    cast = [leaf for leaf in jax.tree.leaves(made.base) if leaf.dtype == jnp.bfloat16 and chosen.lora.is_full]
    copies = sum(leaf.size * leaf.dtype.itemsize for leaf in [*jax.tree.leaves(made.merged), *cast])
    plan = plan_memory(chosen, SHAPE, jnp.bfloat16, PROMPT, cudnn=True)
    assert plan.sampling == 2 * 16 * SHAPE.vocab_size * 4 + copies


def qwen(tmp_path, **values):
    (tmp_path / "config.json").write_text(json.dumps(QWEN | values))
    return str(tmp_path)


def qwen_plan(tmp_path, **values):
    """Of Qwen2.5-1.5B, 8 x 8 rows of 256 + 512 tokens, as docs/benchmarks.md has them."""
    rows = dict(num_generations=8, max_completion_length=512, prompts_per_step=8, microbatch_size=8)
    shape = command.load_model_config(qwen(tmp_path))
    return plan_memory(settings(**rows, **values), shape, jnp.bfloat16, 256, cudnn=True)


def test_measured_on_an_h200(tmp_path):
    """Arguments of the update, peak of the rollout, and the update's as compiled for an H200."""
    plan = qwen_plan(tmp_path, target_modules=LINEAR_MODULES, lora_rank=32)
    assert plan.base + plan.adapter + plan.optimizer == pytest.approx(1.61e9, rel=0.01)
    assert plan.resident + plan.rollout == pytest.approx(2.93e9, rel=0.1)
    assert plan.resident + plan.update == pytest.approx(2.721e9 + RUNTIME_BYTES, rel=0.1)


def test_one_leafs_update_can_be_the_peak(tmp_path):
    """All weights of Qwen2.5-1.5B with moments of 8 bits: temporaries of the update as compiled for an H200."""
    plan = qwen_plan(tmp_path, lora=None, quantization="none", optimizer_bits=8)
    assert "optimizing" in plan.alive()
    assert sum(plan.alive().values()) == plan.total
    assert plan.update == pytest.approx(9.258e9, rel=0.03)
    assert ("one leaf's update", plan.optimizing, "update: at its peak") in plan.rows()


@pytest.mark.parametrize(
    "values", [{}, {"logprob_workspace": 500.0}, {"max_completion_length": 8192, "microbatch_size": 1}]
)
def test_what_is_alive_at_the_peak_adds_up_to_it(values):
    plan = plan_memory(config(**values), SHAPE, jnp.bfloat16, PROMPT, cudnn=True)
    assert sum(plan.alive().values()) == plan.total
    assert ("kv_cache" in plan.alive()) == (plan.rollout > plan.update)
    assert ("logprobs" in plan.alive()) == (plan.update >= plan.rollout and plan.logprobs > plan.layer)


def test_offload_moves_the_layer_inputs_to_the_host():
    kept, moved = (
        plan_memory(config(offload=offload), SHAPE, jnp.float32, PROMPT, cudnn=False) for offload in (False, True)
    )
    assert kept.host == 0
    assert moved.host == kept.layer_inputs
    assert kept.layer_inputs - moved.layer_inputs == pytest.approx(4 / 6 * kept.layer_inputs)


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("7.5 GiB", 7.5 * 2**30), ("512mb", 512 * 10**6), ("1000", 1000)]
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8 parsecs", "-3GB", "0GB", "GB"])
def test_what_is_no_amount(text):
    with pytest.raises(UserError, match="expected something like 8GB"):
        parse_bytes(text)


def of(config):
    return plan_memory(config, SHAPE, jnp.bfloat16, PROMPT, cudnn=True)


def test_best_fit_changes_nothing_that_fits_and_never_the_batch():
    chosen = config(prompts_per_step=4, microbatch_size=16, logprob_workspace=32.0)
    assert best_fit(chosen, of, of(chosen).total) == chosen
    assert best_fit(chosen, of, 1) is None
    options = list(alternatives(chosen))
    assert options[0] == chosen
    assert {option.training.prompts_per_step for option in options} == {4}
    assert all(option.training.prompts_per_step * 4 % option.training.microbatch_size == 0 for option in options)
    # A little less than it needs: only the microbatch shrinks.
    best = best_fit(chosen, of, of(chosen).total - 1)
    assert setting_flags(chosen, best).startswith("--microbatch-size")
    assert of(best).total < of(chosen).total


def test_best_fit_samples_fewer_prompts_then_takes_8_bits_then_quantizes_more():
    """Where the cache of the rollout is what is large: each limit is just below what the settings before it need."""
    chosen = config(prompts_per_step=4, microbatch_size=16, max_completion_length=4096, num_generations=64)
    limit, seen = of(chosen).total, []
    while (best := best_fit(chosen, of, limit)) is not None:
        rollout, packed = best.rollout, best.quantization.skip_modules == ()
        seen.append((rollout.prompts_at_once, rollout.kv_cache, best.optimizer.optimizer_bits, packed))
        limit = of(best).total - 1
    assert list(dict.fromkeys(seen)) == [
        *[(at_once, "auto", 32, False) for at_once in (None, 2, 1)],
        (1, "int8", 32, False),
        (1, "int8", 8, False),
        (1, "int8", 32, True),
        (1, "int8", 8, True),
    ]
    changed = dataclasses.replace(chosen, quantization=dataclasses.replace(chosen.quantization, skip_modules=()))
    assert setting_flags(chosen, changed) == "--skip-modules"


CARDS = [
    (4, "qwen2", 512, (151_936, 1536, 8960, 28, 12, 2, 128), True),
    (8, "llama", 512, (128_256, 4096, 14_336, 32, 32, 8, 128), False),
    (12, "llama", 512, (100_352, 5120, 17_920, 40, 40, 10, 128), False),
    (24, "qwen2", 512, (152_064, 5120, 27_648, 64, 40, 8, 128), False),
    (48, "llama", 512, (128_256, 8192, 28_672, 80, 64, 8, 128), False),
    (48, "llama", 19_744, (128_256, 4096, 14_336, 32, 32, 8, 128), False),
]
"""GB of a card, family, new tokens, shape and tied embeddings of what it must train."""


@pytest.mark.parametrize(
    ("card", "family", "length", "sizes", "tied"), CARDS, ids=["1.5B", "8B", "14B", "32B", "70B", "8B, 20,000 tokens"]
)
def test_every_card_has_settings_that_fit(card, family, length, sizes, tied):
    """8 prompts x 8 completions, prompt 256, LoRA of rank 32 on all linear layers; 0.6 GB of the card are the context's."""
    shape = ModelConfig(family, *sizes, qkv_bias=family == "qwen2", tie_embeddings=tied)
    chosen = TrainConfig()
    chosen = dataclasses.replace(chosen, rollout=dataclasses.replace(chosen.rollout, max_completion_length=length))

    def plan(option):
        return plan_memory(option, shape, jnp.bfloat16, 256, cudnn=True)

    best = best_fit(chosen, plan, int((card - 0.6) * 1e9))
    assert best is not None
    assert (best.training.prompts_per_step, best.rollout.num_generations, best.lora.lora_rank) == (8, 8, 32)
    assert plan(best).total <= (card - 0.6) * 1e9
    # A card of a fraction of the size has none: the frozen weights alone are larger.
    assert best_fit(chosen, plan, plan(best).base // 2) is None


def run(capsys, *argv):
    code = command.main(list(argv))
    return code, capsys.readouterr().out


def test_command_needs_no_weights_and_no_gpu(tmp_path, capsys):
    how = ["--model", qwen(tmp_path), "--max-prompt-length", "256"]
    code, out = run(capsys, *how)
    assert code == 0
    for row in ("base", "adapter", "optimizer", "KV cache", "activations", "log-prob workspace", "total"):
        assert row in out
    assert " 1.163 " in out
    code, out = run(capsys, *how, "--device-memory", "24GB")
    assert (code, "fits 24GB" in out) == (0, True)
    code, out = run(capsys, *how, "--device-memory", "2.5GB")
    assert code == 0
    assert "--microbatch-size" in out
    assert out.count("total") == 2


def test_command_refuses_what_never_fits(tmp_path):
    with pytest.raises(UserError, match=r"needs .* GB of 0.50 GB: no settings fit"):
        command.main(["--model", qwen(tmp_path), "--device-memory", "500MB"])
    with pytest.raises(UserError, match="expected something like 8GB"):
        command.main(["--model", qwen(tmp_path), "--device-memory", "much"])


def test_training_is_refused_with_the_table(monkeypatch):
    chosen = config(microbatch_size=16)
    needs, text = of(chosen).total, io.StringIO()
    stats = {"bytes_limit": needs + 1000, "bytes_in_use": 0}
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    console = Console(file=text, width=100)
    check_memory(chosen, SHAPE, jnp.bfloat16, PROMPT, console)
    assert text.getvalue() == ""
    stats["bytes_in_use"] = 2000
    with pytest.raises(UserError, match=r"what fits is --microbatch-size"):
        check_memory(chosen, SHAPE, jnp.bfloat16, PROMPT, console)
    assert "log-prob workspace" in text.getvalue()


def test_a_cpu_is_not_checked():
    huge = dataclasses.replace(SHAPE, num_layers=10_000)
    check_memory(config(), huge, jnp.float32, PROMPT, Console(file=io.StringIO()))


def test_one_line_says_what_to_do():
    assert refusal(config(), of(config()), 10**6, None).count("\n") == 0


def test_the_dial_sets_what_is_not_set():
    model = {"model": "some/model"}
    smallest = resolve_config(overrides=model | {"memory": "smallest"}).training
    assert (smallest.microbatch_size, smallest.remat, smallest.offload) == (1, True, True)
    fast = resolve_config(overrides=model | {"memory": "fast", "microbatch_size": 4}).training
    assert (fast.microbatch_size, fast.remat) == (4, False)
    default, balanced = (flatten(resolve_config(overrides=model | more)) for more in ({}, {"memory": "balanced"}))
    assert default == balanced
