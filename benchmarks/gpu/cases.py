"""What the stages of `make gpu` time: calls at the sizes of networks."""

from __future__ import annotations

import contextlib

from bcos_kernels import selftest_cases

from ..shapes import convolutions


def tuned_cases() -> list[selftest_cases.Case]:
    """Those that get rows of the tuning table: the selftest's, and two networks' where torchvision is."""
    found = [*selftest_cases.timed_cases(), *selftest_cases.timed_cases(batch=256)]
    with contextlib.suppress(ImportError):
        found += selftest_cases.network_cases("resnet50", 256) + selftest_cases.network_cases("vit_b_16", 128)
    return found


def layer_cases(rehearsal: bool = False) -> list[selftest_cases.Case]:
    """Layers that are compared with plain and the peer's."""
    if rehearsal:
        return [selftest_cases.conv2d("3x3", (2, 8, 6, 6), 8, 3, padding=1), selftest_cases.linear("MLP", 10, 16, 8)]
    every = selftest_cases.timed_cases(batch=256)
    found = [case for case in every if case.op in ("conv2d", "linear") and "b" not in case.options]
    with contextlib.suppress(ImportError):
        for layer in convolutions("resnet50"):
            x, o, (edge, _) = (256, layer["c"], *layer["size"]), layer["o"], layer["kernel"]
            window = {"stride": layer["stride"][0], "padding": layer["padding"][0]}
            case = selftest_cases.conv2d(layer["label"], x, o, edge, **window)
            if case.tensors not in [known.tensors for known in found]:
                found.append(case)
    return found
