"""The ops compiled, exported, under autocast and under torch.func's transforms."""

from __future__ import annotations

import pytest
import torch

import bcos_kernels
from bcos_kernels import reference
from tests.bcos_kernels.op_cases import FUNCTIONS, assert_same, leaf, randn, tensors_of
from tests.bcos_kernels.tolerances import assert_close_to_reference

# Compiled, exported ---------------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    """conv → norm (+ residual, ReLU) → conv with max_out, b learnable → pooled → linear."""

    def __init__(self):
        super().__init__()
        parameters = ((6, 4, 3, 3), (6,), (6,), (12, 3, 3, 3), (5, 6))
        self.weights = torch.nn.ParameterList([randn(*shape, seed=i) for i, shape in enumerate(parameters)])
        self.b = torch.nn.Parameter(torch.tensor(1.6))
        self.register_buffer("running_var", torch.ones(6))
        self.detach, self.fill = False, None

    def forward(self, x):
        w = self.weights
        y = bcos_kernels.conv2d(x, w[0], padding=1, normalize_weight=True, detach=self.detach)
        y = bcos_kernels.batch_norm_uncentered(
            y, self.running_var, w[1], w[2], training=self.training, activation="relu", residual=y.detach() * 0.5,
            detach=self.detach,
        )  # fmt: skip
        y = bcos_kernels.conv2d(y, w[3], stride=2, groups=2, max_out=2, b=self.b, detach=self.detach)
        return bcos_kernels.linear(y.mean((2, 3)), w[4], b=1.5, detach=self.detach)


def network_results(model, network, x):
    x = x.clone().requires_grad_()
    y = model(x)
    network.zero_grad()
    y.square().sum().backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    return y.detach(), network.running_var.clone(), x.grad, *grads


@pytest.mark.parametrize("mode", ["training", "eval", "explaining"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_network_equals_eager(compiler, mode):
    torch.compiler.reset()
    network = Network().train(mode == "training")
    network.detach = mode == "explaining"
    x = randn(3, 4, 7, 7, seed=9).to(memory_format=torch.channels_last)
    expected = network_results(network, network, x)
    network.running_var.fill_(1.0)
    compiled = torch.compile(network, backend=compiler, fullgraph=True)
    got = network_results(compiled, network, x)
    assert_same(got, expected)


def test_compiled_for_any_batch_size():
    torch.compiler.reset()
    network = Network().eval()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (2, 5, 3):
        x = randn(size, 4, 7, 7, seed=size)
        assert_same(network_results(compiled, network, x), network_results(network, network, x))


def test_compiled_without_gradients():
    torch.compiler.reset()
    network = Network().eval()
    x = randn(3, 4, 7, 7, seed=9)
    with torch.no_grad():
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        assert_same(compiled(x), network(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    network = Network().eval()
    x = randn(3, 4, 7, 7, seed=9)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},), strict=strict)
    # strict export keeps autograd Functions as graphs of their own
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = {str(node.target) for graph in graphs for node in graph.nodes if "bcos_kernels" in str(node.target)}
    assert called == {
        "bcos_kernels.conv2d.default",
        "bcos_kernels.linear.default",
        "bcos_kernels.batch_norm_uncentered.default",
    }
    for inputs in (x, randn(5, 4, 7, 7, seed=8)):
        assert_same(program.module()(inputs), network(inputs))
    assert_same(program.run_decompositions().module()(x), network(x))


# Autocast -------------------------------------------------------------------------------------------------------------


def test_autocast_casts_inputs_and_weights():
    x, weight, bias = leaf(5, 6, seed=1), leaf(4, 6, seed=2), leaf(4, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        y = bcos_kernels.linear(x, weight, bias)
        image = bcos_kernels.conv2d(randn(1, 2, 4, 4), randn(3, 2, 3, 3))
    assert y.dtype == image.dtype == torch.bfloat16
    cast = [t.detach().bfloat16().requires_grad_() for t in (x, weight, bias)]
    expected = bcos_kernels.linear(*cast)
    assert torch.equal(y, expected)
    got = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert [g.dtype for g in got] == [torch.float32] * 3
    for mine, theirs in zip(got, torch.autograd.grad(expected.sum(), cast), strict=True):
        assert torch.equal(mine, theirs.float())


def test_autocast_leaves_b_and_statistics_alone():
    x, b = leaf(64, 6, seed=1), torch.tensor(1.7001, requires_grad=True)
    weight = leaf(4, 6, seed=2)
    running_var, scale = torch.ones(6), leaf(6, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        y = bcos_kernels.linear(x, weight, b=b)
        z = bcos_kernels.batch_norm_uncentered(x + 3, running_var, scale, training=True, momentum=1.0)
    assert z.dtype == torch.bfloat16 and running_var.dtype == torch.float32
    expected = (x + 3).detach().bfloat16().double().var(0, unbiased=False)
    assert (running_var / expected - 1).abs().max() < 1e-5
    # 1.7001 would be 1.703 in bfloat16
    cast = [t.detach().bfloat16() for t in (x, weight)]
    assert torch.equal(y, bcos_kernels.linear(*cast, b=1.7001)) or torch.equal(y, bcos_kernels.linear(*cast, b=b))
    db, dscale = torch.autograd.grad(y.sum(), b)[0], torch.autograd.grad(z.sum(), scale)[0]
    assert db.dtype == dscale.dtype == torch.float32
    exact = torch.tensor(1.7001, dtype=torch.float64, requires_grad=True)
    out = reference.linear(*(t.double() for t in cast), b=exact)
    assert_close_to_reference("db", db, None, torch.autograd.grad(out.sum(), exact)[0], torch.bfloat16)


def test_autocast_leaves_float64_alone():
    x, weight = randn(5, 6, seed=1, dtype=torch.float64), randn(4, 6, seed=2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = bcos_kernels.linear(x, weight)
    assert y.dtype == torch.float64
    assert_same(y, reference.linear(x, weight), 1e-14)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("change", [False, True], ids=["", "changed in place"])
def test_autocast_around_the_backward_alone(change, order, op, backend):
    """A backward that runs inside an autocast region has its forward's types."""
    tensors = tensors_of(op, dtype=torch.float32)

    def derivatives(module, tensors, autocast: bool):
        y = FUNCTIONS[op](module, *tensors, normalize_weight=True)
        if change:
            y = y.add_(1) if module is bcos_kernels else y + 1
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first = torch.autograd.grad(y.sum(), tensors, create_graph=order == 2)
            return first if order == 1 else torch.autograd.grad(sum(g.sum() for g in first), tensors[:2])

    with bcos_kernels.backend(backend):
        got = derivatives(bcos_kernels, tensors, True)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = derivatives(reference, exact, False)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        assert_close_to_reference(op, mine, None, theirs, torch.float32)


def test_autocast_compiled():
    torch.compiler.reset()
    network, x = Network().eval(), randn(3, 4, 7, 7, seed=9)

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return network(x)

    expected = function(x).detach()
    got = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    assert got.dtype == torch.bfloat16
    assert_same(got.detach(), expected, 1e-2)
    got.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in network.parameters())


# torch.func -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_jacobians(op, b, detach):
    x, weight, bias = (t.detach() for t in tensors_of(op, 2))
    options = dict(b=b, max_out=2, normalize_weight=True, detach=detach)

    def function(module):
        return lambda *tensors: FUNCTIONS[op](module, *tensors, **options)

    for argnums in (0, 1, 2):
        got = torch.func.jacrev(function(bcos_kernels), argnums)(x, weight, bias)
        expected = torch.autograd.functional.jacobian(function(reference), (x, weight, bias))[argnums]
        assert_same(got, expected, 1e-12)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_hessian(op):
    x, weight, bias = (t.detach() for t in tensors_of(op))

    def function(module):
        return lambda x: FUNCTIONS[op](module, x, weight, bias).square().sum()

    got = torch.func.jacrev(torch.func.jacrev(function(bcos_kernels)))(x)
    assert_same(got, torch.autograd.functional.hessian(function(reference), x), 1e-10)


@pytest.mark.parametrize("b", [2.0, 1.5, "tensor"])
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, None), (1, 1)])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_vmap(op, in_dims, b):
    x, weight, bias = (t.detach() for t in tensors_of(op, 2))
    batched = [
        t if d is None else torch.stack([t * (1 + 0.3 * i) for i in range(3)], d)
        for t, d in zip((x, weight), in_dims, strict=True)
    ]
    exponent = torch.tensor(1.7, dtype=torch.float64) if b == "tensor" else b

    def function(module):
        return lambda x, weight: FUNCTIONS[op](module, x, weight, bias, b=exponent, max_out=2)

    got = torch.func.vmap(function(bcos_kernels), in_dims)(*batched)
    expected = torch.stack(
        [
            function(reference)(*(t if d is None else t.select(d, i) for t, d in zip(batched, in_dims, strict=True)))
            for i in range(3)
        ]
    )
    assert_same(got, expected, 1e-12)


@pytest.mark.parametrize("b", [2.0, 1.5])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_gradients_per_sample(op, b):
    """vmap over grad: one gradient of the weight for every sample."""
    x, weight, bias = (t.detach() for t in tensors_of(op))
    samples = torch.stack([x, x * 1.5, x.flip(0)])

    def loss(module):
        return lambda weight, x: FUNCTIONS[op](module, x, weight, bias, b=b).square().sum()

    got = torch.func.vmap(torch.func.grad(loss(bcos_kernels)), (None, 0))(weight, samples)
    expected = torch.stack([torch.func.grad(loss(reference))(weight, s) for s in samples])
    assert_same(got, expected, 1e-12)


def test_vmap_of_batch_norm():
    x, weight = randn(3, 4, 2, 3, 3, seed=1, dtype=torch.float64), randn(2, seed=2, dtype=torch.float64)

    def function(module):
        return lambda x: module.batch_norm_uncentered(
            x, None, weight, training=True, activation="relu"
        ).square().sum()  # fmt: skip

    got = torch.func.vmap(torch.func.grad(function(bcos_kernels)))(x)
    assert_same(got, torch.stack([torch.func.grad(function(reference))(s) for s in x]), 1e-12)


def test_functional_call():
    """Parameters swapped in, as explanations and meta-learning do."""
    network, x = Network().eval(), randn(3, 4, 7, 7, seed=9)
    parameters = {k: v.detach() * 1.1 for k, v in network.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.1)
    network(x).square().sum().backward()
    for name, p in network.named_parameters():
        assert_same(got[name], p.grad)
