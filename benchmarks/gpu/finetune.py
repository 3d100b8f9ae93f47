"""The stage `finetune` of `make gpu`: a B-cosified ResNet-50 fine-tuned for a few hundred steps on made-up images,
through the input pipeline that `bcosify finetune` uses, beside the plain network and the peers' formulas.

Rows, a contender each: images_per_s with the pipeline and its ratio of times to plain's; waiting, the share of the time
that the host waited for images; resident_ms and its ratio, a step on images that are on the device already; first and
last loss. Status "wrong": a loss that is not finite, memory that grows, or an untrained network of ours whose loss is
not the peers'. Then the kernels that take the most time, as shares of a step.
"""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bcosification.evaluation.measuring import interleaved, summarized

from .profile import MOST, kernel_times
from .running import OutOfTime, Run

CLASSES = 8
MIB = 2**20


def make_images(folder: Path, count: int, edge: int) -> None:
    """JPEG files in train/ and val/, one folder a class: smooth noise of about the size and the bytes of ImageNet's."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, n in (("train", count), ("val", CLASSES)):
        for i in range(n):
            place = folder / part / f"class{i % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            size = tuple(int(v) for v in rng.integers(edge, 2 * edge, 2))
            coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(place / f"{i}.jpg", quality=90)


def _batches(datamodule) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    loader = datamodule.train_dataloader()
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


class Training:
    """One contender: its model, its optimiser, and what was seen of it."""

    def __init__(self, model: nn.Module, device: torch.device, autocast: torch.dtype | None):
        from bcosification.train.losses import build_loss

        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.loss_of, self.device, self.autocast = build_loss("bce_uniform"), device, autocast
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.losses: list[Tensor] = []
        self.seconds: list[float] = []
        self.waited = 0.0
        self.memory: list[int] = []

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.model(images)
        return self.loss_of(logits.float(), labels)

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(images, labels)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())  # nothing waits for it

    def run(self, batches: Iterator, steps: int) -> None:
        """``steps`` steps, timed as a whole."""
        start = time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            images, labels = next(batches)
            self.waited += time.perf_counter() - before
            self.step(*on_device(images, labels, self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.memory.append(torch.cuda.memory_allocated())
        self.seconds.append(time.perf_counter() - start)

    def wrong(self) -> str:
        """What is wrong with the run, or nothing."""
        if not bool(torch.stack(self.losses).isfinite().all()):
            return "a loss that is not finite"
        if self.memory and max(self.memory) > 1.005 * self.memory[0]:
            grown = (max(self.memory) - self.memory[0]) / MIB
            return f"memory that grows: {grown:.1f} MiB from the first steps on"
        return ""


def on_device(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return images, labels.to(device, non_blocking=True)


def kernel_shares(training: Training, batch: tuple[Tensor, Tensor], steps: int) -> dict[str, float]:
    """Kernel (on a CPU: operation) → its share of the time that all take, the largest first; not the small ones."""
    times = kernel_times(lambda: training.step(*batch), steps, training.device)
    total = sum(ms for ms, _ in times.values())
    return {name: ms / total for name, (ms, _) in itertools.islice(times.items(), MOST)}


def finetune(run: Run) -> None:
    missing = [name for name in ("torchvision", "lightning", "torchmetrics", "PIL")
               if importlib.util.find_spec(name) is None]  # fmt: skip
    if missing:
        run.add("finetune", "all", status="not run", reason=f"needs {', '.join(missing)}")
        return
    import torchvision

    name, batch, size, rounds, steps, dtype = ("resnet18", 4, 64, 2, 2, "float32") if run.rehearsal else (
        "resnet50", 256, 224, 5, 50, "bfloat16")  # fmt: skip
    label = f"{name}, {dtype}, batch {batch}, {size} pixels, {rounds * steps} steps"
    if not run.due(label, "plain"):
        return
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), 4 * batch, size)
        _finetune(run, label, folder, getattr(torchvision.models, name), batch, size, rounds, steps, dtype)


def _finetune(run, label, folder, architecture, batch, size, rounds, steps, dtype) -> None:
    import bcosification
    from bcosification.evaluation.peer_style import peer_style
    from bcosification.train.data import build_datamodule

    torch.manual_seed(0)
    datamodule = build_datamodule(
        folder, image_size=size, batch_size=batch, num_workers=0 if run.rehearsal else None
    )  # fmt: skip
    batches = _batches(datamodule)
    plain = architecture(num_classes=CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = bcosification.bcosify(plain, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    autocast = None if dtype == "float32" else getattr(torch, dtype)
    models = {"plain": plain, "peer": peer_style(converted), "ours": converted}
    trainings = {who: Training(model, run.device, autocast) for who, model in models.items()}
    resident = on_device(*next(batches), run.device)
    with torch.no_grad():
        losses = {who: float(training.loss(*resident)) for who, training in trainings.items()}
    off = abs(losses["ours"] - losses["peer"]) / abs(losses["peer"])
    if not off < (1e-4 if autocast is None else 2e-2):
        reason = f"a loss of {losses['ours']:.6g}, the peers' {losses['peer']:.6g}"
        run.add(label, "ours", status="wrong", reason=reason)
        return
    for training in trainings.values():  # what is compiled or allocated once
        training.run(batches, 2)
        for seen in (training.seconds, training.memory, training.losses):
            seen.clear()
        training.waited = 0.0
    for _ in range(rounds):
        for training in trainings.values():
            if run.left() <= 0:
                raise OutOfTime(label)
            training.run(batches, steps)
    with_pipeline = summarized({who: training.seconds for who, training in trainings.items()})
    alone = {who: lambda t=training: t.step(*resident) for who, training in trainings.items()}
    alone = summarized(interleaved(alone, rounds=2 if run.rehearsal else 20, device=run.device))
    for who, training in trainings.items():
        for kernel, share in kernel_shares(training, resident, 1 if run.rehearsal else 5).items():
            run.add(f"{label}: kernels of {who}", kernel, share_of_step=share)
    for who in reversed(trainings):  # plain last: the case counts as measured by it
        training, values, wrong = trainings[who], with_pipeline[who], trainings[who].wrong()
        memory = {"memory_MiB": training.memory[-1] / MIB} if training.memory else {}
        run.add(
            label, who, status="wrong" if wrong else "right", images_per_s=batch * steps / values["median_ms"] * 1e3,
            ratio=values["ratio"], ratio_q1=values["ratio_q1"], ratio_q3=values["ratio_q3"],
            waiting=training.waited / sum(training.seconds), resident_ms=alone[who]["median_ms"],
            resident_ratio=alone[who]["ratio"], first_loss=float(training.losses[0]),
            last_loss=float(training.losses[rounds * steps - 1]), **memory, **({"reason": wrong} if wrong else {}),
        )  # fmt: skip
