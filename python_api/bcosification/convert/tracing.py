"""Blocks of unknown classes, fused by what their forward does: it is traced, and its chains run as one op.

    conv -> uncentered BatchNorm (-> nn.Identity) (-> + residual) (-> ReLU)

are found in the graph of a forward, whatever the class and its parts are called; convolution and norm may also be one
module, a unit (`UNITS`). The block then runs the traced graph with each chain as one call of chains.py, which looks at
the modules themselves when it runs (hooks, parts replaced later). A forward whose graph may not be all that it does is
refused with a reason.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import operator
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nn import BatchNormUncentered2d, BcosConv2d

__all__ = ["Calls", "NotTraceable", "has_parts", "has_units", "is_unit", "traced_class"]

UNITS = {"timm.layers.conv_bn_act.ConvNormAct"}
"""Classes that are a convolution ``conv``, a norm ``bn``, and ``aa``, which most have none of, in this order."""

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}
_RELUS = {torch.relu, torch.relu_, F.relu, "relu", "relu_"}
# What a trace answers with its own stand-ins or once and for all, so that the graph is one of several.
_DECIDES = {"isinstance", "type", "hasattr", "callable", "issubclass", "random", "rand", "randn", "randint",
            "bernoulli", "is_grad_enabled", "is_tracing", "is_scripting", "is_compiling", "requires_grad"}  # fmt: skip
_TRUSTED = {"torch", "bcosification", "bcos_kernels", *sys.stdlib_module_names} - {"__main__"}  # they do not decide


class NotTraceable(Exception):
    """Why the forward of a block is not known from a trace."""


@dataclass(frozen=True)
class Calls:
    """What chains become: functions of (conv, norm, relu or None, x, residual or None, recompute=, between=modules) and
    of (unit, relu or None, x, residual or None, recompute=, between=modules), which return tensors."""

    chain: Callable[..., torch.Tensor]
    unit: Callable[..., torch.Tensor]


def is_unit(module: nn.Module) -> bool:
    """Whether a module is of one of `UNITS`' classes, fused or not, with the library's own forward."""
    library = getattr(type(module), "_library_class", type(module))
    known = f"{library.__module__}.{library.__qualname__}" in UNITS
    return known and library.forward.__module__ == library.__module__


def has_units(module: nn.Module) -> bool:
    """Whether a child of a module is a unit."""
    return any(part is not None and is_unit(part) for part in module._modules.values())


def has_parts(module: nn.Module) -> bool:
    """Whether a module calls, or may call, a B-cos convolution and an uncentered BatchNorm of its own."""
    parts = list(module._modules.values())
    return any(isinstance(part, BcosConv2d) for part in parts) and any(
        isinstance(part, BatchNormUncentered2d) for part in parts
    )


class _Tracer(fx.Tracer):
    """Modules are called, not looked into."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _trace(module: nn.Module) -> fx.Graph:
    """The graph of a module's forward; NotTraceable where the forward decides something that the graph does not say."""
    optional = [p.name for p in inspect.signature(module.forward).parameters.values() if p.default is not p.empty]
    if optional:
        raise NotTraceable(f"its forward takes {', '.join(optional)} or not, and a trace would be of one of the two")
    names: set[str] = set()

    def record(frame: types.FrameType, event: str, _: Any) -> None:
        package = (frame.f_globals.get("__name__") or "").partition(".")[0]
        if event == "call" and package not in _TRUSTED:
            names.update(frame.f_code.co_names)

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        graph = _Tracer().trace(module)
    except Exception as error:
        text = str(error).strip().partition("\n")[0][:120]
        raise NotTraceable(f"its forward cannot be traced: {text or type(error).__name__}") from error
    finally:
        sys.setprofile(before)
    decides = sorted(names & _DECIDES)
    if decides:
        raise NotTraceable(f"its forward decides by {', '.join(decides)}, which a trace does not see")
    if any(node.op == "get_attr" and not _is_parameter(module, node.target) for node in graph.nodes):
        raise NotTraceable("its forward makes tensors of its own, which a trace would keep as constants")
    return graph


def _is_parameter(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    held = module.get_submodule(owner)
    return leaf in held._parameters or leaf in held._buffers


def _text(graph: fx.Graph) -> list[tuple]:
    return [(node.op, str(node.target), str(node.args), str(node.kwargs)) for node in graph.nodes]


def _part(module: nn.Module, node: Any, kind: type) -> nn.Module | None:
    """The module that a node calls with one tensor, if it is of a kind."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    part = module.get_submodule(node.target)
    return part if isinstance(part, kind) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_call_of(node: fx.Node | None, targets: set) -> bool:
    return node is not None and node.op in ("call_function", "call_method") and node.target in targets


def _is_changed_in_place(module: nn.Module, node: Any) -> bool:
    """Whether anything writes to a node's tensor: then a chain that reads it may not run later than it did."""
    if not isinstance(node, fx.Node):
        return False
    for user in node.users:
        if user.op == "call_module" and getattr(module.get_submodule(user.target), "inplace", False):
            return True
        if user.op == "call_method" and user.target.endswith("_") and user.args[0] is node:
            return True
        if user.op == "call_function" and user.args and user.args[0] is node:
            name = getattr(user.target, "__name__", "")
            in_place = (
                name.endswith("_") or user.target in _IN_PLACE or user.kwargs.get("inplace") or user.kwargs.get("out")
            )
            if in_place:
                return True
    return False


def _is_identity(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node calls an nn.Identity, which stands where another network of the library drops or blurs."""
    part = _part(module, node, nn.Identity)
    return part is not None and type(part) is nn.Identity


def _is_relu(module: nn.Module, node: fx.Node | None) -> bool:
    part = _part(module, node, nn.ReLU)
    if part is not None:
        return type(part) is nn.ReLU
    return _is_call_of(node, _RELUS) and len(node.args) == 1 and not node.kwargs.keys() - {"inplace"}


def _fuse_chain(module: nn.Module, graph: fx.Graph, end: fx.Node, calls: Calls) -> tuple[str, ...] | None:
    """Replace the chain that a norm's or a unit's node stands in by one call; None where there is none.

    Returns the names of convolution and norm, or of the unit.
    """
    parts = _parts(module, end)
    if not parts or _is_changed_in_place(module, parts[0].args[0]):
        return None
    x, names = parts[0].args[0], tuple(node.target for node in parts)
    between, residual, relu, chain = _behind(module, end)
    if len(parts) == 1 and not chain:
        return None  # a unit alone is a chain already
    chain = [*parts, *chain]
    with graph.inserting_before(chain[-1]):
        arguments = [graph.get_attr(name) for name in names]
        arguments.append(None if relu is None else graph.get_attr(relu or "_traced_relu"))
        options = {"recompute": graph.get_attr(_RECOMPUTE)}
        if between:
            options["between"] = tuple(graph.get_attr(node.target) for node in between)
        call = calls.unit if len(parts) == 1 else calls.chain
        fused = graph.call_function(call, (*arguments, x, residual), options)
    chain[-1].replace_all_uses_with(fused)
    for node in reversed(chain):
        graph.erase_node(node)
    return names


def _parts(module: nn.Module, end: fx.Node) -> list[fx.Node]:
    """The nodes of a convolution and the norm behind it, or of a unit; none for other nodes."""
    unit = _part(module, end, nn.Module)
    if unit is not None and is_unit(unit):
        return [end]
    conv = end.args[0] if end.args else None
    if _part(module, end, BatchNormUncentered2d) is None or _part(module, conv, BcosConv2d) is None:
        return []
    return [conv, end] if _only_user(conv) is end else []


def _behind(module: nn.Module, norm: fx.Node) -> tuple[list[fx.Node], fx.Node | None, str | None, list[fx.Node]]:
    """What of a chain follows its norm: nn.Identitys, the residual, the ReLU's name ("" for a function), all nodes."""
    between, chain, residual, relu = [], [], None, None
    last, after = norm, _only_user(norm)
    while after is not None and _is_identity(module, after):
        between.append(after)
        last, after = after, _only_user(after)
    if _is_call_of(after, _ADDITIONS) and len(after.args) == 2 and not after.kwargs:
        other = [operand for operand in after.args if operand is not last]
        if len(other) == 1 and isinstance(other[0], fx.Node):
            residual = other[0]
            chain = [*between, after]
            after = _only_user(after)
    if _is_relu(module, after):
        relu = after.target if after.op == "call_module" else ""
        chain = [*(chain or between), after]
    return between if chain else [], residual, relu, chain


_RECOMPUTE = "recompute_activations"
_classes: dict[tuple[type, str], type] = {}


def traced_class(module: nn.Module, calls: Calls) -> type | None:
    """A subclass of a block's class that runs its chains by ``calls``; None if there is no chain in its forward.

    Args:
        module: the block; its forward must be its class's.
        calls: what runs the chains.

    Raises:
        NotTraceable: the forward is no fixed sequence of calls.
    """
    library = type(module)
    training = module.training
    graphs = []
    try:
        for mode in (True, False):
            module.training = mode
            graphs.append(_trace(module))
    finally:
        module.training = training
    graph = graphs[0]
    if _text(graph) != _text(graphs[1]):
        raise NotTraceable("its forward does other things in training than in eval mode")
    found = [_fuse_chain(module, graph, node, calls) for node in list(graph.nodes) if node.op == "call_module"]
    if not any(found):
        return None
    code = graph.python_code(root_module="self")
    key = (library, code.src)
    if key not in _classes:
        members = dict(code.globals)
        source = f"<fused {library.__qualname__} {len(_classes)}>"
        linecache.cache[source] = (len(code.src), None, code.src.splitlines(True), source)  # tracebacks show its lines
        exec(compile(code.src, source, "exec"), members)
        _classes[key] = type(
            f"Fused{library.__name__}",
            (library,),
            {
                "__module__": __name__,
                "__doc__": f"{library.__module__}.{library.__qualname__} with fused chains",
                "_library_class": library,
                "_traced": True,
                "_traced_relu": nn.ReLU(),
                "fused_chains": tuple(names for names in found if names and len(names) == 2),
                _RECOMPUTE: False,
                "forward": members["forward"],
                "__deepcopy__": _deepcopy,
                "__reduce_ex__": _reduce,
            },
        )
    return _classes[key]


def _deepcopy(self: nn.Module, memo: dict) -> nn.Module:
    new = type(self).__new__(type(self))
    memo[id(self)] = new
    new.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return new


def _reduce(self: nn.Module, protocol: int) -> tuple:
    """Pickled as the library's class, and traced again when unpickled: no pickle could name a class made on the way."""
    library = type(self)._library_class
    return library.__new__, (library,), self.__dict__, None, None, _restore


def _restore(module: nn.Module, state: dict) -> None:
    from .blocks import fuse_traced

    module.__setstate__(state)
    fuse_traced(module)
