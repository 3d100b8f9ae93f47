"""The choice of tiles: every size gets one, as large as the result needs, within the memory that every GPU has."""

import itertools

import pytest
import torch

from bcos_kernels.triton_kernels.configs import (
    CONFIGS,
    DESCRIPTOR_CONFIGS,
    aligned,
    config_for,
    descriptor_config_for,
    doubled,
    fitted,
    flattened,
    form_of,
    reduced,
    shortened,
)
from bcos_kernels.triton_kernels.conv2d_small_groups import (
    DEPTHWISE_ELEMENTS,
    FEW,
    FORWARD_COLUMNS,
    PIXEL_ELEMENTS,
    TALL_COLUMNS,
    tile_for,
)
from bcos_kernels.triton_kernels.conv2d_small_groups_gradient import DW_ELEMENTS, DW_LAST, dw_splits, dw_tile

SIZES = (1, 3, 16, 17, 32, 33, 64, 65, 128, 1000, 100_000)


def shared_bytes(config, bits):
    return (config.block_m + config.block_n) * config.block_k * bits // 8 * config.num_stages


@pytest.mark.parametrize("key", CONFIGS, ids=str)
def test_tiles_fit(key):
    config, bits = CONFIGS[key], key[0]
    for variant in (
        config,
        flattened(config),
        reduced(config, 2),
        shortened(config, True),
        config._replace(block_k=16),
    ):
        blocks = variant[:3]
        assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)  # what tl.dot takes
        assert shared_bytes(variant, bits) <= 100 * 1024
        assert variant.block_m * variant.block_n // (32 * variant.num_warps) <= 128  # registers of the accumulator


@pytest.mark.parametrize("config", DESCRIPTOR_CONFIGS.values(), ids=str)
def test_tiles_of_descriptors_fit(config):
    # a warp group multiplies 64 rows; a copy's box has at most 256 elements a side
    assert config.block_m % 64 == 0 and config.num_warps % 4 == 0 and max(config[:3]) <= 256
    assert shared_bytes(config, 16) <= 227 * 1024
    assert config.block_m * config.block_n // (32 * config.num_warps) <= 128


def test_descriptors_are_for_results_that_fill_their_tiles():
    used = set()
    for m, n, k in itertools.product(SIZES, SIZES, SIZES):
        assert descriptor_config_for(m, n, k, torch.float32) is None
        config = descriptor_config_for(m, n, k, torch.bfloat16)
        assert (config is None) == (m < 64 or n < 32 or k < 32)
        used.add(config)
    assert used == {None, DESCRIPTOR_CONFIGS["large"], DESCRIPTOR_CONFIGS["tall"]}


def test_twice_the_columns_where_there_is_a_tile_for_each_program():
    large, wide = DESCRIPTOR_CONFIGS["large"], DESCRIPTOR_CONFIGS["wide"]
    assert doubled(large, 132 * 128, 256, 132) == wide and doubled(large, 66 * 128, 512, 132) == wide
    assert doubled(large, 131 * 128, 256, 132) == large and doubled(large, 100_000, 384, 132) == large


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


def test_what_the_compiler_is_told():
    assert aligned(8, 8) and aligned(16, 24) and not aligned(16, 32) and not aligned(8, 12)


@pytest.mark.parametrize("taps", [1, 3, 9, 25, 49, 121])
@pytest.mark.parametrize("columns", [2, 4, 70, 768])
def test_tiles_of_small_groups(taps, columns):
    """Of ∂L/∂w: 32 accumulators a thread at most, all taps of a 7 × 7 window in one program."""
    block_m, block_t, block_c = dw_tile(taps, columns)
    assert all(block & (block - 1) == 0 for block in (block_m, block_t, block_c))
    assert block_m * block_t * block_c <= DW_ELEMENTS and min(taps, 64) <= block_t < 2 * max(taps, 1)
    assert block_c >= min(columns, 32)


@pytest.mark.parametrize("columns", [2, 3, 4, 70, 768])
@pytest.mark.parametrize("most", [FORWARD_COLUMNS, TALL_COLUMNS])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_tiles_over_small_groups(columns, most, layout):
    """Of windows and units: whole outputs, however many units are one, and fewer columns where pixels are innermost."""
    x = torch.empty((2, 6, 5, 5), device="meta", memory_format=layout)
    rows, block = tile_for(x, columns, DEPTHWISE_ELEMENTS, most)
    assert rows * block == (DEPTHWISE_ELEMENTS if layout == torch.channels_last else PIXEL_ELEMENTS)
    assert block & (block - 1) == 0 and block <= most and (block >= FEW or block >= columns)
    assert (block > FEW) == (layout == torch.channels_last and columns > FEW)


@pytest.mark.parametrize("rows", [1, 63, 2178, 200_704, 10**7])
@pytest.mark.parametrize("tiles", [1, 3, 24, 5000])
def test_splits_of_small_groups(rows, tiles):
    """Every window in one split; many splits are summed in two steps of a fixed order."""
    chunk, splits = dw_splits(rows, tiles, 4)
    assert chunk * splits >= rows and chunk % 4 == 0 and 1 <= splits <= 128
    assert splits <= DW_LAST or splits % DW_LAST == 0
    assert splits == 1 or splits * tiles <= 1024


@pytest.mark.parametrize("members", [1, 2, 16, 256])
def test_all_members_of_an_output_are_in_one_tile(members):
    for config in CONFIGS.values():
        tile = reduced(config, members)
        assert tile.block_n % members == 0 and tile.block_m >= 16
