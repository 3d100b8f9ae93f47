"""The bounds that every backend is held to, in one place (docs/design.md, "Numbers that must hold").

The oracle is `bcos_kernels.reference` in float64 on the same values, and an error is ‖out − ref‖/‖ref‖ over a whole
tensor. It stays under the bound of its dtype, and under twice the error that the reference itself makes when it is
computed in that dtype (or 4 ulp, whichever is larger).
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUNDS = {
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
    torch.float64: 1e-13,  # where the oracle's own rounding is as large: nothing to hold it to but round-off
}


def assert_close_to_reference(
    name: str,
    got: Tensor,
    eager: Tensor | None,
    oracle64: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
) -> None:
    """Hold ``got`` to the bounds of ``dtype``.

    Args:
        name: what is compared, for the message.
        got: the result under test.
        eager: the reference computed in ``dtype``; None where only the bound itself applies.
        oracle64: the reference computed in float64.
        dtype: the type that the op ran in (results such as ∂L/∂B may have another).
        scale: the terms of a sum, whose norm the error is measured against; default: the oracle's norm.
    """
    assert got.shape == oracle64.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle64.shape)}"
    assert oracle64.dtype == torch.float64, f"{name}: the oracle was computed in {oracle64.dtype}"
    got, oracle64 = got.detach().double(), oracle64.detach()
    finite = torch.isfinite(oracle64)
    others = torch.stack([got[~finite], oracle64[~finite]])
    assert torch.allclose(others[0], others[1], equal_nan=True), f"{name}: {others[0]}, expected {others[1]}"
    assert torch.isfinite(got[finite]).all(), f"{name}: not finite where the reference is"
    if dtype == torch.float16:
        # what is no normal number in float16 has fewer bits than the bound asks for
        finite &= (oracle64.abs() >= torch.finfo(torch.float16).tiny) | (oracle64 == 0)
    terms = oracle64[finite] if scale is None else scale.detach().double()
    error = _relative_error(got[finite], oracle64[finite], terms)
    limit = BOUNDS[dtype]
    if eager is not None and dtype != torch.float64:
        eager_error = _relative_error(eager.detach().double()[finite], oracle64[finite], terms)
        limit = min(limit, max(2 * eager_error, 4 * torch.finfo(dtype).eps))
    assert error < limit or error == 0, f"{name}: error {error:.3g}, allowed {limit:.3g} ({dtype})"


def _relative_error(got: Tensor, expected: Tensor, terms: Tensor) -> float:
    difference, norm = (got - expected).norm().item(), terms.norm().item()
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))
