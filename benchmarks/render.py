"""Tables and plots from the committed rows: nothing is measured here.

    python -m benchmarks.render            # tables into README.md and docs/, plots into docs/images
    python -m benchmarks.render --check    # exit code 1 if a table in them is not what the rows give

A table stands between `<!-- benchmark:NAME -->` and `<!-- /benchmark -->`, and is replaced there; NAME is one of
`TABLES`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from . import render_gpu
from .networks import NETWORKS
from .protocol import RESULTS, geometric_mean, load_rows

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/performance.md", "docs/families.md")
MARKED = re.compile(r"(<!-- benchmark:(?P<name>[\w-]*) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)

TITLES = {
    "plain": "plain",
    "plain-compiled": "plain, compiled",
    "peer": "`bcos`",
    "peer-compiled": "`bcos`, compiled",
    "peer-batch": "`bcos`, in batches",
    "fused-peer": "`bcos`, fused",
    "fused-peer-nchw": "`bcos`, fused, NCHW inputs",
    "ours": "bcosified",
    "ours-compiled": "bcosified, compiled",
    "ours-low": 'bcosified, `memory="low"`',
}
LAYER_TITLES = TITLES | {"ours": "ours", "ours-compiled": "ours, compiled"}
LAYERS = {
    "layers_resnet50": "every convolution of ResNet-50",
    "layers_densenet121": "every convolution of DenseNet-121",
    "layers_vit": "B-cos linears of ViT-Ti/S/B/L",
}
COLORS = {
    "plain": "0.55",
    "plain-compiled": "0.75",
    "peer": "tab:orange",
    "peer-compiled": "navajowhite",
    "fused-peer": "tab:green",
    "ours": "tab:blue",
    "ours-compiled": "lightskyblue",
    "ours-low": "tab:purple",
}

# --- pieces of tables -------------------------------------------------------------------------------------------------


def _by_case(rows: Iterable[dict]) -> dict[str, dict[str, dict]]:
    cases: dict[str, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["contender"]] = row
    return cases


def _spread(middle: float, low: float, high: float) -> str:
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _cell(row: dict | None, show: Callable[[dict], str]) -> str:
    if row is None:
        return "–"
    return row["status"] if "status" in row else show(row)


def _machine(row: dict) -> str:
    run = row["run"]
    return f"{run['device']}, {run['threads']} threads, {run['capability']}, torch {run['torch']}"


def _measured(rows: Iterable[dict], machines: list[str]) -> str:
    """Commits and dates of rows; with several machines in the table also the number of theirs."""
    told = []
    for row in rows:
        text = f"{row['run']['commit']}, {row['run']['date']}"
        if len(machines) > 1:
            text += f", machine {machines.index(_machine(row)) + 1}"
        if text not in told:
            told.append(text)
    return "; ".join(told)


def _table(header: list[str], lines: list[tuple[list[str], list[dict]]]) -> str:
    """Markdown with a last column for commit and date, and the machine below; `lines` are cells and their rows."""
    machines = list(dict.fromkeys(_machine(row) for _, rows in lines for row in rows if "status" not in row))
    text = ["| " + " | ".join([*header, "measured at"]) + " |", "|" + " --- |" * (len(header) + 1)]
    for cells, rows in lines:
        measured = _measured((row for row in rows if "status" not in row), machines)
        text.append("| " + " | ".join([*cells, measured]) + " |")
    where = [name if len(machines) == 1 else f"{i}: {name}" for i, name in enumerate(machines, 1)]
    return "\n".join([*text, "", f"On {'; '.join(where)}."]) if machines else "Not measured yet."


def _network_table(suite: str, folder: Path, columns: list[str], show: Callable[[dict], str], baseline) -> str:
    """A line per network at its own batch, a column per contender, those without any value left out.

    ``show`` makes a cell of a row, ``baseline`` plain's; "–" where the row does not hold the value.
    """
    cases = _by_case(load_rows(suite, folder))
    found = {name: cases[name] for name in NETWORKS if name in cases}
    cells = {
        (name, column): _cell(rows.get(column), baseline if column == "plain" else show)
        for name, rows in found.items()
        for column in columns
    }
    columns = [column for column in columns if any(cells[name, column] != "–" for name in found)]
    lines = []
    for name, rows in found.items():
        shown = [column for column in columns if cells[name, column] != "–"]
        if set(shown) - {"plain"}:
            title = f"{NETWORKS[name].title}, batch {NETWORKS[name].batch}"
            lines.append(([title, *(cells[name, column] for column in columns)], [rows[column] for column in shown]))
    return _table(["", *(TITLES[column] for column in columns)], lines)


# --- the tables -------------------------------------------------------------------------------------------------------


def _ratio(row: dict) -> str:
    return _spread(row["ratio"], row["ratio_q1"], row["ratio_q3"])


def _milliseconds(row: dict) -> str:
    return f"1.00 ({row['median_ms']:,.0f} ms)"


def training(folder: Path) -> str:
    """Times of a training step relative to plain's."""
    columns = ["plain", "plain-compiled", "peer", "peer-compiled", "fused-peer", "fused-peer-nchw", "ours"]
    return _network_table("training", folder, [*columns, "ours-compiled", "ours-low"], _ratio, _milliseconds)


def inference(folder: Path) -> str:
    """Times of inference relative to plain's."""
    columns = ["plain", "plain-compiled", "peer", "peer-compiled", "fused-peer", "ours", "ours-compiled"]
    return _network_table("inference", folder, columns, _ratio, _milliseconds)


def memory(folder: Path) -> str:
    """Bytes kept for the backward relative to plain's."""
    columns = ["plain", "plain-compiled", "peer", "peer-compiled", "fused-peer", "ours", "ours-compiled", "ours-low"]
    return _network_table(
        "memory", folder, columns, lambda row: f"{row['kept_ratio']:.2f}",
        lambda row: f"1.00 ({row['kept_MiB']:,.0f} MiB)",
    )  # fmt: skip


def peak(folder: Path) -> str:
    """The most bytes alive in a training step relative to plain's."""
    columns = ["plain", "plain-compiled", "peer", "peer-compiled", "fused-peer", "ours", "ours-compiled", "ours-low"]

    def show(row: dict) -> str:
        return f"{row['peak_ratio']:.2f}" if "peak_ratio" in row else "–"

    def baseline(row: dict) -> str:
        return f"1.00 ({row['peak_MiB']:,.0f} MiB)" if "peak_MiB" in row else "–"

    return _network_table("memory", folder, columns, show, baseline)


def compilation(folder: Path) -> str:
    """Seconds that torch.compile takes for a training step."""
    columns = ["plain-compiled", "peer-compiled", "ours-compiled"]

    def show(row: dict) -> str:
        return f"{row['compile_s']:.0f} s" if "compile_s" in row else "–"

    return _network_table("training", folder, columns, show, show)


def explanations(folder: Path) -> str:
    """Explanations per second relative to plain's input gradients per second."""
    columns = ["peer", "peer-batch", "fused-peer", "ours"]
    cases = _by_case(load_rows("explanations", folder))
    lines = []
    for name, network in NETWORKS.items():
        for batch in (16, 1):
            rows = cases.get(f"{name}, batch {batch}")
            if rows is None:
                continue
            cells = [f"{network.title}, batch {batch}"]
            cells.append(_cell(rows.get("plain"), lambda row: f"1.00 ({row['explanations_per_s']:.3g} /s)"))
            for column in columns:
                cells.append(
                    _cell(rows.get(column), lambda r: _spread(1 / r["ratio"], 1 / r["ratio_q3"], 1 / r["ratio_q1"]))
                )
            ours, peer = rows.get("ours"), rows.get("peer")
            together = ours and peer and "ratio" in ours and "ratio" in peer and ours["run"] == peer["run"]
            cells.append(f"{peer['ratio'] / ours['ratio']:.2f}" if together else "–")
            lines.append((cells, list(rows.values())))
    header = ["", "plain: input gradients", *(TITLES[column] for column in columns), "bcosified / `bcos`"]
    return _table(header, lines)


def layers(folder: Path) -> str:
    """Forward and backward of single layers relative to plain's: geometric means over the shapes."""
    columns = ["peer", "peer-compiled", "plain-compiled", "ours", "ours-compiled"]
    lines, used = [], []
    for suite, title in LAYERS.items():
        for dtype in ("float32", "bfloat16"):
            rows = load_rows(suite + ("" if dtype == "float32" else f"_{dtype}"), folder)
            by = {name: [row for row in rows if row["contender"] == name] for name in ("plain", *columns)}
            if rows:
                lines.append((f"{title}{'' if dtype == 'float32' else f', {dtype}'}", by))
                used += [name for name in columns if by[name]]
    columns = [name for name in columns if name in used]
    table = []
    for title, by in lines:
        cells = [f"{title} ({len(by['plain'])} shapes)"]
        for name in columns:
            found = by[name]
            partial = "" if len(found) == len(by["plain"]) else f", {len(found)} shapes"
            cells.append(
                _spread(*(geometric_mean([row[key] for row in found]) for key in ("ratio", "ratio_q1", "ratio_q3")))
                + partial
                if found
                else "–"
            )
        cells.append(f"{max(row['ratio'] for row in by['ours']):.2f}" if by["ours"] else "–")
        table.append((cells, [row for rows in by.values() for row in rows]))
    return _table(["forward + backward", *(LAYER_TITLES[name] for name in columns), "our worst"], table)


def _families(folder: Path) -> tuple[list[dict], str]:
    """The rows of `bcosify families --check --json`'s file, and when and how they were found."""
    path = folder / "families.json"
    if not path.exists():
        return [], "Not verified yet."
    content = json.loads(path.read_text(encoding="utf-8"))
    told = f"Small models with random weights, in float64, verified on {content['machine']['date']}"
    return content["families"], f"{told} with torch {content['machine']['torch']}."


def families(folder: Path) -> str:
    """The errors of the example of every family of models."""
    rows, told = _families(folder)
    lines = ["| models | error at B = 1 | error of W(x) |", "|" + " --- |" * 3]
    for row in rows:
        if row["equivalence"] is None:
            errors = [row["problem"], "–"]
        else:
            errors = [f"{row['equivalence']:.0e}", f"{row['explanation']:.0e}"]
            errors[0] += "" if row["ok"] else " **failed**"
        lines.append("| " + " | ".join([row["title"], *errors]) + " |")
    return "\n".join([*lines, "", told]) if rows else told


def conversions(folder: Path) -> str:
    """What of the models of every family becomes B-cos, what stays, and what is not possible."""
    rows, told = _families(folder)
    lines = ["| models | become B-cos, or constant in explanations | stay | cannot |", "|" + " --- |" * 4]
    for row in rows:
        lines.append("| " + " | ".join([row["title"], row["converts"], row["keeps"], row["cannot"] or "–"]) + " |")
    return "\n".join(lines) if rows else told


TABLES: dict[str, Callable[[Path], str]] = {
    "training": training,
    "inference": inference,
    "memory": memory,
    "peak": peak,
    "compilation": compilation,
    "explanations": explanations,
    "layers": layers,
    "families": families,
    "conversions": conversions,
    **render_gpu.TABLES,
}


def rendered(text: str, folder: Path = RESULTS) -> str:
    """A document with every marked table as the rows in ``folder`` give it.

    Raises:
        ValueError: a marker that names no table, or that is not closed.
    """

    def replace(match: re.Match) -> str:
        if match["name"] not in TABLES:
            raise ValueError(f"benchmark:{match['name']}: expected one of {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match['name']](folder)}\n\n{match[3]}"

    if len(re.findall(r"<!-- benchmark:", text)) != len(MARKED.findall(text)):
        raise ValueError("expected <!-- /benchmark --> after every <!-- benchmark:NAME -->")
    return MARKED.sub(replace, text)


# --- the plots --------------------------------------------------------------------------------------------------------


def draw_networks(path: Path, folder: Path = RESULTS) -> bool:
    """Training time and bytes kept of every network, relative to plain; False if there is nothing to draw."""
    from matplotlib.figure import Figure

    panels = [
        ("training", "ratio", "time of a training step / plain"),
        ("memory", "kept_ratio", "bytes kept for the backward / plain"),
    ]
    figure = Figure(figsize=(11, 4), layout="constrained")
    drawn = False
    for axis, (suite, key, title) in zip(figure.subplots(1, 2), panels, strict=True):
        cases = _by_case(row for row in load_rows(suite, folder) if key in row)
        names = [name for name in NETWORKS if name in cases]
        contenders = [name for name in COLORS if any(name in cases[network] for network in names)]
        width = 0.85 / max(1, len(contenders))
        for i, contender in enumerate(contenders):
            places, rows = [], []
            for place, network in enumerate(names):
                if contender in cases[network]:
                    places.append(place + (i - (len(contenders) - 1) / 2) * width)
                    rows.append(cases[network][contender])
            spread = None
            if all("ratio_q1" in row for row in rows):
                spread = [
                    [max(0, row[key] - row["ratio_q1"]) for row in rows],
                    [max(0, row["ratio_q3"] - row[key]) for row in rows],
                ]
            axis.bar(
                places, [row[key] for row in rows], width, yerr=spread, color=COLORS[contender],
                label=TITLES[contender].replace("`", ""), error_kw={"linewidth": 0.8},
            )  # fmt: skip
            drawn = True
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(names)), [NETWORKS[name].title for name in names], rotation=20)
        axis.set(ylabel=title)
        axis.grid(axis="y", alpha=0.3)
        if contenders:
            axis.legend(fontsize=7)
    if drawn:
        figure.savefig(path, dpi=110)
    return drawn


def draw_layers(path: Path, folder: Path = RESULTS) -> bool:
    """Ratios of all layers to plain, sorted; False if there is nothing to draw."""
    from matplotlib.figure import Figure

    suites = {suite: rows for suite in LAYERS if (rows := load_rows(suite, folder))}
    if not suites:
        return False
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axis, (suite, rows) in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites.items(), strict=True):
        for contender in ("peer", "peer-compiled", "ours", "ours-compiled"):
            ratios = sorted(row["ratio"] for row in rows if row["contender"] == contender)
            if ratios:
                axis.plot(
                    ratios, marker=".", markersize=4, linewidth=1, color=COLORS[contender],
                    label=LAYER_TITLES[contender].replace("`", ""),
                )  # fmt: skip
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log", base=2)
        axis.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        axis.set(title=LAYERS[suite], xlabel="shapes, sorted", ylabel="forward + backward / plain")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is not up to date")
    check = parser.parse_args(argv).check
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if before != after:
            stale.append(name)
            if not check:
                path.write_text(after, encoding="utf-8")
    if check:
        print("\n".join(f"{name} is not up to date: make bench-render" for name in stale) or "up to date")
        return 1 if stale else 0
    images = ROOT / "docs" / "images"
    plots = {"networks.png": draw_networks, "layers.png": draw_layers, render_gpu.PLOT: render_gpu.draw_layers}
    drawn = [name for name, draw in plots.items() if draw(images / name, RESULTS)]
    print(f"tables changed in: {', '.join(stale) or 'no document'}; drawn: {', '.join(drawn) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
