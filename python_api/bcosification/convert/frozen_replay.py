"""The explanation oracle: replay a forward pass with everything dynamic frozen.

A B-cos network is y = W(x) x + c(x). Explanation mode claims that autograd returns W(x), because every scale, gate,
variance and attention matrix is detached. This file finds W(x) by another road, which uses neither that mode nor any
kernel of ours: a float64 copy of the model runs once with plain torch operations and records, at x,

    scale       s of every B-cos layer (|a|/n for B = 2, else (|a|/n + 1e-6)^(B-1)) and the winner of a max-out
    gate        ReLU's mask, GELU's Phi(x), the factors of SiLU and its like and of squeeze-and-excitation
    variance    of LayerNorm, GroupNorm and every other norm that takes it from the sample
    attention   the softmax matrices
    held        queries and keys, and the gates of gated linear units, whole
    pooling     the winners of max pooling
    norm        the lengths of embeddings

and every later run takes these from the record. What is left has to be an affine function of the image, whose gradient
is W(x) and whose value at the zero image is c(x). A detach that is missing anywhere makes `weights` differ from that
gradient, elementwise. Anything dynamic that these files do not know stays dynamic, and `is_affine` then says False: the
oracle does not pass what it did not understand. The frozen forms are those of torch's functions (frozen_functions.py)
and of modules (frozen_layers.py).

Source: the definition of W(x), B-cos Networks (Boehle, Fritz, Schiele, 2022), equations 10 to 13; B-cosification
(Arya, Rao, Boehle, Schiele, 2024), section 3.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bcosification.convert.frozen_functions import FrozenFunctions, Tape
from bcosification.convert.frozen_layers import handler_of, own_handlers

__all__ = ["FrozenReplay", "frozen_replay"]


class FrozenReplay:
    """A model frozen at one batch of images: an affine function, in float64. Made by `frozen_replay`.

    Attributes:
        model: The float64 copy that is replayed.
        images: The recorded images (N, C, H, W), float64.
        recorded: How many values of each kind were recorded: scale, max_out, relu, gelu, gate, variance, attention,
            held, pooling, norm.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        if images.dim() != getattr(model, "input_dims", 4):  # of texts: embeddings (N, T, D)
            raise ValueError(f"frozen_replay: expected images of shape (N, C, H, W), got {tuple(images.shape)}")
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        self.images = images.detach().clone().double()
        own = own_handlers()
        self._tape = Tape()
        for module in self.model.modules():
            if hasattr(module, "set_explanation_mode"):
                module.set_explanation_mode(False)  # the copy may have been made inside explanation mode
            if getattr(module, "memory_efficient", False):
                module.memory_efficient = False  # DenseNet's checkpoints would run parts a second time, out of order
            handler = handler_of(module, own)
            if handler is not None:
                module.forward = _bound(handler, module, self._tape)
        self._recorded_logits = self._run(self.images).detach()
        self.recorded = Counter(self._tape.kinds)

    def _run(self, images: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # x + delta and alpha * x leave [0, 1] on purpose
            with FrozenFunctions(self._tape):
                return self.model(images * 1)  # not a leaf, so that a first layer may work in place

    def logits(self, images: Tensor | None = None) -> Tensor:
        """The frozen function of `images` (N, C, H, W): logits (N, classes), float64.

        Without images: the logits of the recording itself, in which nothing is frozen.
        """
        if images is None:
            return self._recorded_logits
        if images.shape != self.images.shape:
            raise ValueError(
                f"frozen_replay: expected images of the recorded shape {tuple(self.images.shape)}, got "
                f"{tuple(images.shape)}"
            )
        self._tape.rewind()
        logits = self._run(images.double())
        if self._tape.position != len(self._tape.values):
            raise RuntimeError(
                f"frozen_replay: expected all {len(self._tape.values)} recorded values to be used, got "
                f"{self._tape.position} (the forward pass depends on the values of its input)"
            )
        return logits

    def gradient(self, targets: Tensor | list[int] | int) -> Tensor:
        """W(x), which `explain(...).weights` must equal: each image's gradient of its target logit, (N, C, H, W)."""
        x = self.images.clone().requires_grad_()
        with torch.enable_grad():
            logits = self.logits(x)
            (gradient,) = torch.autograd.grad(logits.gather(1, self._column(targets, logits)).sum(), x)
        return gradient

    def constant(self, targets: Tensor | list[int] | int) -> Tensor:
        """The frozen function at the zero image, (N,): all that adds to the logit besides the image."""
        with torch.no_grad():
            logits = self.logits(torch.zeros_like(self.images))
        return logits.gather(1, self._column(targets, logits)).squeeze(1)

    def is_affine(self, tolerance: float = 1e-9) -> bool:
        """Whether f(x) is the model's own output and f an affine function, at x + delta, x - delta and alpha x.

        Args:
            tolerance: Largest error allowed, relative to the largest logit (default 1e-9; everything is float64).
        """
        x = self.images
        delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
        with torch.no_grad():
            at_x, at_zero = self.logits(x), self.logits(torch.zeros_like(x))
            forward, backward = self.logits(x + delta), self.logits(x - delta)
            pairs = [(at_x, self._recorded_logits), (forward + backward, 2 * at_x)]
            pairs += [(self.logits(alpha * x), alpha * at_x + (1 - alpha) * at_zero) for alpha in (0.3, -1.0, 2.0)]
        size = max(1e-12, *(float(t.abs().max()) for t in (at_x, at_zero, forward, backward)))
        return all(bool(((got - expected).abs().max() <= tolerance * size).item()) for got, expected in pairs)

    def _column(self, targets: Tensor | list[int] | int, logits: Tensor) -> Tensor:
        return torch.as_tensor(targets, device=logits.device).long().reshape(-1, 1).expand(logits.size(0), 1)


def _bound(handler: Callable, module: nn.Module, tape: Tape) -> Callable:
    return lambda *args, **kwargs: handler(module, tape, *args, **kwargs)


def frozen_replay(model: nn.Module, x6: Tensor) -> FrozenReplay:
    """Record everything dynamic of `model` at the encoded images `x6` and freeze it.

    Args:
        model: A B-cos model: converted by `bcosify`, made of the peers' layers, or fused. It is copied, not changed.
        x6: Images as the model reads them, [x, 1 - x], (N, 6, H, W), in [0, 1]; of a model with ``input_dims`` (that of
            texts, a function of embeddings (N, T, D)) a tensor of so many dimensions.

    Returns:
        A `FrozenReplay`, with `.logits(x6)`, `.gradient(targets)`, `.constant(targets)` and `.is_affine()`.

    Raises:
        ValueError: x6 is not four-dimensional (or of ``input_dims``).
        NotImplementedError: attention or pooling with an option that nobody wrote the frozen form of.

    Example:
        >>> replay = frozen_replay(model, x6)
        >>> replay.is_affine()
        True
        >>> torch.testing.assert_close(explain(model, x6, 3).weights.double(), replay.gradient(3), rtol=1e-4, atol=1e-6)
    """
    return FrozenReplay(model, x6)
