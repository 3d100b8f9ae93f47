"""conv2d_batch_norm compiled, exported, under autocast, and as torch sees its ops."""

from __future__ import annotations

import pytest
import torch

from bcos_kernels import reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.conv2d_batch_norm_cases import (
    HALF,
    OPS,
    SMALL,
    Case,
    Mode,
    apply,
    assert_same,
    gradient_of_output,
    inputs_of,
    leaves_of,
    named,
    running_var_of,
    separately,
    window,
)

# Compiled, exported, under autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", HALF, ids=str)
def test_compiled(mode):
    """One graph without breaks; declarations to recompute do nothing there."""
    torch.compiler.reset()
    case = named("3x3")
    inputs, dz = inputs_of(case, torch.float32), gradient_of_output(case, torch.float32)
    before = running_var_of(case, torch.float32)

    def function(leaves, running_var):
        return apply(case, leaves, mode, running_var, recompute="inner")

    def results(function):
        leaves, running_var = leaves_of(inputs, mode), before.clone()
        z = function(leaves, running_var)
        found = {"z": z.detach().clone(), "running_var": running_var, **harness.gradients(z, leaves, dz)}
        return {name: value for name, value in found.items() if value is not None}

    expected = results(function)
    got = results(torch.compile(function, backend="aot_eager", fullgraph=True))
    for name, value in got.items():
        assert_same(value, expected[name], 1e-6, name)
    assert got.keys() == expected.keys()


def test_compiled_for_any_batch_size():
    torch.compiler.reset()
    case, mode = Case("", kernel=(1, 1)), Mode()
    leaves = leaves_of(inputs_of(case, torch.float32), mode)

    def function(x):
        return apply(case, leaves | {"x": x}, mode, None)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for images in (2, 5, 3):
        x = harness.lay_out(harness.randn((images, 6, 9, 11), images, torch.float32), "channels_last").requires_grad_()
        got, expected = (torch.autograd.grad(f(x).square().sum(), (x, leaves["weight"])) for f in (compiled, function))
        for mine, theirs in zip(got, expected, strict=True):
            assert_same(mine, theirs, 1e-5)


class Layer(torch.nn.Module):
    def __init__(self, case: Case, mode: Mode) -> None:
        super().__init__()
        self.case, self.mode = case, mode
        inputs = inputs_of(case, torch.float64)
        for name in ("weight", "norm_weight", "norm_bias"):
            self.register_parameter(name, torch.nn.Parameter(inputs[name]))
        self.running_var = torch.nn.Buffer(running_var_of(case, torch.float64))

    def leaves(self, x):
        parameters = {"weight": self.weight, "norm_weight": self.norm_weight, "norm_bias": self.norm_bias}
        return {"x": x, "bias": None, "b": None, "residual": None, **parameters}

    def forward(self, x):
        return apply(self.case, self.leaves(x), self.mode, self.running_var)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
def test_export(detach, strict):
    """One op in the graph, which is differentiated in the mode that it was made in."""
    mode = Mode(False, detach=detach)
    layer = Layer(SMALL, mode)
    x = inputs_of(SMALL, torch.float64)["x"]
    batch = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(layer, (x,), dynamic_shapes=batch, strict=strict)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = [str(node.target) for graph in graphs for node in graph.nodes if "bcos_kernels" in str(node.target)]
    assert called == ["bcos_kernels.conv2d_batch_norm.default"]
    x = torch.cat([x, 2 * x]).contiguous(memory_format=torch.channels_last).requires_grad_()
    module = program.module()
    expected = separately(reference, SMALL, layer.leaves(x), mode, layer.running_var, relu=True)[1]
    got = module(x)
    assert_same(got, expected, 1e-12)
    parameters, theirs = [x, *module.parameters()], [x, *layer.parameters()]
    for mine, other in zip(torch.autograd.grad(got.square().sum(), parameters),
                           torch.autograd.grad(expected.square().sum(), theirs), strict=True):  # fmt: skip
        assert_same(mine, other, 1e-12)


def test_autocast():
    """As the two ops: x, weight, bias and residual are cast, statistics and parameters of the norm are not."""
    case, mode = named("1x1, stride 2, conv bias"), Mode(residual=True)
    leaves, running_var = leaves_of(inputs_of(case, torch.float32), mode), running_var_of(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = apply(case, leaves, mode, running_var)
    cast = {name: t if t is None or "norm" in name else t.detach().bfloat16() for name, t in leaves.items()}
    expected_var = running_var_of(case, torch.float32)
    expected = apply(case, cast, mode, expected_var)
    assert z.dtype == torch.bfloat16 and torch.equal(z, expected)
    assert running_var.dtype == torch.float32 and torch.equal(running_var, expected_var)
    for name, g in harness.gradients(z, leaves, torch.ones_like(z)).items():
        assert g.dtype == torch.float32 and torch.isfinite(g).all(), name


# As torch sees the ops ------------------------------------------------------------------------------------------------

OPTIONS = {  # the case, mode, dtype, keep
    "training": (Case("", shape=(2, 4, 6, 5), outputs=4, kernel=(3, 2)), Mode(), "fp32", True),
    "training, residual, groups, contiguous": (
        Case("", shape=(2, 4, 6, 5), outputs=4, window=window(groups=2), layout="contiguous", bias=True),
        Mode(residual=True), "fp32", True,
    ),
    "eval, fp64, residual without relu": (
        Case("", shape=(2, 4, 6, 5), outputs=4, kernel=(1, 1), normalize=True),
        Mode(False, relu=False, residual=True), "fp64", True,
    ),
    "explaining, fp64": (Case("", shape=(2, 4, 6, 5), outputs=4), Mode(False, detach=True), "fp64", True),
    "explaining a batch, depthwise": (
        Case("", shape=(2, 4, 6, 5), outputs=4, window=window(groups=4, stride=2)), Mode(detach=True), "fp32", True,
    ),
    "b tensor, max_out": (
        Case("", shape=(2, 4, 6, 5), outputs=4, b=1.7, b_tensor=True, max_out=2, bias=True), Mode(False), "fp64", True,
    ),
    "b 1, no parameters, strided": (
        Case("", shape=(2, 4, 6, 5), outputs=4, b=1.0, parameters=False, layout="strided"), Mode(residual=True),
        "fp32", True,
    ),
    "nothing kept": (Case("", shape=(2, 4, 6, 5), outputs=4), Mode(False), "fp32", False),
}  # fmt: skip


def arguments_of(options: str, grad: bool) -> tuple:
    """Of the op: tensors and options."""
    case, mode, dtype, keep = OPTIONS[options]
    dtype = harness.DTYPES[dtype]
    leaves = leaves_of(inputs_of(case, dtype), mode)
    leaves = {name: None if t is None else t.requires_grad_(grad) for name, t in leaves.items()}
    names = ("x", "weight", "bias", "b", "norm_weight", "norm_bias", "residual")
    groups, stride = case.window.get("groups", 1), case.window.get("stride", 1)
    return (
        *(leaves[name] for name in names), None if mode.training else running_var_of(case, dtype), None,
        (stride, stride), (0, 0), (1, 1), groups, case.b, case.normalize, case.max_out, mode.training, case.eps,
        "relu" if mode.relu else None, keep, mode.detach, True,
    )  # fmt: skip


@pytest.mark.parametrize("grad", [False, True], ids=["constant", "leaf"])
@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck(options, grad):
    torch.library.opcheck(OPS.conv2d_batch_norm.default, arguments_of(options, grad))


@pytest.mark.parametrize("grad", [False, True], ids=["constant", "leaf"])
@pytest.mark.parametrize("options", list(OPTIONS)[:-1])
def test_opcheck_backward(options, grad):
    tensors, rest = arguments_of(options, False)[:7], arguments_of(options, False)[9:19]
    detach = OPTIONS[options][1].detach
    z, _, *held = OPS.conv2d_batch_norm(*arguments_of(options, False))
    x, weight, bias, b, norm_weight, norm_bias, residual = tensors
    dz = harness.randn(tuple(z.shape), 4, z.dtype).requires_grad_(grad)
    needs = [t is not None for t in tensors]
    needs[3] = needs[3] and not detach
    needs[6] = needs[6] and rest[-1] is not None
    mask = z if rest[-1] is not None and residual is not None else None
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    seconds = grad and options not in ("training", "explaining, fp64")  # that it takes
    if not seconds and (not grad or harness.convolutions_have_second_derivatives_of_symbolic_sizes()):
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(
        OPS.conv2d_batch_norm_backward.default,
        (dz, x.requires_grad_(grad), weight, bias, b, norm_weight, norm_bias, mask, *held, *rest, detach, needs, ""),
        test_utils=checks,
    )
