"""Training of one model as a LightningModule: loss, optimiser, schedule, metrics, gradient clipping."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from .losses import BinaryCrossEntropy, build_loss

__all__ = [
    "OPTIMIZERS",
    "ClassificationModule",
    "DistillationModule",
    "TrainedModule",
    "cosine_with_warmup",
    "parameter_groups",
]

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


class TrainedModule(LightningModule):
    """What the training of every kind of model shares: optimiser, schedule, adaptive clipping, layout of the images.

    Args:
        model: any module; not copied.
        optimizer: "adam" or "adamw".
        lr: peak learning rate, default 1e-4.
        weight_decay: default 0; not applied to vectors.
        warmup_epochs: linear warm-up, fractions allowed, default 0.
        agc: clip factor of adaptive gradient clipping (timm's adaptive_clip_grad; the papers use 0.01), None for none.
        channels_last: give images to the model in that layout, default True.

    Attributes:
        score: name of the metric, higher is better, by which the best epoch is chosen.
        saved: the model that a run saves and returns; ``model`` unless a subclass says otherwise.
    """

    score = "val_top1"

    def __init__(
        self, model: nn.Module, *, optimizer: str = "adam", lr: float = 1e-4, weight_decay: float = 0.0,
        warmup_epochs: float = 0.0, agc: float | None = None, channels_last: bool = True,
    ):  # fmt: skip
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: expected one of {tuple(OPTIMIZERS)}, got {optimizer!r}")
        self.model = model
        self.optimizer_name, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.warmup_epochs, self.agc, self.channels_last = warmup_epochs, agc, channels_last

    @property
    def saved(self) -> nn.Module:
        return self.model

    def save(self, folder) -> None:
        """Write the model as it is now, for `bcosification.load`."""
        self.saved.save_pretrained(folder)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(self.laid_out(images))

    def laid_out(self, images: torch.Tensor) -> torch.Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

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


class ClassificationModule(TrainedModule):
    """Trains `model`, which maps images (N, 3, H, W) in [0, 1] to logits (N, C).

    Args:
        model: any module; not copied.
        num_classes: C.
        loss: name of the training loss, see losses.LOSSES; validation reports one-hot BCE (cross-entropy where that
            is trained with).
        options: see TrainedModule.

    Logs train_loss, train_top1, val_loss, val_top1 and (C > 5) val_top5 per epoch; accuracies are shares of 1.
    """

    def __init__(self, model: nn.Module, num_classes: int, *, loss: str = "bce_uniform", **options):
        super().__init__(model, **options)
        self.loss = build_loss(loss)
        self.val_loss = nn.CrossEntropyLoss() if loss == "cross_entropy" else BinaryCrossEntropy()
        self.train_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_top5 = MulticlassAccuracy(num_classes, top_k=5, average="micro") if num_classes > 5 else None

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


class DistillationModule(TrainedModule):
    """Trains an image tower to give the embeddings that another gives; images only, no labels and no texts.

        loss = SigLipLoss()(F.normalize(student(images)), F.normalize(teacher(images)), logit_scale, logit_bias)

    Args:
        model: the student, images (N, 3, H, W) in [0, 1] → embeddings (N, D). A BcosifiedCLIP is trained without its
            text tower, and saved with what it has.
        teacher: likewise; not trained, in eval mode, and not saved.
        logit_scale, logit_bias: of the pairwise logits, constants; default 10 and −10.
        with_text: save the student's text tower, too; default False.
        options: see TrainedModule.

    Logs train_loss, val_loss and val_cosine, the mean cosine of student and teacher, per epoch.

    Source: B-cosification (2024), section on CLIP; SigLIP, arXiv:2303.15343 (open_clip's loss).
    """

    score = "val_cosine"

    def __init__(
        self, model: nn.Module, teacher: nn.Module, *, logit_scale: float = 10.0, logit_bias: float = -10.0,
        with_text: bool = False, **options,
    ):  # fmt: skip
        trained = model.without_text() if hasattr(model, "without_text") else model
        super().__init__(trained, **options)
        # In lists: neither is part of this module's state.
        self._saved, self._teacher = [model], [teacher.eval().requires_grad_(False)]
        self.logit_scale, self.logit_bias, self.with_text = logit_scale, logit_bias, with_text

    @property
    def saved(self) -> nn.Module:
        return self._saved[0]

    def save(self, folder) -> None:
        self.saved.save_pretrained(folder, **({"with_text": True} if self.with_text else {}))

    def on_fit_start(self) -> None:
        from open_clip.loss import SigLipLoss

        self._teacher[0].to(self.device, next(self.model.parameters()).dtype)
        # Every device compares its images with all of them.
        self.siglip = SigLipLoss(rank=self.trainer.global_rank, world_size=self.trainer.world_size)

    def _embeddings(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.laid_out(images)
        with torch.no_grad():
            teacher = self._teacher[0](images)
        # Normalised in float32: under autocast, cosines in 16 bits would lose what the loss is about.
        return F.normalize(self.model(images).float(), dim=-1), F.normalize(teacher.float(), dim=-1)

    def training_step(self, batch, batch_idx) -> torch.Tensor:
        images, _ = batch
        student, teacher = self._embeddings(images)
        loss = self.siglip(student, teacher, self.logit_scale, self.logit_bias)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch, batch_idx) -> None:
        images, _ = batch
        student, teacher = self._embeddings(images)
        options = dict(on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        self.log("val_loss", self.siglip(student, teacher, self.logit_scale, self.logit_bias), **options)
        self.log("val_cosine", (student * teacher).sum(1).mean(), prog_bar=True, **options)
