"""A run, epoch by epoch: a line of text each, metrics.csv, training_curves.png."""

from __future__ import annotations

import csv
import importlib.util
import io
from pathlib import Path

from .run_folder import write


def row_text(row: dict, epochs: int) -> str:
    """One epoch in one line."""
    parts = []
    for part, label in (("train", "training"), ("val", "validation")):
        metrics = [f"loss {row[f'{part}_loss']:.4f}"] if f"{part}_loss" in row else []
        metrics += [f"cosine {row[f'{part}_cosine']:.4f}"] if f"{part}_cosine" in row else []
        metrics += [f"top-{k} {100 * row[f'{part}_top{k}']:.2f} %" for k in (1, 5) if f"{part}_top{k}" in row]
        if metrics:
            parts.append(f"{label}: {', '.join(metrics)}")
    return f"epoch {row['epoch']} of {epochs}: {'; '.join(parts)}; {row['seconds']:.0f} s"


def write_history(rows: list[dict], output: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(output / "metrics.csv", text.getvalue())
    if importlib.util.find_spec("matplotlib") is not None:
        _draw_history(rows, output / "training_curves.png")


def _draw_history(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: nothing global is touched, no display is needed

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    panels = [(left, "loss", ("train_loss", "val_loss"), 1), (right, "accuracy (%)", ("train_top1", "val_top1"), 100)]
    if "val_cosine" in rows[0]:
        panels[1] = (right, "cosine of student and teacher", ("val_cosine",), 1)
    for axis, unit, names, factor in panels:
        for name in names:
            values = [row.get(name, float("nan")) * factor for row in rows]
            axis.plot(epochs, values, marker="." if len(epochs) < 30 else None, label=name.split("_")[0])
        axis.set(xlabel="epoch", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    left.set_yscale("log")
    figure.savefig(path, dpi=110)
