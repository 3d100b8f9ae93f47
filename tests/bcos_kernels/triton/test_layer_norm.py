"""The Triton layer normalisation against the float64 reference: in the interpreter, and on a GPU where there is
one."""

import pytest

from tests.bcos_kernels.triton.harness import run_in_interpreter
from tests.bcos_kernels.triton.layer_norm_cases import CASES, check


def test_in_interpreter():
    run_in_interpreter("layer_norm_cases.py", at_least=len(CASES))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_gpu(case):
    check(case, "cuda")
