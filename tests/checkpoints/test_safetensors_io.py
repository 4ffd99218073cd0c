"""The reader and writer against the safetensors package, and damaged files."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from jgrpo.checkpoints.safetensors_io import (
    SafetensorsWriter,
    TensorSpec,
    read_header,
    read_rows,
    row_blocks,
    write_tensors,
)
from jgrpo.errors import UserError

BF16 = np.dtype(ml_dtypes.bfloat16)


def test_files_of_the_package_are_read_whole_and_by_rows(tmp_path):
    tensors = {
        "a": torch.randn(7, 3, dtype=torch.bfloat16),
        "b": torch.randn(5, dtype=torch.float16),
        "c": torch.randn(4, 2, 3),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    index = read_header(tmp_path / "x.safetensors")
    assert index.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.float().numpy()
        assert index[name].shape == tensor.shape
        np.testing.assert_array_equal(read_rows(index[name]).astype(np.float32), expected)
        np.testing.assert_array_equal(read_rows(index[name], 1, 4).astype(np.float32), expected[1:4])


def test_files_written_in_pieces_are_read_by_the_package(tmp_path):
    a, b = np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(5).astype(BF16)
    specs = [TensorSpec("a", a.shape, a.dtype), TensorSpec("b", b.shape, b.dtype)]
    with SafetensorsWriter(tmp_path / "x.safetensors", specs) as writer:
        for start, stop in row_blocks(6, 8, block_bytes=16):
            writer.write(a[start:stop])
        writer.write(b)
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(loaded["a"], a)
    np.testing.assert_array_equal(loaded["b"].float(), b.astype(np.float32))


def test_a_tensor_that_was_not_written_is_an_error(tmp_path):
    with (
        pytest.raises(ValueError, match="8 bytes"),
        SafetensorsWriter(tmp_path / "x", [TensorSpec("a", (2,), np.dtype("f4"))]),
    ):
        pass


@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("block_bytes", [1, 16, 1000])
def test_row_blocks_cover_every_row_once(rows, block_bytes):
    covered = [row for start, stop in row_blocks(rows, 8, block_bytes) for row in range(start, stop)]
    assert covered == list(range(rows))


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"a": np.zeros((4, 4), np.float32)})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"x\.safetensors.*truncated.*download it again"):
        read_header(file)


@pytest.mark.parametrize(
    "header", [b"not json at all", b'{"a": {"dtype": "F32"}}', b"[1, 2]", b'{"a": 3}', b"\xff\xfe\x00\x00"]
)
def test_a_corrupt_header_is_named(tmp_path, header):
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"x\.safetensors.*corrupt"):
        read_header(file)


def test_offsets_that_disagree_with_the_shape_are_corrupt(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.zeros((4, 4), np.float32)}, file)
    file.write_bytes(file.read_bytes().replace(b"[4,4]", b"[4,5]"))
    with pytest.raises(UserError, match="corrupt"):
        read_header(file)
