"""Classification training of one model as a LightningModule: loss, optimiser, schedule, metrics, gradient clipping."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from .losses import BinaryCrossEntropy, build_loss

__all__ = ["OPTIMIZERS", "ClassificationModule", "cosine_with_warmup", "parameter_groups"]

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def cosine_with_warmup(optimizer, steps: int, warmup_steps: int = 0, start_factor: float = 0.01):
    """Learning rate: linear from start_factor·lr to lr in `warmup_steps`, then a cosine to 0 at `steps`.

    A function of the number of the step, to be called once per optimiser step: a run that is resumed with more epochs
    follows the new curve from there on (the state of torch's CosineAnnealingLR would bring its old length along).
    """
    if not 0 <= warmup_steps < max(steps, 1):
        raise ValueError(f"schedule: expected 0 <= warm-up steps < steps ({steps}), got {warmup_steps}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return start_factor + (1 - start_factor) * step / warmup_steps
        share = min(1.0, (step - warmup_steps) / max(steps - warmup_steps, 1))
        return (1 + math.cos(math.pi * share)) / 2

    return LambdaLR(optimizer, factor)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trained parameters in two groups: matrices and kernels with weight decay; vectors and scalars (norms, biases, a
    learnable B) without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if weight_decay == 0:
        return [{"params": trained}]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


class ClassificationModule(LightningModule):
    """Trains `model`, which maps images (N, 3, H, W) in [0, 1] to logits (N, C).

    Args:
        model: any module; not copied.
        num_classes: C.
        loss: name of the training loss, see losses.LOSSES; validation reports one-hot BCE (cross-entropy where that
            is trained with).
        optimizer: "adam" or "adamw".
        lr: peak learning rate, default 1e-4.
        weight_decay: default 0; not applied to vectors.
        warmup_epochs: linear warm-up, fractions allowed, default 0.
        agc: clip factor of adaptive gradient clipping (timm's adaptive_clip_grad; the papers use 0.01), None for none.
        channels_last: give images to the model in that layout, default True.

    Logs train_loss, train_top1, val_loss, val_top1 and (C > 5) val_top5 per epoch; accuracies are shares of 1.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, *, loss: str = "bce_uniform", optimizer: str = "adam",
        lr: float = 1e-4, weight_decay: float = 0.0, warmup_epochs: float = 0.0, agc: float | None = None,
        channels_last: bool = True,
    ):  # fmt: skip
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: expected one of {tuple(OPTIMIZERS)}, got {optimizer!r}")
        self.model = model
        self.loss = build_loss(loss)
        self.val_loss = nn.CrossEntropyLoss() if loss == "cross_entropy" else BinaryCrossEntropy()
        self.optimizer_name, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.warmup_epochs, self.agc, self.channels_last = warmup_epochs, agc, channels_last
        self.train_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_top5 = MulticlassAccuracy(num_classes, top_k=5, average="micro") if num_classes > 5 else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images)

    def training_step(self, batch, batch_idx) -> torch.Tensor:
        images, labels = batch
        logits = self(images)
        # Losses in float32: under fp16 autocast, log-sigmoids of large logits would lose their tails.
        loss = self.loss(logits.float(), labels)
        self.train_top1(logits.detach(), labels)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        self.log("train_top1", self.train_top1, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch, batch_idx) -> None:
        images, labels = batch
        logits = self(images)
        self.val_top1(logits, labels)
        options = dict(on_step=False, on_epoch=True, batch_size=len(labels))
        self.log("val_loss", self.val_loss(logits.float(), labels), sync_dist=True, **options)
        self.log("val_top1", self.val_top1, prog_bar=True, **options)
        if self.val_top5 is not None:
            self.val_top5(logits, labels)
            self.log("val_top5", self.val_top5, **options)

    def configure_optimizers(self):
        groups = parameter_groups(self.model, self.weight_decay)
        optimizer = OPTIMIZERS[self.optimizer_name](groups, lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError("schedule: expected a number of epochs or steps, got an endless run")
        warmup = round(self.warmup_epochs * steps / max(self.trainer.max_epochs, 1))
        schedule = cosine_with_warmup(optimizer, steps, warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if self.agc is not None:
            from timm.utils.agc import adaptive_clip_grad

            adaptive_clip_grad([p for p in self.model.parameters() if p.grad is not None], clip_factor=self.agc)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
