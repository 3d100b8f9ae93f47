"""What the CUTLASS kernels compute, without a GPU: their launchers with a recorder for CUDA's runtime and driver, their
PTX in an interpreter (recorded.py). Of the kernels' own parts that leaves what ptxas makes of the PTX, and, for sm_80,
races; Hopper's are run with their copies and products as late as they may be and at once.

nvcc takes a third of a minute a kernel for sm_80 and a minute one for Hopper: of Hopper's, those run by default that
test_cutlass_build.py builds too. The environment variable BCOS_TEST_CUDA_BUILD=all adds the others, and float16.
"""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch

from tests.bcos_kernels.cuda import ptx, ptx_hopper, recorded

_reason = recorded.unusable_reason()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_reason is not None, reason=f"CUTLASS kernels cannot be built here: {_reason}"),
]
ON_REQUEST = pytest.mark.skipif(
    os.environ.get("BCOS_TEST_CUDA_BUILD") != "all", reason="a minute of nvcc: BCOS_TEST_CUDA_BUILD=all compiles all"
)
BF16 = torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [BF16, pytest.param(torch.float16, marks=ON_REQUEST)], ids=str)


def kernels(always: str, on_request: str = ""):
    stems = [*always.split(), *(pytest.param(stem, marks=ON_REQUEST) for stem in on_request.split())]
    return pytest.mark.parametrize("stem", stems)


# --- numbers ----------------------------------------------------------------------------------------------------------

SIZES = [  # rows, outputs, features
    (128, 128, 32),  # a tile
    (150, 136, 72),  # 2 x 2 tiles, cut in each direction
    (1, 8, 8),
    (257, 776, 8),  # 3 x 7 tiles: programs beyond the last
    (64, 64, 264),  # many stages
]


@dtypes
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@kernels("linear_forward_sm80 linear_backward_dx_sm80")
def test_linear(stem, m, n, k, dtype):
    for unit_weights in (False, True)[: 1 if "backward" in stem else 2]:
        recorded.check_linear(stem, m, n, k, dtype, unit_weights)


WINDOWS = {  # images, channels, outputs, height, width, kernel, stride, padding, dilation
    "a tile": (1, 32, 128, 8, 16, (1, 1), (1, 1), (0, 0), (1, 1)),
    "3x3": (2, 16, 24, 9, 7, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, more than a tile": (2, 72, 136, 9, 10, (3, 3), (1, 1), (1, 1), (1, 1)),
    "7x7 /2": (1, 8, 16, 17, 13, (7, 7), (2, 2), (3, 3), (1, 1)),
    "/3 by 1, no padding": (1, 8, 8, 11, 6, (2, 3), (3, 1), (0, 0), (1, 1)),
    "dilated": (1, 40, 8, 12, 11, (3, 2), (1, 1), (2, 1), (2, 3)),
    "1x1, padded": (1, 8, 8, 3, 4, (1, 1), (1, 1), (1, 2), (1, 1)),
    "one pixel": (3, 8, 8, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
}
UNSTRIDED = [name for name, case in WINDOWS.items() if case[6] == (1, 1)]


@dtypes
@pytest.mark.parametrize("name", WINDOWS)
def test_conv2d_forward(name, dtype):
    for unit_weights in (False, True):
        recorded.check_conv2d("conv2d_forward_sm80", WINDOWS[name], dtype, unit_weights)


@dtypes
@pytest.mark.parametrize("name", WINDOWS)
def test_conv2d_backward_dx(name, dtype):
    if name in UNSTRIDED:
        recorded.check_conv2d("conv2d_backward_dx_sm80", WINDOWS[name], dtype)
        return
    with pytest.raises(RuntimeError, match="expected a window within the limits"):
        recorded.record("conv2d_backward_dx_sm80", dtype, recorded.window(*WINDOWS[name]))


# --- numbers of Hopper's ----------------------------------------------------------------------------------------------

ORDERS = {  # in which things happen, see ptx_hopper.py
    "loads late": {"early_reads": True},
    "reads late": {"early_loads": True},
    "loads late, by warps": {"early_reads": True, "together": 32},
    "reads late, by warps": {"early_loads": True, "together": 32, "seed": 1},
}
orders = pytest.mark.parametrize("order", ORDERS)
LINEAR = ("linear_forward", "linear_norm_forward linear_backward_dx")
HOPPER_SIZES = {  # rows, outputs, features, multiprocessors
    "a tile": (128, 128, 64, 132),
    "cut": (150, 136, 72, 132),  # 2 x 2 tiles, cut in each direction
    "small": (1, 8, 8, 132),
    "many stages": (64, 64, 520, 132),
    "many stages of outputs": (64, 520, 64, 132),  # for the gradient; a row of five tiles
    "one cluster for all": (300, 264, 136, 2),  # a program takes several tiles in turn
    "two clusters for all": (520, 136, 136, 4),
}


@orders
@dtypes
@pytest.mark.parametrize("name", HOPPER_SIZES)
@kernels(*LINEAR)
def test_linear_on_hopper(stem, name, dtype, order):
    *sizes, processors = HOPPER_SIZES[name]
    unit_weights = "warps" in order and "backward" not in stem
    recorded.check_linear(stem, *sizes, dtype, unit_weights, processors=processors, **ORDERS[order])


HOPPER_WINDOWS = WINDOWS | {
    "3x3 /2": (2, 24, 8, 10, 9, (3, 3), (2, 2), (1, 1), (1, 1)),
    "1x1 /2": (1, 136, 8, 12, 12, (1, 1), (2, 2), (0, 0), (1, 1)),
    "/8": (1, 8, 8, 17, 19, (3, 2), (8, 8), (1, 0), (1, 1)),
    "a window of 33": (1, 8, 16, 4, 40, (1, 33), (1, 1), (0, 3), (1, 1)),
    "a window of 125": (1, 8, 8, 2, 128, (1, 32), (1, 1), (1, 60), (1, 4)),
}


@orders
@dtypes
@pytest.mark.parametrize("name", HOPPER_WINDOWS)
def test_conv2d_forward_on_hopper(name, dtype, order):
    unit_weights = "warps" in order
    recorded.check_conv2d("conv2d_forward", HOPPER_WINDOWS[name], dtype, unit_weights, **ORDERS[order])


@orders
@dtypes
@pytest.mark.parametrize("name", [name for name, case in HOPPER_WINDOWS.items() if case[6] == (1, 1)])
@kernels("", "conv2d_backward_dx")
def test_conv2d_backward_dx_on_hopper(stem, name, dtype, order):
    recorded.check_conv2d(stem, HOPPER_WINDOWS[name], dtype, **ORDERS[order])


@ON_REQUEST
def test_hopper_s_gradient_with_a_stride_is_another():
    """Which is why the op refuses it: CUTLASS takes the problem, and leaves pixels out."""
    case = (1, 16, 8, 9, 9, (3, 3), (2, 2), (1, 1), (1, 1))
    with pytest.raises(AssertionError, match="dx: not finite"):
        recorded.check_conv2d("conv2d_backward_dx", case, BF16, early_reads=True)


# --- the interpreter sees what it is meant to see ---------------------------------------------------------------------


def _linear(change):
    x, weight = recorded.tensor((8, 264), 1, BF16), recorded.tensor((8, 264), 2, BF16)
    given = dict(x=x, weight=weight, reciprocal_n=torch.ones(8))
    exact = x.double() @ weight.double().t()
    y = recorded.run("linear_forward_sm80", torch.empty(8, 8, dtype=BF16), given, dict(m=8, n=8, k=264), change)
    return float((y.double() - exact * exact.abs()).norm() / (exact * exact.abs()).norm())


def test_a_wait_for_copies_that_is_missing_is_seen():
    assert _linear(lambda text: text) < 1e-2
    late = _linear(lambda text: text.replace("cp.async.wait_group 1;", "cp.async.wait_group 2;"))
    assert not late < 1e-2  # NaN: nothing has been written there


def test_an_access_outside_of_a_tensor_is_seen():
    """Of the row beyond the last, say, where the predicate of a store is lost."""
    with pytest.raises(RuntimeError, match="st.global.* outside of all arrays"):
        _linear(lambda text: text.replace("@p st.global", "st.global"))


def test_an_instruction_that_is_not_known_is_an_error():
    with pytest.raises(NotImplementedError, match="ptx: prmt"):
        _linear(lambda text: text.replace("bar.sync", "prmt.b32", 1))


def test_what_a_launcher_refuses_is_told():
    """Windows beyond the masks of the loads."""
    case = recorded.window(1, 8, 8, 1, 40, (1, 33), (1, 1), (0, 0), (1, 1))
    with pytest.raises(RuntimeError, match="expected a window within the limits of the kernel's loads"):
        recorded.record("conv2d_forward_sm80", BF16, case)


def test_rounding_is_to_the_nearest_to_even():
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5e-41, 3.4e38, 65520.0], np.float32)
    expected = torch.from_numpy(values)
    for kind, dtype in (("bf16x2", torch.bfloat16), ("f16x2", torch.float16)):
        with np.errstate(over="ignore"):
            got = ptx.narrow(values, kind)
        assert (got == expected.to(dtype).view(torch.int16).numpy().view(np.uint16)).all(), kind


# --- of Hopper's too --------------------------------------------------------------------------------------------------


def _hopper(change, order="loads late"):
    """linear_forward, more stages of features than the pipeline holds and two tiles a program."""
    recorded.check_linear("linear_forward", 300, 128, 520, BF16, processors=2, change=change, **ORDERS[order])


def _without(pattern):
    def change(text):
        assert re.search(pattern, text), pattern
        return re.sub(pattern, "", text)

    return change


def _with(pattern, replacement):
    def change(text):
        assert re.search(pattern, text), pattern
        return re.sub(pattern, replacement, text)

    return change


def test_what_is_changed_below_is_right_as_it_is():
    for order in ORDERS:
        _hopper(None, order)


DEADLOCK = r"ptx: a deadlock, waiting at .*mbarrier\.try_wait.* threads of block 0, from "
SEEN = {  # what is changed in the PTX, what the interpreter says
    "nobody waits for an mbarrier": (
        _with(r"mbarrier\.try_wait\.parity\.\S+ (P\d), [^;]*;", r"setp.eq.b32 \1, 0, 0;"), "ptx: .*arrivals of a phase"
    ),
    "fewer bytes are expected than arrive": (_with(r"(expect_tx\S+ _, [^,]*), %r\d+;", r"\1, 16;"), DEADLOCK),
    "stages are not given back": (_without(r"mbarrier\.arrive\.shared::cluster\.b64 _, \[remAddr32\];"), DEADLOCK),
    "one block alone gets the multicast": (_with(r"(mov\.u16 %rs\d+), 3;", r"\1, 1;"), DEADLOCK),
    "accumulators are not waited for": (_without(r"wgmma\.wait_group\.sync\.aligned 0;"), "belongs to a product"),
    "stores are not waited for": (_without(r"cp\.async\.bulk\.wait_group\.read 0;"), "waited for its stores"),
    "an mbarrier is not there": (_without(r"mbarrier\.init\S+ [^;]*;"), "no mbarrier at"),
    "a barrier is for more threads": (
        _with(r"bar\.sync (%r\d+), %r\d+;", r"bar.sync \1, 288;"), "a deadlock, waiting at .*bar.sync"
    ),
    "an instruction is not known": (_with(r"elect\.sync", "activemask.b32"), "ptx: activemask"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_on_hopper_it_is_seen_where(name):
    change, said = SEEN[name]
    with pytest.raises((RuntimeError, NotImplementedError), match=said):
        _hopper(change)


ROW_DESCRIPTOR = (1 << 62) + (1024 >> 4 << 32) + (1 << 16)  # swizzled within 128 bytes, 8 rows in 1024
WRONG = {  # change, order
    "a store that overtakes other warps": (
        _with(r"(fence\.proxy\.async\S*\s*;\s*\}\s*)bar\.sync[^;]*;", r"\1"), "loads late, by warps"
    ),
    "a store that is overtaken": (_without(r"cp\.async\.bulk\.wait_group\.read 1;"), "reads late"),
    "another swizzle": (_with(f" {ROW_DESCRIPTOR};", f" {ROW_DESCRIPTOR + (1 << 62)};"), "loads late"),
    "products of other columns": (_with(r"(add\.s32 %r\d+, %r\d+), 6;", r"\1, 4;"), "loads late"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_on_hopper_wrong_numbers_come_of(name):
    with pytest.raises(AssertionError, match="y: (error|not finite)"):
        _hopper(*WRONG[name])


def test_on_hopper_wrong_numbers_come_of_exchanged_offsets():
    """Of a window's elements, along its width and its height."""
    change = _with(r"(im2col\.mbarrier[^;]*), \{(%rs\d+), (%rs\d+)\};", r"\1, {\3, \2};")
    case = WINDOWS["/3 by 1, no padding"]
    recorded.check_conv2d("conv2d_forward", case, BF16)
    with pytest.raises(AssertionError, match="y: error"):
        recorded.check_conv2d("conv2d_forward", case, BF16, change=change)


def test_what_hopper_s_launchers_and_the_driver_refuse_is_told():
    for step in (42, 43):  # corners of the box reach from -128 on, offsets of elements to 255
        case = recorded.window(1, 8, 8, 1, 200, (1, 4), (1, 1), (0, 0), (1, step))
        if step == 42:
            recorded.record("conv2d_forward", BF16, case | dict(x=16, weight=16, y=16))
            continue
        with pytest.raises(RuntimeError, match="within the limits of the kernel's tensor maps"):
            recorded.record("conv2d_forward", BF16, case | dict(x=16, weight=16, y=16))
    for pointer in (0, 8):
        with pytest.raises(RuntimeError, match="the driver refused a tensor map: CUresult 1"):
            recorded.record("linear_forward", BF16, dict(m=8, n=8, k=8, x=pointer, weight=16, y=16))


def test_chunks_change_places_by_the_row():
    """The PTX ISA's figures of the swizzles: rows of 128 bytes, 16-byte chunks."""
    row, chunk = np.arange(16)[:, None], np.arange(8)[None, :]
    address = row * 128 + chunk * 16
    assert (ptx_hopper._swizzled(address, 128) == row * 128 + (chunk ^ row % 8) * 16).all()
    assert (ptx_hopper._swizzled(address, 64) == row * 128 + (chunk ^ row % 4) * 16).all()
    assert (ptx_hopper._swizzled(address, 32) == row * 128 + (chunk ^ row % 2) * 16).all()
    assert (ptx_hopper._swizzled(address, 0) == address).all()


def test_im2col_goes_through_the_box_of_every_image():
    """The mode's definition as loops over pixels: a 3 x 3 window over 7 x 9, padded by 1, each second pixel across."""
    images, height, width, channels = 3, 7, 9, 16
    of = np.zeros(1, ptx_hopper._MAP)
    of["mark"], of["im2col"], of["rank"], of["element_bytes"], of["span"] = b"TMap", 1, 4, 2, 32
    of["address"], of["last"][0, :4] = 1024, (channels - 1, width - 1, height - 1, images - 1)
    of["strides"][0, :3] = channels * 2, channels * 2 * width, channels * 2 * width * height
    of["steps"][0, :4], of["lower"][0, :2], of["upper"][0, :2] = (1, 2, 1, 1), (-1, -1), (-1, -1)
    of["channels"], of["pixels"] = 16, 60
    tensor_map = ptx_hopper._TensorMap(of.view(np.uint8))
    bases = [(n, h, w) for n in range(images + 1) for h in range(-1, height - 1) for w in range(-1, width - 1, 2)]
    first = bases.index((0, 2, 3))
    for w_offset, h_offset in ((0, 0), (2, 1), (1, 2)):
        address, inside = tensor_map.elements([0, 3, 2, 0], [w_offset, h_offset])
        address, inside = address.reshape(60, channels), inside.reshape(60, channels)
        for k, (n, h, w) in enumerate(bases[first : first + 60]):
            h, w = h + h_offset, w + w_offset
            assert inside[k].all() == inside[k].any() == (0 <= h < height and 0 <= w < width and n < images)
            assert (address[k] == 1024 + ((n * height + h) * width + w) * channels * 2 + 2 * np.arange(channels)).all()
