"""Files that hold no weights are told by what they hold; what a file is, its first bytes say, not its name."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bcosification
from bcosification.weights_files import read_weights


@pytest.mark.parametrize(
    "content, kind",
    [
        (b"hello, this is a note\nof two lines\n", "a text file, which begins 'hello, this is a note'$"),
        (b'{"lr": 1}', "a text file, which begins '{\"lr\": 1}'$"),
        ("é".encode() * 150, "a text file, which begins 'éé"),
        (b"\n\n", "a text file, which begins ''$"),
        (b"", "an empty file$"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS, whose file"),
        (b"\n<!DOCTYPE html><html><title>404</title>", "a web page$"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file$"),
        (b"\x1f\x8b\x08" + bytes(50), "a compressed archive$"),
        (b"\x93NUMPY\x01\x00" + bytes(50), "a NumPy array$"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pth", ".txt", ".safetensors"])
def test_other_kinds_of_files_are_named(content, kind, suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    for read in (read_weights, bcosification.load_peer):
        with pytest.raises(ValueError, match=rf"file{suffix}: expected a file of tensors .*, got {kind}"):
            read(path)


def test_saved_arrays_are_told(tmp_path):
    np.save(tmp_path / "weights.npy", np.zeros(3))
    with pytest.raises(ValueError, match="weights.npy: expected a file of tensors .*, got a NumPy array$"):
        read_weights(tmp_path / "weights.npy")


def test_safetensors_under_another_name_are_read(tmp_path):
    state = {"a": torch.rand(3), "b": torch.rand(2, 2)}
    save_file(state, str(tmp_path / "pytorch_model.bin"))
    read = read_weights(tmp_path / "pytorch_model.bin")
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
