"""The papers' open questions asked of one's own model and data: `sweep`, behind `bcosify sweep`.

From one standard network, B-cosification is fine-tuned again and again, one choice changed at a time:

    b         B at once, from 1 to 3
    biases    removed before the first step, kept, or decayed; B at once or raised
    design    the six differences between standard and B-cos networks (B-cosification, table 1): channels of the input,
              its normalisation, normalisation of the weights, activations, B, biases

Each run gives a row: accuracy, GridPG of its explanations, and how far the conversion is from the standard network
before any training (relative change of the logits, share of images with the same class).

Written to the output folder, after every run: sweep.json (rows), sweep.md (the table), sweep.png (the figure); runs/
has the runs themselves, which are those of `finetune`. A sweep that was killed goes on when it is started again.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import bcosification
from bcosification.convert.preprocessing import Preprocessing
from bcosification.evaluation import grid_pointing_game
from bcosification.evaluation.benchmarking import aligned
from bcosification.evaluation.measuring import machine
from bcosification.explanation import bcos_contributions
from bcosification.json_files import json_text
from bcosification.nn import Normalize
from bcosification.nn.evaluation_mode import evaluation_mode
from bcosification.train.configuration import FinetuneConfig, with_absolute_paths
from bcosification.train.finetuning import data_for, finetune, takes_size
from bcosification.train.run_folder import check_writable, write
from bcosification.train.training import train
from bcosification.weights_files import load_state, read_weights

__all__ = ["B_VALUES", "DEMO", "QUESTIONS", "Sweep", "Variant", "sweep", "variants"]

QUESTIONS = ("b", "biases", "design")
B_VALUES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
SMALL = "small"
"""Name of the demo's network: a ResNet of one block a stage, 16 to 128 channels, for images of 64 pixels."""
DEMO = {
    "model": SMALL, "data": "scenes", "epochs": 3, "batch_size": 24, "limit_batches": 60, "lr": 1e-3,
    "warmup_epochs": 0.5,
}  # fmt: skip
"""Options of the sweep that runs in minutes on a CPU, without a download."""
DEMO_PRETRAINING = 5
PRETRAINING_RATE = 3e-3
COMPARED = 128  # images on which the conversion is compared with the standard network
GRID_IMAGES = 1000  # at most so many validation images are looked through for grids

# What leaves B-cosification as the papers have it, one at a time: label, options of FinetuneConfig.
_DESIGN = (
    ("3 channels", {"conversion": {"inverse": False}}),
    ("input not normalised", {"conversion": {"normalize_input": False}}),
    ("weights normalised", {"conversion": {"normalize_weight": True}}),
    ("no activations", {"conversion": {"activation": "remove"}}),
    ("B = 1", {"b": 1.0}),
    ("biases kept", {"bias": "keep"}),
)
_AS_PUBLISHED = "B-cosified"
# The same choices made for B-cos, each alone on the standard network: which of them keep what it computes?
_ALONE = (
    ("6 channels", {"inverse": True}),
    ("input not normalised", {"normalize_input": False}),
    ("weights normalised", {"normalize_weight": True}),
    ("no activations", {"activation": "remove"}),
    ("B = 2", {"b": 2.0}),
    ("no biases", {"bias": "remove"}),
    ("average pooling", {"pool": "average"}),
)
_EXACT = {"inverse": False, "b": 1.0, "bias": "keep", "pool": "keep", "head": "keep"}


@dataclass
class Variant:
    """One choice: its name, options of FinetuneConfig, and the questions that it belongs to, with its label in each."""

    name: str
    options: dict
    labels: dict[str, str] = field(default_factory=dict)


def variants(questions: Sequence[str], b_values: Sequence[float], epochs: int) -> list[Variant]:
    """The runs that answer `questions`, each once: what belongs to several questions has a label in each.

    Raises:
        ValueError: an unknown question, B < 1, none of either.
    """
    unknown = [question for question in questions if question not in QUESTIONS]
    if unknown or not questions:
        raise ValueError(f"sweep: expected ask in {QUESTIONS}, got {tuple(questions)}")
    if not b_values or not all(1 <= b < math.inf for b in b_values):
        raise ValueError(f"sweep: expected b_values >= 1, got {tuple(b_values)}")
    half = epochs / 2
    listed: dict[str, list[tuple[str, dict]]] = {
        "b": [(f"B = {b:g}", {"b": float(b)}) for b in sorted(set(b_values))],
        "biases": [
            ("removed at once", {}),
            ("kept", {"bias": "keep"}),
            ("decayed", {"bias": "decay", "bias_epochs": half}),
            ("removed, B raised", {"b_epochs": half}),
            ("decayed, B raised", {"bias": "decay", "bias_epochs": half, "b_epochs": half}),
        ],
        "design": [(_AS_PUBLISHED, {}), *_DESIGN],
    }
    found: list[Variant] = [Variant(_AS_PUBLISHED, {})]  # what all others are compared with comes first
    for question in QUESTIONS:
        for label, options in listed[question] if question in questions else []:
            options = {name: value for name, value in options.items() if (name, value) != ("b", 2.0)}
            same = next((variant for variant in found if variant.options == options), None)
            if same is None:
                same = Variant(f"biases {label}" if question == "biases" else label, options)
                found.append(same)
            same.labels[question] = label
    return found


@dataclass
class Sweep:
    """What a sweep found. Printing gives the table.

    Attributes:
        rows: one per variant and seed: variant, seed, labels (question → label), options, top1 (after the last epoch),
            best_top1, gridpg (None: too few confident images for a grid), grids, gridpg_chance, change (of the logits
            by the conversion, before training, relative; None: the standard network's are all 0, or one of them is no
            number), same_class (share of images), seconds.
        standard: of the standard network: top1 (absent: it has other classes than the data), and alone: what each
            choice does to it by itself, before any training: choice, change, same_class.
        settings: what decides the rows. machine: see `measuring.machine`.
        output: the folder.
    """

    rows: list[dict]
    standard: dict
    settings: dict
    machine: dict
    output: Path

    def __str__(self) -> str:
        lines = [*aligned([_HEAD, *_cells(self.rows)]), "", *aligned([_ALONE_HEAD, *self._alone()])]
        if any(row["gridpg"] is None for row in self.rows):
            lines += ["", "GridPG –: too few validation images are classified with confidence to make a grid of."]
        return "\n".join(lines)

    def _alone(self) -> list[list[str]]:
        alone = self.standard.get("alone", [])
        return [[row["choice"], _short(row["change"]), f"{100 * row['same_class']:.0f}"] for row in alone]

    def markdown(self) -> str:
        """The table and what it was measured with, as Markdown."""
        s, told = self.settings, self.machine
        table = [_HEAD, ["---"] * len(_HEAD), *_cells(self.rows)]
        alone = [_ALONE_HEAD, ["---"] * len(_ALONE_HEAD), *self._alone()]
        standard = self.standard.get("top1")
        reached = "" if standard is None else f"; the standard network: {100 * standard:.1f} %"
        return "\n".join(
            [
                *("| " + " | ".join(row) + " |" for row in table),
                "",
                f"`{s['model']}` on `{s['data']}`, {s['epochs']} epochs of fine-tuning, {s['seeds']} "
                f"{'seed' if s['seeds'] == 1 else 'seeds: mean ± half the range'}{reached}. "
                "GridPG: share of the positive contributions in the right cell of a 2 × 2 grid, chance 0.25. Change: "
                "of the logits by the conversion, before training, relative to them; same class: share of images that "
                "keep their class.",
                "",
                *("| " + " | ".join(row) + " |" for row in alone),
                "",
                "Each choice by itself, made in the standard network, before any training.",
                "",
                f"Measured on {told['device']}, {told['threads']} {'thread' if told['threads'] == 1 else 'threads'}, "
                f"torch {told['torch']}, {told['date']}.",
                "",
            ]
        )

    def draw(self, path: str | os.PathLike) -> None:
        """The figure: accuracy, GridPG and change of the logits of every choice, a line of panels per question."""
        _draw(self, Path(path))


_HEAD = ["choice", "accuracy (%)", "GridPG", "change", "same class (%)"]
_ALONE_HEAD = ["alone in the standard network", "change", "same class (%)"]


def _cells(rows: Sequence[dict]) -> list[list[str]]:
    cells = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        of = [row for row in rows if row["variant"] == name]
        cells.append(
            [
                name,
                _spread([row["top1"] for row in of], 100, 1),
                _spread([row["gridpg"] for row in of], 1, 2),
                _short(of[0]["change"]),
                f"{100 * of[0]['same_class']:.0f}",
            ]
        )
    return cells


def _short(change: float | None) -> str:
    return "–" if change is None else f"{change:.2g}"


def _spread(values: Sequence[float | None], scale: float, digits: int) -> str:
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {(max(known) - min(known)) / 2:.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{spread}"


def sweep(
    config: FinetuneConfig,
    *,
    network: nn.Module | None = None,
    ask: Sequence[str] = QUESTIONS,
    b_values: Sequence[float] = B_VALUES,
    seeds: int = 1,
    grids: int = 16,
    pretrain_epochs: int | None = None,
    say: Callable[[str], None] = print,
) -> Sweep:
    """Fine-tune a B-cosified network once per choice, from the same standard network, and compare.

    Args:
        config: of every run; its b, bias and their schedules are what is swept, so they stay at their defaults. output
            is the folder of the sweep. model "small" is the demo's network.
        network: a standard network of one's own, instead of what config.model names; it is not changed.
        ask: questions, of QUESTIONS.
        b_values: B's of question "b".
        seeds: repetitions of the fine-tuning, with seeds config.seed, config.seed + 1, …
        grids: of the grid pointing game at most.
        pretrain_epochs: train the standard network on the data first for so many epochs, with cross-entropy. Default:
            5 for "small", which has no weights to start from, else 0.
        say: called with a line per finished run; a progress bar shows on a terminal besides.

    Returns:
        A `Sweep`; its files are written. Rows that are in config.output's sweep.json already are not measured again,
        and a run that was interrupted goes on after its last complete epoch.

    Raises:
        ValueError: options that make no sense, or other settings than those of the sweep in config.output.
        Those of `finetune`.

    Example:
        >>> result = sweep(FinetuneConfig(**DEMO, output="runs/sweep"))
        >>> print(result)
    """
    swept = {name: getattr(config, name) for name in ("b", "b_epochs", "bias", "bias_epochs")}
    if swept != {"b": 2.0, "b_epochs": 0.0, "bias": "remove", "bias_epochs": 0.0}:
        raise ValueError(f"sweep: expected b, bias and their schedules as they are by default, got {swept}")
    config.check()
    for name, value in (("seeds", seeds), ("grids", grids)):
        if value < 1:
            raise ValueError(f"sweep: expected {name} >= 1, got {value}")
    if pretrain_epochs is None:
        pretrain_epochs = DEMO_PRETRAINING if network is None and config.model == SMALL else 0
    if pretrain_epochs < 0:
        raise ValueError(f"sweep: expected pretrain_epochs >= 0, got {pretrain_epochs}")
    listed = variants(ask, b_values, config.epochs)
    output = Path(config.output)
    check_writable(output)
    kept = {name: v for name, v in dataclasses.asdict(config).items() if name not in FinetuneConfig.MACHINE | {*swept}}
    more = {"seeds": seeds, "grids": grids, "pretrain_epochs": pretrain_epochs}
    settings = json.loads(json.dumps(with_absolute_paths(kept) | more))
    result = _earlier(output, settings) or Sweep([], {}, settings, machine(), output)

    wanted = [(variant, config.seed + i) for i in range(seeds) for variant in listed]
    for row in result.rows:  # a label may have come with a question that was asked later
        row["labels"] = next((v.labels for v in listed if v.name == row["variant"]), row["labels"])
    done = {(row["variant"], row["seed"]) for row in result.rows}
    missing = [(variant, seed) for variant, seed in wanted if (variant.name, seed) not in done]
    if missing or "alone" not in result.standard:
        network = _standard_network(config, network)
        output.mkdir(parents=True, exist_ok=True)
        _pretrained(config, network, pretrain_epochs, result, say)
        _run_all(config, network, missing, grids, result, say)
    rank = {variant.name: i for i, variant in enumerate(listed)}
    result.rows.sort(key=lambda row: (rank.get(row["variant"], len(rank)), row["seed"]))
    _save(result)
    return result


def _earlier(output: Path, settings: dict) -> Sweep | None:
    """The sweep in `output`, if there is one; ValueError if it was another."""
    path = output / "sweep.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    before = with_absolute_paths(content["settings"])
    # More seeds and other questions add rows; everything else would make rows that are not comparable.
    other = [name for name in before | settings if name != "seeds" and before.get(name) != settings.get(name)]
    if other:
        theirs, ours = (", ".join(f"{name}={options.get(name)!r}" for name in other) for options in (before, settings))
        raise ValueError(f"sweep: expected the settings of the sweep in {output}, {theirs}; got {ours}")
    return Sweep(content["rows"], content["standard"], settings, content["machine"], output)


def _save(result: Sweep) -> None:
    content = {name: getattr(result, name) for name in ("settings", "machine", "standard", "rows")}
    write(result.output / "sweep.json", json_text(content))
    if result.rows:
        write(result.output / "sweep.md", result.markdown())
        result.draw(result.output / "sweep.png")


def _standard_network(config: FinetuneConfig, own: nn.Module | None) -> nn.Module:
    if own is not None:
        return copy.deepcopy(own)
    if config.model == SMALL:
        from bcosification.train.miniature import small_resnet

        torch.manual_seed(config.seed)
        return small_resnet()
    from bcosification.convert.resolver import resolve

    return resolve(config.model, arch=config.arch, pretrained=config.pretrained, weights=config.weights)[0]


def _pretrained(config: FinetuneConfig, network: nn.Module, epochs: int, result: Sweep, say) -> None:
    """Trains the standard network in place, or takes it from the folder, and measures it."""
    from bcosification.convert.resolver import _new_head
    from bcosification.train.lightning_module import ClassificationModule

    start = time.perf_counter()
    converted = bcosification.bcosify(network, **config.conversion)
    datamodule = data_for(config, converted)
    if epochs and converted.num_classes != datamodule.num_classes:
        _new_head(network, datamodule.num_classes, config.model)
    known = Preprocessing.from_dict(converted.config)
    model = nn.Sequential(Normalize(known.mean, known.std), network)
    path = result.output / "standard.safetensors"
    if epochs and path.is_file():
        load_state(network, read_weights(path), str(path))
    elif epochs:
        module = ClassificationModule(
            model, datamodule.num_classes, loss="cross_entropy", lr=PRETRAINING_RATE, warmup_epochs=min(0.5, epochs / 4)
        )
        train(
            module, datamodule, epochs=epochs, seed=config.seed, accelerator=config.accelerator, devices=config.devices,
            limit_batches=config.limit_batches, progress=None,
        )  # fmt: skip
        _store(network, path)
    network.eval()
    if "top1" not in result.standard and (epochs or converted.num_classes == datamodule.num_classes):
        found = bcosification.evaluate(model, datamodule.val_dataloader(), topk=(1,), progress=False)
        result.standard["top1"] = found["top1"]
        say(f"standard network: accuracy {_percent(found['top1'])}  [{_since(start)}]")
    if "alone" not in result.standard:
        images, _ = _validation(datamodule, COMPARED)
        found = {choice: _changes(network, images, {**config.conversion, **_EXACT, **one}) for choice, one in _ALONE}
        listed = [{"choice": choice, "change": change, "same_class": same} for choice, (change, same) in found.items()]
        result.standard["alone"] = listed
    _save(result)


def _store(network: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    save_file({name: value.detach().contiguous() for name, value in network.state_dict().items()}, str(temporary))
    os.replace(temporary, path)


def _run_all(config, network, missing, grids: int, result: Sweep, say) -> None:
    from tqdm.auto import tqdm

    network.eval()
    with tqdm(total=len(missing), desc="sweep", unit="run", disable=None, leave=False) as bar:
        for number, (variant, seed) in enumerate(missing, 1):
            bar.set_postfix_str(variant.name)
            start = time.perf_counter()
            row = _run(config, network, variant, seed, grids, result.output)
            result.rows.append({**row, "seconds": time.perf_counter() - start})
            _save(result)
            bar.update()
            gridpg = "–" if row["gridpg"] is None else f"{row['gridpg']:.2f}"
            text = f"{variant.name}: accuracy {_percent(row['top1'])}, GridPG {gridpg}, change {_short(row['change'])}"
            bar.clear()
            say(f"{number} of {len(missing)}: {text}  [{_since(start)}]")


def _run(config, network, variant: Variant, seed: int, grids: int, output: Path) -> dict:
    """One run of `finetune`, gone on with where it was interrupted, and what is measured of it."""
    options = {**variant.options, "conversion": {**config.conversion, **variant.options.get("conversion", {})}}
    slug = re.sub(r"[^a-z0-9.]+", "-", variant.name.lower()).strip("-")
    folder = output / "runs" / f"{slug}-seed{seed}"
    one = dataclasses.replace(config, output=str(folder), seed=seed, progress=None, **options)
    trained = finetune(one, model=network, resume=(folder / "config.yaml").is_file())
    datamodule = data_for(one, trained.model)
    images, labels = _validation(datamodule, GRID_IMAGES)
    game = _grid_pointing_game(trained.model, images, labels, grids)
    begins = {"b": 1.0 if one.b_epochs > 0 else one.b, "bias": one.bias, **one.conversion}
    change, same = _changes(network, images[:COMPARED], begins)
    last = trained.history[-1]
    return {
        "variant": variant.name, "seed": seed, "labels": variant.labels, "options": variant.options,
        "top1": last["val_top1"], "best_top1": trained.best,
        "gridpg": None if game is None else game.mean, "grids": 0 if game is None else len(game) // 4,
        "gridpg_chance": 0.25, "change": change, "same_class": same,
    }  # fmt: skip


def _grid_pointing_game(model: nn.Module, images: Tensor, labels: Tensor, grids: int):
    """Of `grids` grids, or of as many as there are; None where there is not one."""
    rescale = not takes_size(model, 2 * images.shape[-1])
    for count in (grids, None):
        try:
            return grid_pointing_game(model, images, labels, bcos_contributions, count=count, rescale=rescale)
        except ValueError as error:
            if "expected confident images" not in str(error):
                raise
    return None


def _validation(datamodule, most: int) -> tuple[Tensor, Tensor]:
    """The first `most` validation images and their labels."""
    images, labels = [], []
    for x, y in datamodule.val_dataloader():
        images.append(x)
        labels.append(y)
        if sum(map(len, labels)) >= most:
            break
    return torch.cat(images)[:most], torch.cat(labels)[:most]


def _changes(network: nn.Module, images: Tensor, options: dict) -> tuple[float | None, float]:
    """How far a conversion with these options is from the standard network: relative change of the logits, and the
    share of images with the same class. The constant that is added to all logits is left out: it changes no class. The
    change is None where it has no value: of logits that are 0, or no numbers."""
    converted = bcosification.bcosify(network, **options, logit_bias=None)
    known = Preprocessing.from_dict(converted.config)
    plain = nn.Sequential(Normalize(known.mean, known.std), network)
    like = next(network.parameters())
    images = images.to(like.device, like.dtype)
    with torch.no_grad(), evaluation_mode(plain), evaluation_mode(converted):
        expected, got = plain(images), converted(images)
    change = float((got - expected).norm() / expected.norm())
    return (change if math.isfinite(change) else None), float((got.argmax(1) == expected.argmax(1)).double().mean())


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _since(start: float) -> str:
    return f"{time.perf_counter() - start:.0f} s"


# --- the figure -------------------------------------------------------------------------------------------------------

_TITLES = {"b": "exponent B", "biases": "biases and schedules", "design": "one design choice at a time"}
_MEASURES = (
    ("accuracy after fine-tuning (%)", "top1", 100.0),
    ("GridPG", "gridpg", 1.0),
    ("class kept in the conversion (%)", "same_class", 100.0),
)


def _draw(result: Sweep, path: Path) -> None:
    from matplotlib.figure import Figure

    asked = [question for question in QUESTIONS if any(question in row["labels"] for row in result.rows)]
    if not asked:
        return
    figure = Figure(figsize=(11, 3.0 * len(asked) + 0.4), layout="constrained")
    for axes, question in zip(figure.subplots(len(asked), 3, squeeze=False), asked, strict=True):
        groups: dict[str, list[dict]] = {}
        for row in result.rows:
            if question in row["labels"]:
                groups.setdefault(row["labels"][question], []).append(row)
        for axis, (title, key, scale) in zip(axes, _MEASURES, strict=True):
            if question == "design" and key == "same_class":
                title = "class kept by a choice alone (%)"
                alone = {row["choice"]: [row] for row in result.standard["alone"]}
                _panel(axis, question, alone, key, scale, first="tab:blue", labelled=True)
            else:
                _panel(axis, question, groups, key, scale, labelled=key == "top1")
            axis.set_title(title, fontsize=9)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
            reference = result.standard.get("top1") if key == "top1" else 0.25 if key == "gridpg" else None
            if reference is not None:
                line = axis.axhline if question == "b" else axis.axvline
                line(scale * reference, color="0.5", linestyle="--", linewidth=1)
        axes[0].set_ylabel(_TITLES[question], fontsize=9)
    figure.suptitle(
        f"{result.settings['model']} on {result.settings['data']}; dashed: the standard network's accuracy, and chance",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)


def _panel(
    axis,
    question: str,
    groups: dict[str, list[dict]],
    key: str,
    scale: float,
    *,
    labelled: bool,
    first: str = "tab:red",
) -> None:
    """Question b: a line over B. Others: a bar per choice. Whiskers: the range over seeds."""
    middle, low, high, labels = [], [], [], list(groups)
    for rows in groups.values():
        values = [scale * row[key] for row in rows if row[key] is not None]
        middle.append(statistics.fmean(values) if values else math.nan)  # a place stays empty, so that labels fit
        low.append(middle[-1] - min(values, default=math.nan))
        high.append(max(values, default=math.nan) - middle[-1])
    if question == "b":
        places = [float(label.partition("=")[2]) for label in labels]
        order = sorted(range(len(places)), key=places.__getitem__)
        series = [[values[i] for i in order] for values in (places, middle, low, high)]
        axis.errorbar(series[0], series[1], yerr=series[2:], marker="o", color="tab:red", capsize=2)
        axis.set_xlabel("B", fontsize=8)
    else:
        places = range(len(labels))
        colors = [first if i == 0 else "tab:blue" for i in places]  # the first is B-cosification as published
        axis.barh(places, middle, xerr=[low, high], color=colors, height=0.7, error_kw={"linewidth": 1})
        axis.set_yticks(places, labels if labelled else [""] * len(labels))
        axis.invert_yaxis()
        if key == "top1":
            axis.set_xlim(max(0, min(middle) - 10), 100)
