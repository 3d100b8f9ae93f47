"""Tables and plots of the rows of `make gpu`, and whether the targets are met. Nothing is measured here.

Without rows every table says so. What a table shows of a row is named by the stage that writes it: gpu/layers.py,
gpu/networks.py, gpu/choices.py, gpu/finetune.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .protocol import geometric_mean, load_rows

NOTHING = "Nothing has been measured on a GPU yet."
PLOT = "gpu_layers.png"
PRECISIONS = ("bfloat16", "float16", "tf32", "float32")
TITLES = {
    "resnet50": "ResNet-50",
    "densenet121": "DenseNet-121",
    "vit_b": "ViT-B/16",
    "vit_s": "ViT-S/16",
    "convnext_tiny": "ConvNeXt-T",
    "clip_rn50": "CLIP RN50, image tower",
}
COLUMNS = {
    "plain-compiled": "plain, compiled",
    "peer": "peer-style",
    "peer-compiled": "peer-style, compiled",
    "ours": "bcosified",
    "ours-compiled": "bcosified, compiled",
    "ours-low": 'bcosified, `memory="low"`',
    "bcos": "`bcos`",
    "bcos, fused": "`bcos`, fused",
    "bcos, fused, NCHW": "`bcos`, fused, NCHW inputs",
}
"""Contender of the stage `networks` → what a table calls it; plain is the first column of every table."""
COLORS = {
    "peer": "tab:orange", "peer-compiled": "navajowhite", "ours-auto": "tab:blue", "ours-triton": "tab:green",
    "ours-cuda": "tab:purple", "ours-cuda:cutlass": "tab:red",
}  # fmt: skip

Rows = dict[str, dict[str, dict]]
"""Case → contender → row."""


def _rows(stage: str, folder: Path) -> Rows:
    """Of a stage, those that hold a value."""
    found: Rows = {}
    for row in load_rows(f"gpu_{stage}", folder):
        if row.get("status") not in ("wrong", "failed", "not run"):
            found.setdefault(row["case"], {})[row["contender"]] = row
    return found


def _where(rows: Iterable[dict]) -> str:
    """Devices, versions, commits and dates of rows."""
    told = [f"{run['device']}, torch {run['torch']}, Triton {run['triton']}, {run['commit'] or run['sources']}, "
            f"{run['date']}" for run in (row["run"] for row in rows)]  # fmt: skip
    return f"On {'; '.join(dict.fromkeys(told))}."


def _markdown(header: list[str], lines: list[list[str]], rows: Iterable[dict]) -> str:
    table = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)]
    return "\n".join([*table, "", _where(rows)])


# --- networks ---------------------------------------------------------------------------------------------------------


def _networks(folder: Path, task: str) -> dict[tuple[str, str, str], dict[str, dict]]:
    """(network, precision, batch) → contender → row of a task; plain's of each of its groups of contenders apart."""
    found: dict[tuple[str, str, str], dict[str, dict]] = {}
    for case, rows in _rows("networks", folder).items():
        name, precision, batch, group = case.split(", ", 3)
        of = found.setdefault((name, precision, batch), {})
        for contender, row in rows.items():
            who, _, what = contender.rpartition(", ")
            if what == task:
                of.setdefault(f"plain of {group}" if who == "plain" else who, row)
                if who == "plain":
                    of.setdefault("plain", row)
    return {key: of for key, of in found.items() if "plain" in of}


def _network_table(
    folder: Path, task: str, cell: Callable[[dict, dict], str | None], plain: Callable[[dict], str]
) -> str:
    """``cell`` makes a contender's of its row and the line's plain, None an empty one; ``plain`` the first column's."""
    found = _networks(folder, task)
    order = sorted(found, key=lambda key: (PRECISIONS.index(key[1]), list(TITLES).index(key[0])))
    cells = {
        (key, who): cell(row, found[key]["plain"]) for key in order for who, row in found[key].items() if who in COLUMNS
    }
    columns = [who for who in COLUMNS if any(cells.get((key, who)) for key in order)]
    if not columns:
        return NOTHING
    lines = [
        [f"{TITLES[key[0]]}, {key[1]}, {key[2]}", plain(found[key]["plain"]),
         *(cells.get((key, who)) or "–" for who in columns)]
        for key in order
    ]  # fmt: skip
    rows = (row for of in found.values() for row in of.values())
    return _markdown(["", "plain", *(COLUMNS[who] for who in columns)], lines, rows)


def _ratio(row: dict, plain: dict) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_q1']:.2f}–{row['ratio_q3']:.2f})"


def _timed(row: dict) -> str:
    over = f", {row['median_ms'] / row['floor_ms']:.1f} × the floor" if "floor_ms" in row else ""
    return f"1.00 ({row['images_per_s']:,.0f} images/s{over})"


def training(folder: Path) -> str:
    """Times of training steps relative to plain's, and plain's relative to the floor of its layers."""
    return _network_table(folder, "training", _ratio, _timed)


def inference(folder: Path) -> str:
    """Times of inference relative to plain's."""
    return _network_table(folder, "inference", _ratio, _timed)


def explanations(folder: Path) -> str:
    """Explanations per second relative to plain's input gradients."""
    return _network_table(
        folder, "explanation", lambda row, plain: f"{1 / row['ratio']:.2f}",
        lambda row: f"1.00 ({row['images_per_s']:,.0f} /s)",
    )  # fmt: skip


def memory(folder: Path) -> str:
    """The most bytes alive in a training step, relative to plain's."""

    def cell(row: dict, plain: dict) -> str | None:
        return f"{row['peak_MiB'] / plain['peak_MiB']:.2f}" if "peak_MiB" in row and "peak_MiB" in plain else None

    def of_plain(row: dict) -> str:
        return f"1.00 ({row['peak_MiB'] / 1024:,.1f} GiB)" if "peak_MiB" in row else "–"

    return _network_table(folder, "training", cell, of_plain)


# --- layers -----------------------------------------------------------------------------------------------------------


def layers(folder: Path) -> str:
    """Every layer, the device's time alone: forward, and forward and backward, relative to plain's; plain's to the
    floor."""
    found = {case: rows for case, rows in _rows("layers", folder).items() if "autotune" not in case and "plain" in rows}
    columns = list(dict.fromkeys(who for rows in found.values() for who in rows if who != "plain"))
    lines = []
    for case, rows in found.items():
        plain = rows["plain"]
        if "device_ms" not in plain:
            continue
        floors = [
            f"{plain[ms] / plain[least]:.1f}" if least in plain else "–"
            for ms, least in (("device_forward_ms", "forward_floor_ms"), ("device_ms", "floor_ms"))
        ]
        cells = [
            f"{rows[who]['device_forward_ratio']:.2f}, {rows[who]['device_ratio']:.2f}"
            if who in rows and "device_forward_ratio" in rows[who] and "device_ratio" in rows[who]
            else "–"
            for who in columns
        ]
        lines.append([case, ", ".join(floors), *cells])
    if not lines:
        return NOTHING
    header = ["forward, both", "plain / floor", *(who.replace("ours-", "ours, ") for who in columns)]
    table = _markdown(header, lines, (row for rows in found.values() for row in rows.values()))
    return f"{table}\n\n![Ratios to the plain layer, sorted, by backend](images/{PLOT})"


def draw_layers(path: Path, folder: Path) -> bool:
    """Ratios of the layers to plain, sorted; False if there is nothing to draw."""
    found = {case: rows for case, rows in _rows("layers", folder).items() if case.split()[1].startswith("bfloat16")}
    if not found:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = ("device_forward_ratio", "forward"), ("device_ratio", "forward + backward")
    for axis, (key, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for who, color in COLORS.items():
            ratios = sorted(rows[who][key] for rows in found.values() if who in rows and key in rows[who])
            if ratios:
                axis.plot(ratios, marker=".", markersize=4, linewidth=1, color=color, label=who.replace("-", ", "))
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log", base=2)
        axis.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        axis.set(title=title, xlabel="layers, sorted", ylabel="time on the device / plain")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return True


# --- fine-tuning, and what the design leaves to measurement -----------------------------------------------------------


def finetune(folder: Path) -> str:
    """The fine-tune through the input pipeline."""
    found = {case: rows for case, rows in _rows("finetune", folder).items() if ": kernels" not in case}
    lines, used = [], []
    for case, rows in found.items():
        for who in ("plain", "peer", "ours"):
            if who in rows:
                row = rows[who]
                used.append(row)
                lines.append([
                    f"{case}: {who}", f"{row['images_per_s']:,.0f}", f"{row['ratio']:.2f}",
                    f"{100 * row['waiting']:.0f} %", f"{row['resident_ratio']:.2f}",
                    f"{row['first_loss']:.4f} → {row['last_loss']:.4f}",
                    f"{row['memory_MiB']:,.0f} MiB" if "memory_MiB" in row else "–",
                ])  # fmt: skip
    header = ["", "images/s", "time / plain", "waiting for images", "step on images at hand / plain", "loss", "memory"]
    return _markdown(header, lines, used) if lines else NOTHING


def choices(folder: Path) -> str:
    """Every question of the stage `choices` with its contenders, the fastest first."""
    lines, used = [], []
    for case, rows in _rows("choices", folder).items():
        timed = {who: row for who, row in rows.items() if "median_ms" in row}
        if not timed:
            continue
        order = sorted(timed, key=lambda who: timed[who]["median_ms"])
        told = []
        for who in order:
            row = timed[who]
            more = f"; {100 * row['share_of_copy']:.0f} % of the copy" if "share_of_copy" in row else ""
            more += f"; host {row['host_ms']:.1f} ms" if "host_ms" in row else ""
            told.append(f"{who} {row['median_ms']:.3g} ms ({row['ratio']:.2f}{more})")
        lines.append([case, "; ".join(told)])
        used += timed.values()
    return _markdown(["", "fastest first: time, and its ratio to the baseline's"], lines, used) if lines else NOTHING


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """What is aimed at on one H200.

    Attributes:
        about: what is compared. limit: the bound, of a ratio. least: a lower bound in place of an upper one.
        values: of a folder of rows, label → value; empty where they are missing. The worst of them decides, or with
            ``mean`` their geometric mean.
    """

    about: str
    limit: float
    values: Callable[[Path], dict[str, float]]
    least: bool = False
    mean: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit

    def judged(self, folder: Path) -> tuple[str, str]:
        """(measured, verdict) as a table has them."""
        values = self.values(folder)
        if not values:
            return "–", "not measured"
        worst = (min if self.least else max)(values, key=values.__getitem__)
        if self.mean:
            value = geometric_mean(list(values.values()))
            told = f"{value:.2f} over {len(values)} (worst {values[worst]:.2f}: {worst})"
        else:
            value = values[worst]
            told = f"{value:.2f}" + (f" ({worst}; {sum(map(self.met, values.values()))} of {len(values)} meet it)"
                                     if len(values) > 1 else "")  # fmt: skip
        return told, "met" if self.met(value) else "**missed**"


def _layer_ratios(kind: str, key: str, best: bool = False) -> Callable[[Path], dict[str, float]]:
    """Label → ratio of a bfloat16 layer to plain; ``kind`` is what its label has in it, ``best``: by any backend."""

    def values(folder: Path) -> dict[str, float]:
        found = {}
        for case, rows in _rows("layers", folder).items():
            if " bfloat16, " not in case or "autotune" in case or not re.search(kind, case):
                continue
            ours = [row[key] for who, row in rows.items() if who.startswith("ours-") and key in row
                    and (best or who == "ours-auto")]  # fmt: skip
            if ours:
                found[case.partition(", ")[2]] = min(ours)
        return found

    return values


def _layers_against(contender: str, compiled: bool) -> Callable[[Path], dict[str, float]]:
    """Label → ours / contender, forward and backward; both are known relative to plain, compiled ones in rows of their
    own."""

    def values(folder: Path) -> dict[str, float]:
        rows = _rows("layers", folder)
        found = {}
        for case, of in rows.items():
            if " bfloat16, " in case and "autotune" not in case and "ours-auto" in of:
                others = rows.get(f"{case}, max-autotune", {}) if compiled else of
                if contender in others:
                    found[case.partition(", ")[2]] = of["ours-auto"]["ratio"] / others[contender]["ratio"]
        return found

    return values


def _steps(
    names: Iterable[str], over: str, key: str = "ratio", ours: str = "ours"
) -> Callable[[Path], dict[str, float]]:
    """Network → ours / ``over``, of a bfloat16 training step; ratios are to the plain one of a group's own run."""

    def values(folder: Path) -> dict[str, float]:
        found = {}
        for (name, precision, _), rows in _networks(folder, "training").items():
            if name in names and precision == "bfloat16" and ours in rows and over in rows:
                if key in rows[ours] and key in rows[over]:
                    found[TITLES[name]] = rows[ours][key] / rows[over][key]
        return found

    return values


def _inverse(values: Callable[[Path], dict[str, float]]) -> Callable[[Path], dict[str, float]]:
    return lambda folder: {name: 1 / value for name, value in values(folder).items()}


def _passes(folder: Path) -> dict[str, float]:
    """Label → share of the copy's rate, by the fastest backend of ours."""
    found = {}
    for case, rows in _rows("choices", folder).items():
        shares = [row["share_of_copy"] for who, row in rows.items() if who != "reference" and "share_of_copy" in row]
        if case.startswith("pass: ") and shares:
            found[case.removeprefix("pass: ")] = max(shares)
    return found


RESNET, VITS = ("resnet50",), ("vit_s", "vit_b")
TARGETS = (
    Target("ViT and 1×1 layers, forward / plain", 1.08,
           _layer_ratios(r"^linear|, 1x1|resnet50 1x1", "device_forward_ratio"), mean=True),
    Target("3×3 layers, forward / plain", 1.10, _layer_ratios(r", 3x3|resnet50 3x3", "device_forward_ratio"),
           mean=True),
    Target("layers, forward + backward / plain", 1.15, _layer_ratios("", "ratio"), mean=True),
    Target("layers, forward + backward / peer-style, compiled (max-autotune)", 0.85,
           _layers_against("peer-compiled", True), mean=True),
    Target("layers, forward + backward / peer-style", 0.35, _layers_against("peer", False), mean=True),
    Target("ResNet-50, batch 256, training step / plain", 1.00, _steps(RESNET, "plain")),
    Target("ResNet-50, batch 256, training step / plain, compiled", 1.10, _steps(RESNET, "plain-compiled")),
    Target("ResNet-50, batch 256, training step, times as fast as peer-style", 2.5,
           _inverse(_steps(RESNET, "peer")), least=True),
    Target("ResNet-50, batch 256, training step, times as fast as peer-style, compiled", 1.25,
           _inverse(_steps(RESNET, "peer-compiled")), least=True),
    Target("ViT-S/B, batch 256, training step / plain, compiled", 1.05, _steps(VITS, "plain-compiled")),
    Target("ResNet-50, peak memory / plain", 1.05, _steps(RESNET, "plain", "peak_MiB")),
    Target('ResNet-50, peak memory with `memory="low"` / plain', 0.65, _steps(RESNET, "plain", "peak_MiB", "ours-low")),
    Target("ResNet-50, peak memory / peer-style", 0.40, _steps(RESNET, "peer", "peak_MiB")),
    Target("memory-bound passes, share of the copy's bandwidth", 0.85, _passes, least=True),
    Target("products with their epilogue, the library's rate of the product alone", 0.93,
           _inverse(_layer_ratios("", "device_forward_ratio", best=True)), least=True),
)  # fmt: skip
"""On one H200, bfloat16, channels_last; ratios of one run, of layers the device's times in the forward."""


def targets(folder: Path) -> str:
    """Every target with what was measured, and whether it is met."""
    stages = ("layers", "networks", "choices")
    rows = [row for stage in stages for of in _rows(stage, folder).values() for row in of.values()]
    if not rows:
        return NOTHING
    lines = []
    for target in TARGETS:
        bound = f"{'≥' if target.least else '≤'} {target.limit:.2f}"
        lines.append([target.about, bound, *target.judged(folder)])
    return _markdown(["on one GPU, bfloat16", "target", "measured", ""], lines, rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "gpu-targets": targets,
    "gpu-training": training,
    "gpu-inference": inference,
    "gpu-explanations": explanations,
    "gpu-memory": memory,
    "gpu-layers": layers,
    "gpu-choices": choices,
    "gpu-finetune": finetune,
}
