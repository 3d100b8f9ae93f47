"""Rows of the GPU's stages, read and made up."""

from __future__ import annotations

import torch

from benchmarks.gpu import running
from benchmarks.protocol import load_rows

CPU = torch.device("cpu")


def rows_of(stage, folder):
    return {(row["case"], row["contender"]): row for row in load_rows(f"gpu_{stage}", folder)}


def rates_of(folder):
    """What the stage environment would have left there."""
    rows = running.Rows("environment", folder, CPU)
    rows.add("bandwidth", "copy, read + written", GB_per_s=10.0)
    for name in ("float32", "bfloat16", "tf32"):
        rows.add("matrix product 64^3", name, TFLOP_per_s=0.1)
