"""The report of ``verify`` as one HTML page: no script, no font, no picture from anywhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bcosification.convert.verification_report import Report

SMALLEST = 1e-18
"""Where the bars of errors begin; they end at 1."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --bar: #4a90d9; --faint: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
code, td.name { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
tr.failed td { background: color-mix(in srgb, var(--bad) 12%, transparent); }
.error { display: inline-block; position: relative; width: 11rem; height: .8rem; background: var(--faint); }
.error i { position: absolute; left: 0; top: 0; bottom: 0; background: var(--good); }
.error.over i { background: var(--bad); } .error.plain i { background: var(--bar); }
.error b { position: absolute; top: -.15rem; bottom: -.15rem; width: 2px; background: currentColor; }
.note { opacity: .75; } .layers { overflow-x: auto; }
"""


def page(report: Report) -> str:
    """The whole page: verdict, what was compared, checks, what differs and why, layers."""
    about = report.about
    name = about.get("source") or about.get("class", "")
    title = f"Verification of {name}"
    parts = [
        f"<h1>{escape(title)}: {_verdict(report.ok)}</h1>",
        _about(report),
        "<h2>Checks</h2>",
        _checks(report),
        "<h2>What is not equivalent, and why</h2>",
        _differences(report),
        "<h2>Layers</h2>",
        '<p class="note">Error of each converted layer’s output at B = 1, biases kept, against the original’s: '
        f"‖difference‖ / ‖output‖, on a logarithmic bar from {SMALLEST:.0e} to 1; the line is the tolerance.</p>",
        _layers(report),
        "<h2>Completeness</h2>",
        '<p class="note">contributions + constant = logit of the predicted class, image by image.</p>',
        _completeness(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _verdict(ok: bool) -> str:
    return '<span class="good">passed</span>' if ok else '<span class="bad">failed</span>'


def _table(head: Sequence[str], rows: Iterable[str]) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def _row(cells: Iterable[tuple[str, str]], failed: bool = False) -> str:
    """A row of (class, HTML) cells."""
    inside = "".join(f'<td class="{kind}">{html}</td>' if kind else f"<td>{html}</td>" for kind, html in cells)
    start = '<tr class="failed">' if failed else "<tr>"
    return f"{start}{inside}</tr>"


def _bar(error: float | None, tolerance: float | None) -> str:
    """The error in numbers and as a bar, green within the tolerance and red beyond it."""
    if error is None:
        return '<span class="note">–</span>'
    kind = "plain" if tolerance is None else "" if error <= tolerance else "over"  # nan is over
    mark = "" if tolerance is None else f'<b style="left:{_place(tolerance):.1f}%"></b>'
    bar = f'<span class="error {kind}"><i style="width:{_place(error):.1f}%"></i>{mark}</span>'
    return f"{bar} {escape(f'{error:.1e}')}"


def _place(value: float) -> float:
    """Where a value lies on the logarithmic bar, in percent."""
    if not math.isfinite(value):
        return 100.0
    decades = -math.log10(SMALLEST)
    return 100 * min(1.0, max(0.0, 1 + math.log10(max(value, SMALLEST)) / decades))


def _about(report: Report) -> str:
    about = dict(report.about)
    options = about.pop("options", {})
    facts = {name: " × ".join(map(str, v)) if isinstance(v, list) else v for name, v in about.items() if v is not None}
    facts["options"] = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return _table(("", ""), [_row([("", escape(k)), ("name", escape(str(v)))]) for k, v in facts.items()])


def _checks(report: Report) -> str:
    e, p, c, x = report.equivalence, report.preprocessing, report.completeness, report.explanation
    dtype = report.about.get("dtype", "the model's dtype")
    listed = [("logits at B = 1, " + dtype, e.error, e.tolerance)]
    if e.error_float64 is not None:
        listed.append(("logits at B = 1, float64", e.error_float64, e.tolerance_float64))
    if p is not None:
        listed.append(("images by the original’s own preprocessing", p.error, p.tolerance))
    listed.append(("contributions + constant = logit", c.error, c.tolerance))
    listed.append(("W(x) against the frozen replay, an image", x.error, x.tolerance))
    listed.append(("W(x) against the frozen replay, one element", x.largest, x.tolerance))
    rows = [
        _row([("", escape(what)), ("number", _bar(error, tolerance)), ("", _verdict(error <= tolerance))],
             failed=not error <= tolerance)
        for what, error, tolerance in listed
    ]  # fmt: skip
    for what, names in report.listed():
        wrong = bool(names) and (
            what == "never called" or what == "biases left" and report.about.get("options", {}).get("bias") == "remove"
        )
        told = "none" if not names else ", ".join(f"<code>{escape(name)}</code>" for name in names)
        rows.append(_row([("", escape(what)), ("", told), ("", _verdict(False) if wrong else "")], failed=wrong))
    held = ", ".join(f"{count} {kind}" for kind, count in x.held.items())
    if x.problem:
        rows.append(_row([("", "explanations"), ("", escape(x.problem)), ("", _verdict(False))], failed=True))
    if held:
        rows.append(_row([("", "held constant by the replay"), ("", escape(held)), ("", "")]))
    if report.weights_changed:
        told = f"{len(report.weights_changed)} tensors differ from a fresh conversion (fine-tuned)"
        rows.append(_row([("", "weights"), ("", told), ("", "")]))
    return _table(("what", "error", ""), rows)


def _differences(report: Report) -> str:
    if not report.equivalence.differences:
        return "<p>Nothing: the converted model computes what the original computes.</p>"
    rows = [
        _row([("name", escape(d.what)), ("", escape(d.why)), ("number", _bar(d.change, None))])
        for d in report.equivalence.differences
    ]
    return _table(("option", "why", "change of the logits by it alone"), rows)


def _layers(report: Report) -> str:
    tolerance, double = report.equivalence.tolerance, report.equivalence.error_float64 is not None
    head = ["layer", "was", "becomes", "calls", f"error, {report.about.get('dtype', '')}"]
    if double:
        head.append("error, float64")
    rows = []
    for layer in report.layers:
        cells = [
            ("name", escape(layer.name)),
            ("", escape(layer.was.rpartition(".")[2])),
            ("", escape(layer.becomes.rpartition(".")[2])),
            ("number", str(layer.calls)),
            ("number", _bar(layer.error, tolerance)),
        ]
        if double:
            cells.append(("number", _bar(layer.error_float64, report.equivalence.tolerance_float64)))
        note = escape(layer.problem)
        cells.append(("", f"{_verdict(False)} {note}" if not layer.ok else f'<span class="note">{note}</span>'))
        rows.append(_row(cells, failed=not layer.ok))
    return f'<div class="layers">{_table([*head, ""], rows)}</div>'


def _completeness(report: Report) -> str:
    c = report.completeness
    rows = [
        _row([("number", f"{value:.6g}") for value in values] + [("number", f"{values[0] - sum(values[1:]):.1e}")])
        for values in zip(c.logits, c.contributions, c.constants, strict=True)
    ]
    return _table(("logit", "contributions", "constant", "left over"), rows)
