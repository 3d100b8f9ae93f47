"""The choice of tiles: every size gets one, as large as the result needs, within the memory that every GPU has."""

import itertools

import pytest
import torch

from bcos_kernels.triton_kernels.configs import CONFIGS, config_for, fitted, flattened, form_of, reduced, widened

SIZES = (1, 3, 16, 17, 32, 33, 64, 65, 128, 1000, 100_000)


def shared_bytes(config, bits):
    return (config.block_m + config.block_n) * config.block_k * bits // 8 * config.num_stages


@pytest.mark.parametrize("key", CONFIGS, ids=str)
def test_tiles_fit(key):
    config, bits = CONFIGS[key], key[0]
    for variant in (config, flattened(config), reduced(config, 2), widened(config, True), config._replace(block_k=16)):
        blocks = variant[:3]
        assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)  # what tl.dot takes
        assert shared_bytes(variant, bits) <= 100 * 1024
        assert variant.block_m * variant.block_n // (32 * variant.num_warps) <= 128  # registers of the accumulator


def test_every_size_has_a_tile_and_every_tile_a_size():
    used = set()
    for m, n, k in itertools.product(SIZES, SIZES, SIZES):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            config = config_for(m, n, k, dtype)
            assert config.block_k == 16 or k > 16
            # a tile more than four times as wide as the result only where it is the smallest
            assert config.block_n <= max(4 * n, 64)
            used.add((8 * dtype.itemsize, form_of(m, n)))
    assert used == set(CONFIGS)


@pytest.mark.parametrize(
    "block, channels, expected", [(64, 128, 64), (64, 32, 32), (64, 96, 32), (32, 6, 0), (128, 32, 0), (16, 24, 0)]
)
def test_blocks_of_channels(block, channels, expected):
    assert fitted(block, channels) == expected


@pytest.mark.parametrize("members", [1, 2, 16, 256])
def test_all_members_of_an_output_are_in_one_tile(members):
    for config in CONFIGS.values():
        tile = reduced(config, members)
        assert tile.block_n % members == 0 and tile.block_m >= 16
