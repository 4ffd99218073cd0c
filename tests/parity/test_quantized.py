"""An int4 base is the checkpoint with every matrix replaced by its dequantized values, and nothing else."""

import jax.numpy as jnp
import numpy as np
import torch

from jgrpo.checkpoints.hf import load_base
from jgrpo.checkpoints.names import placements
from jgrpo.config import QuantizationConfig
from jgrpo.quantization import Int4Weight, dequantize

from .conftest import assert_same_logits, load_theirs, make_tokens, our_logits, their_logits


def test_int4_logits_equal_transformers_on_dequantized_weights(case):
    quantization = QuantizationConfig(group_size=32, skip_modules=())
    base = load_base(case.path, case.config, quantization, jnp.float32)
    theirs = load_theirs(case.path)
    state = dict(theirs.named_parameters())
    for leaf, placed in placements(case.config).items():
        stored = base["layers"][leaf[1]] if leaf[0] == "layers" else base[leaf[0]]
        dense = np.asarray(dequantize(stored) if isinstance(stored, Int4Weight) else stored)
        for placement in placed:
            matrix = dense if placement.layer is None else dense[placement.layer]
            ours = torch.tensor(matrix[placement.start : placement.stop])
            with torch.no_grad():
                _assert_rounded(state[placement.name], ours, exact=not isinstance(stored, Int4Weight))
                state[placement.name].copy_(ours)
    tokens, lengths = make_tokens()
    ours = our_logits(case.model(), base, {}, tokens, lengths)
    assert_same_logits(ours, their_logits(theirs, tokens, lengths))


def _assert_rounded(original: torch.Tensor, ours: torch.Tensor, exact: bool) -> None:
    """Within half a step of the group's grid: 16 levels, the extreme element on the end of the range."""
    if exact:
        assert torch.equal(original, ours)
        return
    groups = original.reshape(original.shape[0], -1, 32)
    step = groups.abs().amax(-1, keepdim=True) / 8
    error = (ours.reshape(groups.shape) - groups).abs()
    # The element opposite the extreme is clipped at 7 steps, by at most one step; the scale itself is a bfloat16.
    assert (error <= step * 1.02 + 1e-6).all()
    assert (error > step * 0.55).float().mean() < 0.05
    assert not torch.equal(original, ours)


def test_skip_modules_keeps_fused_partners_unquantized(case):
    quantization = QuantizationConfig(group_size=32, skip_modules=("k_proj", "lm_head"))
    base = load_base(case.path, case.config, quantization, jnp.float32)
    quantized = {name for name, leaf in base["layers"].items() if isinstance(leaf, Int4Weight)}
    assert quantized == {"out", "gate_up", "down"}
    # A tied embedding is the head too, and the head is skipped.
    assert isinstance(base["embed"], Int4Weight) != case.config.tie_embeddings
    assert "head" not in base or not isinstance(base["head"], Int4Weight)
