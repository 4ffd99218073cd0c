"""AdamW with warm-up, a schedule and clipping of the global gradient norm, from `OptimizerConfig`.

The learning rate is injected into the optimizer's state (`optax.inject_hyperparams`), so the rate that an
update used is read from the state rather than computed a second time.
"""

import optax

from jgrpo.config import OptimizerConfig
from jgrpo.training.adam8bit import scale_by_adam_8bit


def learning_rate_schedule(config: OptimizerConfig, updates: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_steps` updates, then constant, or decay to 0 at `updates`."""
    peak, decay = config.learning_rate, max(updates - config.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay),
    }[config.lr_schedule]()
    if config.warmup_steps == 0:
        return after
    # The first update gets peak / (warmup_steps + 1), not 0: an update that does nothing wastes a rollout.
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW, its moments in `optimizer_bits`.

    Args:
        config: hyperparameters.
        updates: optimizer steps of the whole run, the end of the decay.
    """
    adamw = optax.adamw if config.optimizer_bits == 32 else adamw_8bit
    static = (
        ("b1", "b2", "eps", "eps_root", "weight_decay") if config.optimizer_bits == 32 else ("b1", "b2", "weight_decay")
    )
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.inject_hyperparams(adamw, static_args=static)(
            learning_rate=learning_rate_schedule(config, updates),
            b1=config.adam_b1,
            b2=config.adam_b2,
            weight_decay=config.weight_decay,
        ),
    )


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule, b1: float, b2: float, weight_decay: float
) -> optax.GradientTransformation:
    """`optax.adamw` with moments in 8 bits."""
    return optax.chain(
        scale_by_adam_8bit(b1, b2), optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    )
