"""What stands in for a memory checker: bands around every tensor of a launcher, and bitwise repeats.

compute-sanitizer python -m benchmarks.gpu.guards BACKEND    # a small set of calls, for the checkers themselves
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bcos_kernels
from bcos_kernels import dispatch, functional, selftest
from bcos_kernels.selftest_cases import Case, cases

BAND = 4096
"""Bytes before and behind a tensor, all ones: NaN in every floating-point type."""
SKIPPED = "not built: "
"""Begins the line of a call that a backend does not take, and that the checkers did not see."""
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_ZERO = ("zeros", "zeros_like", "new_zeros")


class Bands(TorchDispatchMode):
    """Tensors that are made inside lie between two bands, and hold NaN until they are written."""

    def __init__(self):
        super().__init__()
        self.blocks: list[tuple[Tensor, int]] = []

    def put(self, t: Tensor, filled: bool) -> Tensor:
        """A tensor of t's shape and strides in memory of its own between two bands; t's values if ``filled``."""
        if not t.numel():
            return t
        extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        count = extent * t.element_size()
        padded = -count % 16  # of the band behind it
        block = torch.full((2 * BAND + count + padded,), 255, dtype=torch.uint8, device=t.device)
        self.blocks.append((block, count))
        inner = block[BAND : BAND + count].view(t.dtype).as_strided(t.shape, t.stride(), BAND // t.element_size())
        return inner.copy_(t) if filled else inner

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        name = function._schema.name.partition("::")[2]
        return self.put(made, name in _ZERO) if name in _EMPTY or name in _ZERO else made

    def intact(self) -> bool:
        return all(bool((block[:BAND] == 255).all() and (block[BAND + count :] == 255).all())
                   for block, count in self.blocks)  # fmt: skip


@contextlib.contextmanager
def _in_bands() -> Iterator[list[Bands]]:
    """Launchers that run inside get their tensors in bands, and so do those that they make themselves."""
    seen: list[Bands] = []
    launcher = dispatch._launcher

    def banded(name: str, which: str):
        launch = launcher(name, which)

        def run(*arguments):
            bands = Bands()
            seen.append(bands)
            with torch.no_grad():
                moved = [bands.put(a, True) if isinstance(a, Tensor) and _has_memory(a) else a for a in arguments]
            with bands:
                return launch(*moved)

        return run

    dispatch._launcher = banded
    try:
        yield seen
    finally:
        dispatch._launcher = launcher


def _has_memory(t: Tensor) -> bool:
    """Of its own for every element: an expanded tensor cannot be filled."""
    return all(stride > 0 for stride in t.stride())


def _outputs(case: Case, precision: str, backend: str, device: torch.device):
    tensors = selftest.inputs(case, precision, device)
    function = getattr(functional, case.op)
    with torch.no_grad(), bcos_kernels.backend("reference"):
        like = function(**{name: t.clone() for name, t in tensors.items()}, **case.options)
    dy = torch.randn(like.shape, generator=torch.Generator(device).manual_seed(1), device=device).to(like.dtype)
    dy = dy.as_strided(like.shape, like.stride()) if like.numel() else dy

    def outputs() -> dict[str, Tensor]:
        with selftest.exactly(backend):
            return selftest._outputs(function, case, tensors, dy)

    return outputs


def _equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Bit for bit, NaN included."""
    return got.keys() == expected.keys() and all(
        torch.equal(torch.nan_to_num(got[k]), torch.nan_to_num(v)) and torch.equal(got[k].isnan(), v.isnan())
        for k, v in expected.items()
    )


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """The library's convolutions may add in any order otherwise."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@_deterministic()
def guarded(case: Case, precision: str, backend: str, device: torch.device) -> dict:
    """Whether a backend writes outside its tensors, or reads there or what was never written: then NaN shows."""
    outputs = _outputs(case, precision, backend, device)
    expected = outputs()
    with _in_bands() as seen:
        got = outputs()
    intact, same = all(bands.intact() for bands in seen), _equal(got, expected)
    detail = "" if intact else "a band was written to"
    detail += "" if same else (", " if detail else "") + "other results than without bands"
    return {"status": "right" if intact and same else "wrong", "tensors": sum(len(b.blocks) for b in seen),
            "detail": detail}  # fmt: skip


@_deterministic()
def repeated(case: Case, precision: str, backend: str, device: torch.device, times: int) -> dict:
    """Whether ``times`` calls give the same bits: a difference between runs is a race."""
    outputs = _outputs(case, precision, backend, device)
    expected = outputs()
    different = sum(not _equal(outputs(), expected) for _ in range(times))
    return {"status": "right" if not different else "wrong", "different": different}


def main(argv: Sequence[str] | None = None) -> int:
    (backend,) = sys.argv[1:] if argv is None else argv
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in cases(quick=True):
        try:
            _outputs(case, "bfloat16", backend, device)()
        except NotImplementedError as error:
            print(f"{SKIPPED}{case.op}, {case}: {error}", flush=True)
        else:
            print(f"{case.op}, {case}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
