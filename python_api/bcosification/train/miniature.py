"""The paper in miniature: B-cosification against B-cos networks from scratch, on a CPU, in minutes.

    python -m bcosification.train.miniature [--out demo_output] [--epochs 6] [--seeds 2]

On `scenes` (tinted handwritten digits on photographs), with a small ResNet:

    standard         a plain network, pretrained with cross-entropy
    bcosified        that network B-cosified and fine-tuned                       (the paper's method)
    bcos_v2          a B-cos network from scratch: weights normalised, no ReLU, [x, 1 - x] not normalised (its baseline)
    random_weights   the B-cosified network from random weights                   (ablation: what pretraining is worth)

The last three train for the same number of epochs on the same images with the same loss. Reported: accuracy, t (the
first epoch in which `bcosified` reaches the final accuracy of `bcos_v2`) and the speed-up epochs / t, how well
explanations point at the digit (EPG: into its box; GridPG: into its cell of a 2 x 2 grid) compared with post-hoc
attributions of the standard network, and seconds per epoch with fused layers, with the peer's layers, and plain.

Written to --out: table.md, results.json, explanations.png, grid.png, training_curves.png.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import bcosification
from bcosification import explanation as xp
from bcosification.convert.blocks import unfuse_blocks
from bcosification.evaluation import energy_pointing_game, grid_pointing_game
from bcosification.evaluation.measuring import machine
from bcosification.train.data import ImageDataModule, ImageTensors, _Resized, scenes
from bcosification.train.lightning_module import ClassificationModule
from bcosification.train.run_folder import check_writable
from bcosification.train.training import train

__all__ = ["main", "run", "small_resnet", "with_peer_layers"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 10
SMOOTH = 3  # pixels; the papers' 15 at 224 are about 4 at 64
ARMS = {
    "bcosified": "B-cosified",
    "bcos_v2": "B-cos v2 from scratch",
    "random_weights": "B-cosified, random weights",
}
COLORS = {"standard": "tab:gray", "bcosified": "tab:red", "bcos_v2": "tab:blue", "random_weights": "tab:orange"}
# Peak learning rates (Adam). Fine-tuning takes a smaller one than training from scratch, as in the papers.
RATES = {"standard": 3e-3, "bcosified": 1e-3, "bcos_v2": 3e-3, "random_weights": 3e-3}


def small_resnet(width: int = 16, num_classes: int = CLASSES) -> nn.Module:
    """torchvision's ResNet (its class, its blocks) with one BasicBlock a stage, `width` to 8·`width` channels, and a
    3 x 3 stem of stride 1 for small images; random weights as torchvision draws them."""
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, width, 3, stride=1, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    channels = width
    for stage in range(4):
        planes, stride = width * 2**stage, 1 if stage == 0 else 2
        shortcut = None
        if stage > 0:
            shortcut = nn.Sequential(nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        setattr(model, f"layer{stage + 1}", nn.Sequential(BasicBlock(channels, planes, stride, shortcut)))
        channels = planes
    model.fc = nn.Linear(channels, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.to(memory_format=torch.channels_last)


def with_peer_layers(model: nn.Module) -> nn.Module:
    """A copy of a B-cosified model in which the package bcos does what our layers do: the same function, its speed.

    bcos's layers normalise their weights; for layers that do not, the convolution inside is a plain nn.Conv2d, as in
    B-cosification's code.
    """
    from bcos.modules.bcosconv2d import BcosConv2d
    from bcos.modules.norms.uncentered_norms import BatchNormUncentered2d

    def pair(value):
        return value[0] if isinstance(value, tuple) and value[0] == value[1] else value

    model = unfuse_blocks(copy.deepcopy(model))
    for name, module in list(model.named_modules()):
        if isinstance(module, bcosification.nn.BcosConv2d):
            shape = (module.in_channels, module.out_channels, module.kernel_size, pair(module.stride))
            new = BcosConv2d(*shape, padding=pair(module.padding), groups=module.groups, b=module.b)
            if not module.normalize_weight:
                new.linear = nn.Conv2d(*shape, padding=module.padding, groups=module.groups, bias=False)
            new.linear.weight = module.weight
        elif isinstance(module, bcosification.nn.BatchNormUncentered2d):
            new = BatchNormUncentered2d(module.num_features, eps=module.eps, momentum=module.momentum)
            new.load_state_dict(module.state_dict(), strict=False)
            new.weight, new.bias = module.weight, module.bias
        else:
            continue
        model.set_submodule(name, new.train(module.training))
    return model


def _standard(network: nn.Module) -> nn.Module:
    return nn.Sequential(bcosification.nn.Normalize(MEAN, STD), network)


def _converted(arm: str, network: nn.Module) -> nn.Module:
    options = dict(mean=MEAN, std=STD)
    if arm == "bcos_v2":
        options |= dict(normalize_weight=True, activation="remove", normalize_input=False)
    return bcosification.bcosify(network, **options)


def _first_epoch_copy():
    from lightning.pytorch import Callback

    class FirstEpoch(Callback):
        """Keeps the model as it is after one epoch."""

        model = None

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                self.model = copy.deepcopy(pl_module.model).eval()

    return FirstEpoch()


class _Study:
    """One seed: four networks, their curves, their localisation."""

    def __init__(self, seed: int, options: argparse.Namespace, say: Callable[[str], None]):
        self.seed, self.options, self.say = seed, options, say
        train_part = scenes("train", count=options.train_images)
        self.val = scenes("val", count=options.val_images)
        shifted = ImageTensors(
            train_part.images, train_part.labels, train_part.class_names, transform=_Resized(None, shift=4)
        )
        self.data = (shifted, self.val)
        self.histories: dict[str, list[dict]] = {}
        self.models: dict[str, nn.Module] = {}
        self.first_epoch: nn.Module | None = None
        self.initial: nn.Module | None = None

    def datamodule(self) -> ImageDataModule:
        return ImageDataModule(*self.data, self.val.class_names, batch_size=self.options.batch_size, seed=self.seed)

    def fit(self, arm: str, model: nn.Module, epochs: int, loss: str, callbacks=()) -> None:
        start = time.perf_counter()
        module = ClassificationModule(model, CLASSES, loss=loss, lr=RATES[arm], warmup_epochs=min(0.5, epochs / 4))
        rows = train(
            module, self.datamodule(), epochs=epochs, seed=self.seed, callbacks=callbacks, accelerator="cpu", devices=1,
            progress=None,
        )  # fmt: skip
        self.histories[arm], self.models[arm] = rows, model.eval()
        curve = " ".join(f"{100 * row['val_top1']:.1f}" for row in rows)
        self.say(f"seed {self.seed}: {arm:14} accuracy after each epoch (%): {curve}  [{_elapsed(start)}]")

    def train_all(self) -> None:
        options = self.options
        torch.manual_seed(self.seed)
        network = small_resnet(options.width)
        scratch = copy.deepcopy(network)  # the arms from scratch start from the weights that pretraining started from
        self.fit("standard", _standard(network), options.pretrain_epochs, "cross_entropy")
        network.eval()
        bcosified = _converted("bcosified", network)
        self.initial = copy.deepcopy(bcosified)
        keep = _first_epoch_copy()
        self.fit("bcosified", bcosified, options.epochs, "bce_uniform", [keep])
        self.first_epoch = keep.model
        for arm in ("bcos_v2", "random_weights"):
            self.fit(arm, _converted(arm, scratch), options.epochs, "bce_uniform")

    def localisation(self) -> dict[str, dict[str, float | None]]:
        """method → EPG, GridPG (means over images and grids, None where a network knows too few classes)."""
        start = time.perf_counter()
        images, labels = self.val.tensors()
        count = min(self.options.localisation_images, len(labels))
        result: dict[str, dict[str, float | None]] = {}

        def integrated(model, x, y):
            return xp.integrated_gradients(model, x, y, steps=self.options.integration_steps)

        methods = [
            ("bcosified", "bcosified", xp.bcos_contributions, "sigmoid"),
            ("bcos_v2", "bcos_v2", xp.bcos_contributions, "sigmoid"),
            ("input_x_gradient", "standard", xp.input_x_gradient, "softmax"),
            ("grad_cam", "standard", xp.grad_cam, "softmax"),
            ("integrated_gradients", "standard", integrated, "softmax"),
        ]
        for method, arm, attribute, probability in methods:
            model = self.models[arm]
            epg = energy_pointing_game(model, images[:count], labels[:count], self.val.boxes[:count], attribute)
            try:
                grid = grid_pointing_game(
                    model, images, labels, attribute, count=self.options.grids, probability=probability
                )
            except ValueError as error:
                if "expected confident images" not in str(error):
                    raise
                grid = None
            result[method] = {"epg": epg.mean, "gridpg": None if grid is None else grid.mean}
            result["chance"] = {"epg": epg.chance, "gridpg": 0.25}
        scores = ", ".join(f"{name} {score['epg']:.2f}" for name, score in result.items())
        self.say(f"seed {self.seed}: EPG {scores}  [{_elapsed(start)}]")
        return result


def seconds_per_epoch(study: _Study, steps: int = 10) -> dict[str, float | None]:
    """Training time of an epoch, from the median step; contenders take turns, each on its own copy.

    A step is zero_grad, forward, loss, backward and Adam, on one batch of the data set.
    """
    options = study.options
    network = study.models["standard"][1]
    ours = _converted("bcosified", network)
    contenders = {"plain": copy.deepcopy(study.models["standard"]), "fused": ours, "peer": None}
    if importlib.util.find_spec("bcos") is not None:
        contenders["peer"] = with_peer_layers(ours)
    images, labels = next(iter(study.datamodule().val_dataloader()))
    images = images.contiguous(memory_format=torch.channels_last)
    loss = bcosification.train.losses.UniformOffLabelsBCE()
    optimizers = {name: torch.optim.Adam(m.train().parameters(), lr=1e-4) for name, m in contenders.items() if m}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    first: dict[str, float] = {}
    for step in range(steps + 2):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            value = loss(contenders[name](images), labels)
            value.backward()
            optimizer.step()
            if step >= 2:
                times[name].append(time.perf_counter() - start)
            first.setdefault(name, value.item())
    if "peer" in first and not math.isclose(first["peer"], first["fused"], rel_tol=1e-4):
        raise RuntimeError(f"the peer's layers gave another loss than ours: {first['peer']} and {first['fused']}")
    batches = options.train_images // options.batch_size
    return {name: batches * statistics.median(times[name]) if name in times else None for name in contenders}


# --- the table --------------------------------------------------------------------------------------------------------


def _elapsed(start: float) -> str:
    return f"{time.perf_counter() - start:.0f} s"


def _spread(values: Sequence[float | None], scale: float = 1.0, digits: int = 1) -> str:
    """mean ± half the range over the seeds; "–" where a value is missing in every seed."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{statistics.fmean(known):.{digits}f}"
    if len(values) > 1:
        text += f" ± {(max(known) - min(known)) / 2:.{digits}f}"
    if len(known) < len(values):
        text += f" ({len(known)} of {len(values)} seeds)"
    return text


def first_epoch_at(history: Sequence[dict], accuracy: float) -> int | None:
    """The first epoch (from 1) whose validation accuracy is at least `accuracy`, or None."""
    return next((row["epoch"] for row in history if row["val_top1"] >= accuracy), None)


def summarise(studies: Sequence[_Study], localisation: Sequence[dict], seconds: dict, options) -> tuple[str, dict]:
    """The table as Markdown, and everything in it as numbers."""
    accuracy = {arm: [study.histories[arm][-1]["val_top1"] for study in studies] for arm in ("standard", *ARMS)}
    reached = [
        first_epoch_at(study.histories["bcosified"], study.histories["bcos_v2"][-1]["val_top1"]) for study in studies
    ]
    speedup = [None if t is None else options.epochs / t for t in reached]

    def scores(method: str) -> str:
        found = [[result[method][measure] for result in localisation] for measure in ("gridpg", "epg")]
        return f"{_spread(found[0], digits=2)} | {_spread(found[1], digits=2)}"

    nothing = "– | –"
    lines = [
        "| network | explained by | accuracy (%) | t (epochs) | speed-up | GridPG | EPG |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| standard, pretrained {options.pretrain_epochs} epochs | input × gradient | "
        f"{_spread(accuracy['standard'], 100)} | | | {scores('input_x_gradient')} |",
        f"| | Grad-CAM | | | | {scores('grad_cam')} |",
        f"| | Integrated Gradients | | | | {scores('integrated_gradients')} |",
        f"| **B-cosified**, fine-tuned {options.epochs} epochs | W(x) | {_spread(accuracy['bcosified'], 100)} | "
        f"{_spread(reached)} | {_spread(speedup)} | {scores('bcosified')} |",
        f"| B-cos v2 from scratch, {options.epochs} epochs | W(x) | {_spread(accuracy['bcos_v2'], 100)} | "
        f"{options.epochs} | 1.0 | {scores('bcos_v2')} |",
        f"| B-cosified, random weights, {options.epochs} epochs | | {_spread(accuracy['random_weights'], 100)} | | | "
        f"{nothing} |",
        f"| chance | | {100 / CLASSES:.1f} | | | {scores('chance')} |",
    ]
    shown = {name: "–" if value is None else f"{value:.1f} s" for name, value in seconds.items()}
    ratios = {
        name: "" if value is None or name == "plain" else f" ({value / seconds['plain']:.2f} × plain)"
        for name, value in seconds.items()
    }
    text = "\n".join(
        [
            "# The paper in miniature",
            "",
            f"`scenes`: {options.train_images} training and {options.val_images} validation images of 64 × 64 pixels, "
            f"{CLASSES} classes; ResNet with {options.width} to {8 * options.width} channels; {options.seeds} seeds: "
            "mean ± half the range.",
            "",
            *lines,
            "",
            "t: first epoch in which the B-cosified network is as accurate as B-cos v2 is in the end; speed-up: "
            f"{options.epochs} / t; – if never. GridPG: share of positive contributions in the right cell of a 2 × 2 "
            f"grid, {options.grids} grids; EPG: inside the digit's box, "
            f"{min(options.localisation_images, options.val_images)} images.",
            "",
            f"Seconds per epoch of training (median step, contenders in turn): plain {shown['plain']}, fused "
            f"{shown['fused']}{ratios['fused']}, with the layers of the package bcos {shown['peer']}{ratios['peer']}.",
            "",
            f"Measured on {_machine()}.",
            "",
        ]
    )
    numbers = {
        "options": vars(options),
        "accuracy": accuracy,
        "t": reached,
        "speedup": speedup,
        "localisation": list(localisation),
        "seconds_per_epoch": seconds,
        "histories": [study.histories for study in studies],
        "machine": _machine(),
    }
    return text, numbers


def _machine() -> str:
    told = machine()
    return f"{told['device']}, {told['threads']} threads, torch {told['torch']}, {told['date']}"


# --- the pictures -----------------------------------------------------------------------------------------------------


def draw_explanations(study: _Study, path: Path, rows: int = 6) -> None:
    """The same images (the first of each of `rows` classes, not chosen) through the stages of B-cosification."""
    images, labels = study.val.tensors()
    chosen = [int((labels == label).nonzero()[0]) for label in labels.unique().tolist()[:rows]]
    x, y = images[chosen], labels[chosen]
    stages = {
        "pretrained,\nconverted": study.initial,
        "B-cosified,\n1 epoch": study.first_epoch,
        f"B-cosified,\n{study.options.epochs} epochs": study.models["bcosified"],
        f"B-cos v2 from scratch,\n{study.options.epochs} epochs": study.models["bcos_v2"],
    }
    explained = {name: bcosification.explain(model, x, y) for name, model in stages.items()}
    final = explained[list(stages)[2]]
    pictures, texts = [], []
    for i in range(len(chosen)):
        pictures.append(
            [
                xp.pictures.image_picture(x[i]),
                *(explanation.image(i, smooth=SMOOTH) for explanation in explained.values()),
                final.contribution_map(i),
            ]
        )
        texts.append([None, *(_confidence(explanation, i) for explanation in explained.values()), None])
    figure = xp.picture_grid(
        pictures,
        row_labels=[f"class {int(label)}" for label in y],
        column_labels=["image", *stages, f"contributions,\n{study.options.epochs} epochs"],
        cell_labels=texts,
        title="What each network sees in the digit: the colours of W(x), opaque where it weighs most",
    )
    xp.save_figure(figure, path)


def _confidence(explanation, i: int) -> str:
    target, predicted = int(explanation.targets[i]), int(explanation.logits[i].argmax())
    probability = float(explanation.logits[i, target].sigmoid())
    return f"p = {probability:.2f}" + ("" if predicted == target else f", says {predicted}")


def draw_grid(study: _Study, path: Path) -> None:
    """A 2 x 2 grid of confidently classified images, and what every method says of each of its classes."""
    images, labels = study.val.tensors()
    model = study.models["bcosified"]
    with torch.no_grad():
        logits = torch.cat([model(part) for part in images.split(100)])
    order = logits.gather(1, labels[:, None])[:, 0].sort(descending=True).indices
    cells: dict[int, int] = {}
    for i in order.tolist():
        if len(cells) < 4:
            cells.setdefault(int(labels[i]), i)
    targets, chosen = list(cells), list(cells.values())
    rows = [torch.cat(list(images[chosen[2 * r : 2 * r + 2]]), dim=2) for r in range(len(chosen) // 2)]
    grid = torch.cat(rows, dim=1)[None].expand(len(chosen), -1, -1, -1)
    y = torch.tensor(targets)
    pictures, names = [], []
    size = images.shape[-1]
    for arm in ("bcosified", "bcos_v2"):
        explanation = bcosification.explain(study.models[arm], grid, y)
        names.append(f"{ARMS[arm]}:\nW(x)")
        pictures.append([explanation.image(i, smooth=SMOOTH) for i in range(len(chosen))])
        names.append(f"{ARMS[arm]}:\ncontributions")
        pictures.append([explanation.contribution_map(i) for i in range(len(chosen))])
    for name, attribute in (
        ("standard:\nGrad-CAM", xp.grad_cam),
        ("standard:\nIntegrated Gradients", xp.integrated_gradients),
    ):
        maps = attribute(study.models["standard"], grid, y)
        names.append(name)
        pictures.append([xp.contribution_picture(maps[i]) for i in range(len(chosen))])
    pictures.insert(0, [xp.pictures.image_picture(grid[0])] * len(chosen))
    rows = [[_framed(picture, i, size) for i, picture in enumerate(row)] for row in pictures]
    figure = xp.picture_grid(
        rows,
        row_labels=["the grid", *names],
        column_labels=[f"explained: {target}" for target in targets],
        title="A grid of four classes: does the explanation of a class stay in its cell (framed)?",
    )
    xp.save_figure(figure, path)


def _framed(picture, cell: int, size: int):
    """The picture on white with a thin frame around one cell of the 2 x 2 grid."""
    picture = xp.pictures.on_background(picture).copy()
    top, left = (cell // 2) * size, (cell % 2) * size
    green = (0.0, 0.6, 0.2, 1.0)
    picture[top : top + size, [left, left + size - 1]] = green
    picture[[top, top + size - 1], left : left + size] = green
    return picture


def draw_curves(studies: Sequence[_Study], path: Path) -> None:
    """Validation accuracy after each epoch: mean of the seeds, and their range as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    epochs = range(1, studies[0].options.epochs + 1)
    for arm, name in ARMS.items():
        curves = [[100 * row["val_top1"] for row in study.histories[arm]] for study in studies]
        columns = list(zip(*curves, strict=True))
        axis.plot(epochs, [statistics.fmean(c) for c in columns], marker="o", color=COLORS[arm], label=name)
        axis.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=COLORS[arm], alpha=0.15)
    final = statistics.fmean(100 * study.histories["bcos_v2"][-1]["val_top1"] for study in studies)
    axis.axhline(final, color=COLORS["bcos_v2"], linestyle=":", linewidth=1)
    reached = [
        first_epoch_at(study.histories["bcosified"], study.histories["bcos_v2"][-1]["val_top1"]) for study in studies
    ]
    if None not in reached and max(reached) < epochs[-1]:
        t = statistics.fmean(reached)
        axis.annotate("", (t, final), (epochs[-1], final), arrowprops={"arrowstyle": "->", "color": COLORS["bcos_v2"]})
        axis.annotate(
            f"as accurate after {t:g} instead of {epochs[-1]} epochs", (t, final), (4, -12),
            textcoords="offset points", ha="left", fontsize=8, color=COLORS["bcos_v2"],
        )  # fmt: skip
    start = statistics.fmean(100 * study.histories["standard"][-1]["val_top1"] for study in studies)
    axis.axhline(
        start, color=COLORS["standard"], linestyle="--", linewidth=1,
        label=f"standard network, pretrained {studies[0].options.pretrain_epochs} epochs",
    )  # fmt: skip
    axis.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 102), title="Training on scenes")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)


# --- the command ------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, say: Callable[[str], None] = print) -> dict:
    """Everything: trains, measures, draws; returns the numbers of the table."""
    out = Path(options.out)
    check_writable(out)
    start = time.perf_counter()
    studies, localisation = [], []
    for seed in range(options.seeds):
        study = _Study(seed, options, say)
        study.train_all()
        localisation.append(study.localisation())
        studies.append(study)
    seconds = seconds_per_epoch(studies[0], steps=options.timing_steps)
    text, numbers = summarise(studies, localisation, seconds, options)
    out.mkdir(parents=True, exist_ok=True)
    draw_explanations(studies[0], out / "explanations.png")
    draw_grid(studies[0], out / "grid.png")
    draw_curves(studies, out / "training_curves.png")
    numbers["total_seconds"] = time.perf_counter() - start
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    say("\n" + text)
    say(f"{_elapsed(start)} in all; table, numbers and pictures are in {out}{os.sep}")
    return numbers


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bcosification.train.miniature",
        description="The B-cosification paper in miniature: train, measure and draw, in minutes on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--out", default="demo_output", help="output folder; files in it are overwritten")
    result.add_argument("--epochs", type=int, default=6, help="of fine-tuning, and of training from scratch")
    result.add_argument("--pretrain-epochs", type=int, default=5, help="of the standard network")
    result.add_argument("--seeds", type=int, default=2, help="repetitions")
    result.add_argument("--train-images", type=int, default=1600, help="scenes to train on")
    result.add_argument("--val-images", type=int, default=500, help="scenes to measure accuracy on")
    result.add_argument("--width", type=int, default=16, help="channels of the first stage")
    result.add_argument("--batch-size", type=int, default=24, help="images per step")
    result.add_argument("--localisation-images", type=int, default=120, help="images of the energy pointing game")
    result.add_argument("--grids", type=int, default=16, help="grids of the grid pointing game")
    result.add_argument("--integration-steps", type=int, default=16, help="of Integrated Gradients when measuring")
    result.add_argument("--timing-steps", type=int, default=10, help="training steps timed for seconds per epoch")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    for name, value in vars(options).items():
        if isinstance(value, int) and value < 1:
            print(f"expected --{name.replace('_', '-')} >= 1, got {value}", file=sys.stderr)
            return 2
    missing = [name for name in ("lightning", "torchvision", "sklearn", "matplotlib", "captum")
               if importlib.util.find_spec(name) is None]  # fmt: skip
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install 'bcos-kernels[train,explain]'", file=sys.stderr)
        return 1
    run(options, lambda text: print(text, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
