"""Write merged matrices in four bits, in GPTQ's layout, which vLLM, SGLang and transformers (with GPTQModel) load.

The layout is that of `jgrpo.checkpoints.formats`: symmetric, so every stored zero-point is 7 (+ 1 by the format's rule), no
act-order. Levels are chosen against a layer's inputs (`jgrpo.checkpoints.calibrated`: GPTQ's own search), or without any they are
the nearest ones, the rule that jgrpo trains with. Scales are that rule's either way, so a model without an adapter, whose
base was int4 of the same group size, keeps its levels. Scales may be negative. They are float16 in the file, but vLLM casts
them to the model's dtype: in a bfloat16 model they are values of both.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jgrpo.checkpoints.calibrated import CalibratedRounding
from jgrpo.checkpoints.merged import Encoding, Rows, blocks_of
from jgrpo.checkpoints.names import MATRICES, Placement
from jgrpo.checkpoints.safetensors_io import SafetensorsWriter, TensorSpec
from jgrpo.errors import UserError
from jgrpo.quantization import quantize, unpack_nibbles

_INT32, _FLOAT16 = np.dtype(np.int32), np.dtype(np.float16)


class GPTQEncoding(Encoding):
    """Linear layers in four bits; embedding, head, norms and biases in `dtype`."""

    def __init__(self, dtype: np.dtype, group_size: int, rounding: CalibratedRounding | None = None) -> None:
        super().__init__(dtype)
        self.group_size, self.rounding = group_size, rounding
        self.scale_dtype = dtype if dtype == jnp.bfloat16 else _FLOAT16

    def config(self) -> dict[str, Any]:
        """What `config.json` says about it."""
        settings = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": 4,
            "group_size": self.group_size,
            "sym": True,
            "desc_act": False,
            "lm_head": False,
        }
        return super().config() | {"quantization_config": settings}

    def specs(self, placement: Placement) -> list[TensorSpec]:
        """`qweight` [K/8, N], `qzeros` [K/g, N/8], `scales` [K/g, N] and `g_idx` [K] of a linear layer.

        Raises UserError where its shape does not divide into words and groups.
        """
        if not _is_linear(placement):
            return super().specs(placement)
        (rows, width), groups = placement.shape, placement.shape[1] // self.group_size
        if rows % 8 or width % self.group_size:
            raise UserError(
                f"{placement.name} of shape {[rows, width]} does not divide into words of 8 outputs and groups of "
                f"{self.group_size} inputs; choose a smaller group size, or export 16 bits"
            )
        stem = placement.name.removesuffix("weight")
        return [
            TensorSpec(stem + "qweight", (width // 8, rows), _INT32),
            TensorSpec(stem + "qzeros", (groups, rows // 8), _INT32),
            TensorSpec(stem + "scales", (groups, rows), _FLOAT16),
            TensorSpec(stem + "g_idx", (width,), _INT32),
        ]

    def write(self, writer: SafetensorsWriter, placement: Placement, rows: Rows) -> None:
        """Write them; a matrix is in memory in its four bits."""
        if not _is_linear(placement):
            super().write(writer, placement, rows)
            return
        qweight, qzeros, scales, g_idx = (np.empty(spec.shape, spec.dtype) for spec in self.specs(placement))
        for start, stop, block in self._four_bits(placement, rows):
            nibbles = unpack_nibbles(block.packed, self.group_size)
            qweight[:, start:stop] = _words(nibbles).T
            scales[:, start:stop] = block.scales.T
        qzeros[:] = 0x77777777
        g_idx[:] = np.arange(g_idx.size) // self.group_size
        for values in (qweight, qzeros, scales, g_idx):
            writer.write(values)

    def _four_bits(self, placement: Placement, rows: Rows) -> Iterator[tuple[int, int, Any]]:
        """(start, stop, those rows as an `Int4Weight`)."""
        if self.rounding is not None:
            yield 0, placement.shape[0], self.rounding(placement, rows, self.group_size, self.scale_dtype)
            return
        for start, stop in blocks_of(placement):
            yield start, stop, quantize(rows(placement, start, stop), self.group_size, self.scale_dtype)


def _is_linear(placement: Placement) -> bool:
    return placement.leaf in MATRICES and placement.leaf[0] == "layers"


def _words(nibbles: np.ndarray) -> np.ndarray:
    """int32 words of eight neighbours along the last axis, the first in the lowest bits."""
    eights = nibbles.reshape(*nibbles.shape[:-1], -1, 8).astype(np.uint32)
    return (eights << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.int32)
