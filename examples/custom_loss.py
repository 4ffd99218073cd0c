"""A loss of your own, through the pure functions and without the trainer: one GRPO step on a random tiny model.

A loss is a function (logprobs, log_ratio, advantages, mask) -> loss of each token; everything around it (KL, masks,
aggregation, microbatches) stays as it is.

    python examples/custom_loss.py
"""

import dataclasses

import jax
import jax.numpy as jnp

from jgrpo.algorithms import group_advantages, objective_from_config
from jgrpo.config import LoraConfig, TrainConfig
from jgrpo.lora import init_lora
from jgrpo.models import ModelConfig, Transformer, init_base
from jgrpo.rollout import Prompts, generate
from jgrpo.training import Batch, TrainState, grpo_step, make_optimizer


def squared_log_ratio_loss(logprobs, log_ratio, advantages, mask):
    """Policy gradient with a soft trust region instead of a clip: -A·r + ½ (log r)²."""
    return -advantages[..., None] * jnp.exp(log_ratio) + 0.5 * log_ratio**2


def main():
    defaults = TrainConfig()
    config = dataclasses.replace(
        defaults,
        rollout=dataclasses.replace(defaults.rollout, num_generations=4, max_completion_length=12),
        algorithm=dataclasses.replace(defaults.algorithm, num_iterations=2),
        optimizer=dataclasses.replace(defaults.optimizer, learning_rate=1e-2),
        training=dataclasses.replace(defaults.training, microbatch_size=8),
    )
    model_config = ModelConfig("llama", 64, 32, 64, 2, 4, 2, 8)  # vocabulary, width, MLP, layers, heads, kv heads, head
    lora_config = LoraConfig(lora_rank=4, lora_alpha=8.0)
    model, base = Transformer(model_config, lora_config), init_base(jax.random.key(0), model_config)
    optimizer = make_optimizer(config.optimizer, updates=100)
    state = TrainState.create(init_lora(jax.random.key(1), lora_config, model_config), optimizer, jax.random.key(2))
    objective = dataclasses.replace(objective_from_config(config.algorithm), loss=squared_log_ratio_loss)

    prompts = Prompts(tokens=jnp.array([[5, 6, 7], [8, 9, 0]]), lengths=jnp.array([3, 2]))
    for number in range(3):
        key = jax.random.fold_in(state.key, number)
        rollout = generate(model, base, state.lora, prompts, key, config.rollout, eos_ids=(1,), pad_id=0)
        rewards = jnp.mean(rollout.completion_tokens < 32, axis=-1)  # likes the lower half of the vocabulary
        batch = Batch(rollout=rollout, rewards=rewards, advantages=group_advantages(rewards, scale="group"))
        state, metrics = grpo_step(
            state, base, batch, model=model, optimizer=optimizer, config=config, objective=objective
        )
        print(f"step {number + 1}: reward {rewards.mean():.3f}, loss {metrics['loss']:+.4f}")
    return state


if __name__ == "__main__":
    main()
