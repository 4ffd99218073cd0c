"""A run compiles in its first steps and never again."""

import jax
import pytest

from jgrpo.training import grpo_step
from jgrpo.training.guards import CompileCounter
from tests.training.setup import MODEL, batch, settings, state, tiny_base, trained_lora


@pytest.mark.parametrize("offload", [False, True])
def test_an_update_is_one_program(offload):
    """Also with arrays in host memory, after which outputs are bound to their device where inputs may not have been."""
    config = settings(offload=offload, microbatch_size=4, max_grad_norm=3.0)
    current, optimizer = state(trained_lora(), config)
    data, base = jax.block_until_ready((batch(), tiny_base()))
    compilations = CompileCounter()
    for _ in range(3):
        current, metrics = grpo_step(current, base, data, model=MODEL, optimizer=optimizer, config=config)
    jax.block_until_ready(metrics)
    compilations.close()
    assert compilations.count == 1
