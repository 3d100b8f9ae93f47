"""Uncentered BatchNorm, alone and synchronised between processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bcos_kernels

from .conv2d import BcosConv2d
from .modes import DetachableModule, per_sample

__all__ = ["BatchNormUncentered2d", "SyncBatchNormUncentered2d"]


class BatchNormUncentered2d(DetachableModule):
    """BatchNorm that divides by the standard deviation and leaves the mean in: y = x/√(var + eps)·w (+ bias).

        var = x.var((0, 2, 3), unbiased=False) if training else running_var
        y = x / (var + eps).sqrt().view(1, -1, 1, 1) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
        y = torch.relu(y + residual)                     # with residual= and activation="relu"

    var is the biased variance of the centred values; running_var follows it (not its unbiased form), running_mean is
    left alone. In explanation mode var is a constant for the gradient. The keys of state_dict are nn.BatchNorm2d's.

    It is no ``_BatchNorm`` of torch, so that ``nn.SyncBatchNorm.convert_sync_batchnorm`` cannot turn it into a centred
    norm: use ``SyncBatchNormUncentered2d.convert_sync_batchnorm``.

    Attributes:
        synchronised: the class of the synchronised form of modules of exactly this class.

    Args:
        num_features: channels C.
        eps: added to var, default 1e-5.
        momentum: weight of the new variance in running_var, default 0.1; None for the mean over all batches.
        affine: whether there is a weight (and a bias), default True.
        track_running_stats: keep running_var, default True; without it eval mode uses the batch's variance.
        device, dtype: of parameters and statistics.
        bias: False leaves the bias out (what B-cos networks do); default True. Needs ``affine``.

    Shapes: x, residual and y (N, C, H, W).

    Raises:
        ValueError: for an input that is not (N, C, H, W), an unknown activation.

    Source: B-cos networks v2, arXiv:2306.10898, section 3.2.

    Example:
        >>> norm = BatchNormUncentered2d(8, bias=False)
        >>> norm(torch.rand(4, 8, 5, 5), activation="relu").shape
        torch.Size([4, 8, 5, 5])
    """

    synchronised: type[BatchNormUncentered2d]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        factory = {"device": device, "dtype": dtype}
        self.register_parameter("weight", nn.Parameter(torch.empty(num_features, **factory)) if affine else None)
        with_bias = affine and bias
        self.register_parameter("bias", nn.Parameter(torch.empty(num_features, **factory)) if with_bias else None)
        self.register_buffer("running_mean", torch.zeros(num_features, **factory) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones(num_features, **factory) if track_running_stats else None)
        counter = torch.tensor(0, dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", counter)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Set running_mean to 0, running_var to 1 and num_batches_tracked to 0."""
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, and the statistics to their start."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _momentum_of_this_batch(self) -> float:
        """Counts the batch in training mode, and returns the weight that its variance gets."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return momentum

    def _check(self, x: Tensor, activation: str | None) -> None:
        if x.dim() != 4:
            raise ValueError(f"{type(self).__name__}: expected x of shape (N, C, H, W), got {tuple(x.shape)}")
        if activation not in (None, "relu"):
            raise ValueError(f"{type(self).__name__}: expected activation to be None or 'relu', got {activation!r}")

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """y = activation(norm(x) + residual), in one pass; ``activation`` None or "relu". A residual of another shape
        is broadcast, in a pass of its own."""
        self._check(x, activation)
        if residual is not None and residual.shape != x.shape:
            y = BatchNormUncentered2d.forward(self, x) + residual
            return y if activation is None else torch.relu(y)
        running_var, use_batch, momentum = self._statistics()
        constant = None
        bias = self.bias
        if self.constant_gain is not None and bias is not None:
            gain = per_sample(self.constant_gain, x.shape[0], 4, type(self).__name__)
            constant = bias.view(1, -1, 1, 1) * gain
            bias = None
        y = self._normalize(
            x,
            running_var,
            bias,
            training=use_batch,
            momentum=momentum,
            activation=None if constant is not None else activation,
            residual=None if constant is not None else residual,
        )
        if constant is None:
            return y
        y = y + constant.to(y.dtype)
        if residual is not None:
            y = y + residual
        return y if activation is None else torch.relu(y)

    def _statistics(self) -> tuple[Tensor | None, bool, float]:
        """running_var as it is to be read or updated, whether the batch's variance is used, the momentum; counts it."""
        momentum = self._momentum_of_this_batch()
        use_batch = self.training or self.running_var is None
        # Without tracking, training must not touch statistics that are there.
        return self.running_var if not self.training or self.track_running_stats else None, use_batch, momentum

    def behind(
        self,
        conv: BcosConv2d,
        x: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        recompute: str | None = None,
    ) -> Tensor:
        """activation(norm(conv(x)) + residual) as one op; where it cannot be one, the two are called in turn.

        Args:
            conv: a B-cos convolution; its hooks, and this module's, are not called.
            recompute: as in `bcos_kernels.conv2d_batch_norm`.
        """
        constant = self.constant_gain is not None and self.bias is not None
        constant = constant or (conv.constant_gain is not None and conv.bias is not None)
        padded = conv.padded(x)
        broadcast = residual is not None and residual.shape != conv.output_shape(padded)
        if constant or broadcast or not self._recomputes() or conv.detach != self.detach:
            # Not self.forward: a subclass's does more than this.
            return BatchNormUncentered2d.forward(self, conv.forward(x), residual, activation)
        running_var, use_batch, momentum = self._statistics()
        return bcos_kernels.conv2d_batch_norm(
            padded,
            conv.weight,
            conv.bias,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            running_var=running_var,
            norm_weight=self.weight,
            norm_bias=self.bias,
            training=use_batch,
            momentum=momentum,
            eps=self.eps,
            activation=activation,
            residual=residual,
            b=conv.exponent(),
            padding_mode=conv.padding_mode,
            normalize_weight=conv.normalize_weight,
            max_out=conv.max_out,
            detach=self.detach,
            recompute=recompute,
        )

    def recomputed(self, y: Tensor, x: Tensor, activation: str | None = None) -> Tensor:
        """Declare that the backward may compute y = self(x, activation=activation) again from x; returns y."""
        if self.constant_gain is not None or not self._recomputes():
            return y
        use_batch = self.training or self.running_var is None
        parameters = [t for t in (self.weight, self.bias, None if use_batch else self.running_var) if t is not None]
        affine, biased, eps = self.weight is not None, self.bias is not None, self.eps

        def again(x: Tensor, *given: Tensor) -> Tensor:
            rest = list(given)
            weight = rest.pop(0) if affine else None
            bias = rest.pop(0) if biased else None
            running_var = None if use_batch else rest.pop(0)
            return bcos_kernels.batch_norm_uncentered(
                x, running_var, weight, bias, training=use_batch, eps=eps, activation=activation
            )

        return bcos_kernels.recomputed(y, again, x, *parameters)

    def _recomputes(self) -> bool:
        return True

    def _normalize(
        self,
        x: Tensor,
        running_var: Tensor | None,
        bias: Tensor | None,
        *,
        training: bool,
        momentum: float,
        activation: str | None,
        residual: Tensor | None,
    ) -> Tensor:
        return bcos_kernels.batch_norm_uncentered(
            x,
            running_var,
            self.weight,
            bias,
            training=training,
            momentum=momentum,
            eps=self.eps,
            activation=activation,
            residual=residual,
            detach=self.detach,
        )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # Checkpoints without the counter (older torch, and peers' stripped ones) load as nn.BatchNorm2d's do.
        key = prefix + "num_batches_tracked"
        if (local_metadata.get("version") or 1) < 2 and self.track_running_stats and key not in state_dict:
            counter = self.num_batches_tracked
            kept = counter is not None and not counter.is_meta
            state_dict[key] = counter if kept else torch.tensor(0, dtype=torch.long)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    _version = 2

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, bias={self.bias is not None}"
        )


class SyncBatchNormUncentered2d(BatchNormUncentered2d):
    """`BatchNormUncentered2d` whose training variance is that of the batches of all processes together.

    Same arguments, keys and formula. In eval mode, outside torch.distributed and in a group of one it is the plain
    module. The variance is differentiable through all processes (its gradient is summed over them), so that N processes
    with a batch each give the gradients that one process with the whole batch gives, up to DistributedDataParallel's
    averaging. Explanation mode holds the variance constant, as everywhere.

    Attributes:
        process_group: processes that share statistics; None (default) is all of them.

    Every process of the group has to take part in every training step. A batch may be empty in some of them.
    """

    process_group: dist.ProcessGroup | None = None

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
        """Turn every `BatchNormUncentered2d` in ``module`` into its synchronised form, in place.

        Parameters, buffers, hooks and modes stay the very same objects; exact types only.

        Args:
            module: the model, changed and returned.
            process_group: processes that share statistics, default all.
        """
        for child in module.modules():
            synchronised = cls if type(child) is BatchNormUncentered2d else vars(type(child)).get("synchronised")
            if synchronised is not None and isinstance(child, BatchNormUncentered2d):
                child.__class__ = synchronised
                if process_group is not None:
                    child.process_group = process_group
        return module

    def _recomputes(self) -> bool:
        return False  # the other processes would have to take part again

    def _normalize(self, x, running_var, bias, *, training, momentum, activation, residual) -> Tensor:
        distributed = training and dist.is_available() and dist.is_initialized()
        if not distributed or dist.get_world_size(self.process_group) == 1:
            return super()._normalize(
                x,
                running_var,
                bias,
                training=training,
                momentum=momentum,
                activation=activation,
                residual=residual,
            )
        wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        var = SyncedVariance.apply(wide.detach() if self.detach else wide, self.process_group)
        if running_var is not None:
            with torch.no_grad():
                running_var.mul_(1 - momentum).add_(var.to(running_var.dtype), alpha=momentum)
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.to(scale.dtype)
        y = wide * scale.view(1, -1, 1, 1)
        if bias is not None:
            y = y + bias.to(y.dtype).view(1, -1, 1, 1)
        if residual is not None:
            y = y + residual
        return (y if activation is None else torch.relu(y)).to(x.dtype)


BatchNormUncentered2d.synchronised = SyncBatchNormUncentered2d


class SyncedVariance(torch.autograd.Function):
    """Biased variance per channel of (N, C, H, W) over all processes of a group.

    Every process sends (count, mean, Σ(x − mean)²) per channel, and the parts are joined by Chan's formula, which does
    not cancel as E[x²] − E[x]² does. Backward: ∂L/∂x = 2 (x − mean)/count · Σ over processes of ∂L/∂var.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        count = x.numel() // x.shape[1]
        mean = x.sum((0, 2, 3)) / max(count, 1)
        squares = (x - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3))
        mine = torch.stack([torch.full_like(mean, count), mean, squares])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        counts, means, sums = torch.stack(parts, 1)
        total = counts.sum(0).clamp(min=1)
        mean = (counts * means).sum(0) / total
        var = (sums.sum(0) + (counts * (means - mean).square()).sum(0)) / total
        ctx.save_for_backward(x, mean, total)
        ctx.group = group
        return var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        x, mean, total = ctx.saved_tensors
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return (x - mean.view(1, -1, 1, 1)) * (2 * grad / total).view(1, -1, 1, 1), None
