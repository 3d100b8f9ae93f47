"""Tile sizes of the GEMM-shaped kernels, as data and an analytic choice among them. Nothing is tuned at run time.

A tile's accumulator takes block_m · block_n / (32 · num_warps) registers a thread, and its operands
(block_m + block_n) · block_k · bytes · num_stages of shared memory: all configurations stay under 100 KB, which every
GPU since sm_80 offers. 32-bit tiles are smaller: without tf32 the products run on the FMA units out of registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Tile of one program: block_m × block_n results, block_k of the reduced dimension at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# (bits of an element, form of the result) → tile
CONFIGS: dict[tuple[int, str], Config] = {
    (16, "large"): Config(128, 128, 32, 8, 3),
    (16, "tall"): Config(128, 64, 32, 4, 3),
    (16, "narrow"): Config(128, 16, 32, 4, 3),
    (16, "short"): Config(32, 64, 64, 4, 3),
    (16, "tiny"): Config(16, 16, 64, 2, 3),
    (32, "large"): Config(64, 64, 16, 4, 2),
    (32, "tall"): Config(64, 32, 32, 4, 2),
    (32, "narrow"): Config(64, 16, 32, 4, 2),
    (32, "short"): Config(16, 64, 32, 4, 2),
    (32, "tiny"): Config(16, 16, 32, 2, 2),
}

# form of a 16-bit result ("wide": see `doubled`) → tile of the kernels of descriptors.py, which run on sm_90 and newer
# only: up to 227 KB of shared memory are at hand there
DESCRIPTOR_CONFIGS: dict[str, Config] = {
    "wide": Config(128, 256, 64, 8, 3),
    "large": Config(128, 128, 64, 8, 4),
    "tall": Config(128, 64, 64, 4, 4),
}


def form_of(m: int, n: int) -> str:
    """The form of an (m, n) result, the second half of a key of `CONFIGS`."""
    if n <= 16:
        return "narrow" if m > 16 else "tiny"
    if m <= 32:
        return "short"
    return "tall" if n <= 64 else "large"


def config_for(m: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """Tile for an (m, n) result reduced over k, elements of ``dtype``."""
    config = CONFIGS[8 * dtype.itemsize, form_of(m, n)]
    return config._replace(block_k=16) if k <= 16 else config


def descriptor_config_for(m: int, n: int, k: int, dtype: torch.dtype) -> Config | None:
    """Tile of descriptors.py for an (m, n) result reduced over k; None for results and types it has none for."""
    if dtype.itemsize != 2 or m < 64 or n < 32 or k < 32:
        return None
    return DESCRIPTOR_CONFIGS[form_of(m, n)]


def fitted(block: int, channels: int) -> int:
    """The largest block of channels, half of ``block`` or more and 16 or more, that divides them; 0 if none does."""
    return next((size for size in (block, block // 2) if size >= 16 and channels % size == 0), 0)


def aligned(*sizes: int) -> bool:
    """Whether all sizes are multiples of 8, and one of them none of 16, which the compiler would see by itself. Told of
    it, kernels move 16 bytes at once: with groups of 8 channels (ResNeXt's and RegNet's) a forward over flattened taps
    takes 205 instructions a step in place of 478, with groups of 24 dx no longer spills 440 bytes (sm_90)."""
    return all(size % 8 == 0 for size in sizes) and any(size % 16 for size in sizes)


def flattened(config: Config) -> Config:
    """The tile for a convolution where each element of an operand has an address of its own, as over flattened taps and
    channels: at most 64 wide and in 8 warps, since with 16 addresses a thread and more the kernels spill (128 × 64 × 32
    in 4 warps: 296 bytes a thread)."""
    return config._replace(block_n=min(config.block_n, 64), num_warps=8)


def reduced(config: Config, members: int) -> Config:
    """The tile for outputs that are the maximum over ``members`` columns: the reduction takes a second accumulator (40
    bytes of spills a thread at 128 × 128)."""
    if members == 1:
        return config
    block_n = max(config.block_n, members)
    return config._replace(block_m=min(config.block_m, 64, 8192 // block_n), block_n=block_n)


def shortened(config: Config, needed: bool) -> Config:
    """The tile where a kernel needs registers beside the accumulator's: at most 64 rows. At 128 × 128 with offsets of
    64 bits the input gradient of a convolution spills 408 bytes a thread, with a slope kept beside the output its
    forward 112, with general B the forward by descriptors 32."""
    return config._replace(block_m=min(config.block_m, 64)) if needed else config


def doubled(config: Config, m: int, n: int, programs: int) -> Config:
    """The tile of descriptors.py with twice the columns, for (m, n) results that it fills and that have one for each
    program. On sm_90 a bare forward takes 184 registers (254 with the norm in its loop); with a GELU it spills 312
    bytes a thread, with a bias on sm_100 784."""
    wide = DESCRIPTOR_CONFIGS["wide"]
    tiles = -(-m // wide.block_m) * (n // wide.block_n)
    return wide if n % wide.block_n == 0 and tiles >= programs else config
