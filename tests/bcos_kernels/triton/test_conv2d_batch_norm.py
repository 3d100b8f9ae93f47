"""The Triton convolution with a batch normalisation against the float64 reference: in the interpreter, and on a GPU
where there is one."""

import pytest

from tests.bcos_kernels.triton.conv2d_batch_norm_cases import CASES, check_exactly
from tests.bcos_kernels.triton.harness import run_in_interpreter


def test_in_interpreter():
    run_in_interpreter("conv2d_batch_norm_cases.py", at_least=len(CASES))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_gpu(case):
    check_exactly(case, "cuda")
