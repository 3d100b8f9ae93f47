"""Tables and plots of a GPU's rows, of rows that are made up: what they show, and what meets a target."""

from __future__ import annotations

import pytest

from benchmarks import render_gpu
from benchmarks.gpu import running
from tests.benchmarks.gpu.rows import CPU

MACHINE = {
    "device": "Abacus", "torch": "2.99", "triton": "9.9", "commit": "c0ffee", "date": "2031-01-01", "sources": "0"
}  # fmt: skip
WHERE = "On Abacus, torch 2.99, Triton 9.9, c0ffee, 2031-01-01."


def write(folder, stage, rows):
    written = running.Rows(stage, folder, CPU)
    written.machine = MACHINE
    for (case, contender), values in rows.items():
        written.add(case, contender, **values)


def timed(ratio, **more):
    return {"median_ms": 100 * ratio, "ratio": ratio, "ratio_q1": 0.9 * ratio, "ratio_q3": 1.1 * ratio, **more}


def of_network(label, ratios, task="training", **more):
    return {
        (label, f"{who}, {task}"): timed(ratio, images_per_s=2560 / ratio, peak_MiB=1024 * ratio, **more)
        for who, ratio in ratios.items()
    }


@pytest.mark.parametrize("name", render_gpu.TABLES)
def test_without_rows_every_table_says_so(name, tmp_path):
    assert render_gpu.TABLES[name](tmp_path) == "Nothing has been measured on a GPU yet."
    assert not render_gpu.draw_layers(tmp_path / "plot.png", tmp_path)


RESNET = "resnet50, bfloat16, batch 256"


def test_a_table_of_networks(tmp_path):
    eager = of_network(f"{RESNET}, eager", {"plain": 1.0, "peer": 3.0, "ours": 1.1, "ours-low": 1.2})
    eager[f"{RESNET}, eager", "plain, training"]["floor_ms"] = 40.0
    write(tmp_path, "networks", {
        **of_network("vit_s, bfloat16, batch 256, eager", {"plain": 1.0, "ours": 1.01}),
        **eager,
        **of_network(f"{RESNET}, compiled", {"plain": 1.0, "plain-compiled": 0.9}),
        **of_network(f"{RESNET}, package bcos", {"plain": 1.0, "bcos": 4.0, "bcos, fused, NCHW": 1.5}),
        ("clip_rn50, bfloat16, batch 256, eager", "all"): {"status": "not run", "reason": "needs open_clip"},
        **of_network("resnet50, tf32, batch 256, eager", {"plain": 1.0, "ours": 1.1}),
    })  # fmt: skip
    assert render_gpu.training(tmp_path).splitlines() == [
        "|  | plain | plain, compiled | peer-style | bcosified | bcosified, `memory=\"low\"` | `bcos` | "
        "`bcos`, fused, NCHW inputs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| ResNet-50, bfloat16, batch 256 | 1.00 (2,560 images/s, 2.5 × the floor) | 0.90 (0.81–0.99) | "
        "3.00 (2.70–3.30) | 1.10 (0.99–1.21) | 1.20 (1.08–1.32) | 4.00 (3.60–4.40) | 1.50 (1.35–1.65) |",
        "| ViT-S/16, bfloat16, batch 256 | 1.00 (2,560 images/s) | – | – | 1.01 (0.91–1.11) | – | – | – |",
        "| ResNet-50, tf32, batch 256 | 1.00 (2,560 images/s) | – | – | 1.10 (0.99–1.21) | – | – | – |",
        "",
        WHERE,
    ]
    assert "| ResNet-50, tf32, batch 256 | 1.00 (1.0 GiB) | – | – | 1.10 |" in render_gpu.memory(tmp_path)
    assert render_gpu.inference(tmp_path) == render_gpu.explanations(tmp_path) == render_gpu.NOTHING


def of_layer(forward, both):
    return timed(both, device_forward_ms=forward, device_forward_ratio=forward, device_ms=both, device_ratio=both)


def layers(folder, forward=1.05, both=1.1, cutlass=1.02):
    rows = {}
    for case in ("linear bfloat16, MLP 1: x 8x8, weight 8x8", "conv2d bfloat16, 1x1: x 8x8x4x4, weight 8x8x1x1",
                 "conv2d bfloat16, resnet50 3x3 8->8 at 4^2: x 8x8x4x4, weight 8x8x3x3"):  # fmt: skip
        rows[case, "plain"] = of_layer(1.0, 1.0) | {"forward_floor_ms": 0.5, "floor_ms": 0.4}
        rows[case, "peer"] = of_layer(4.0, 4.4)
        rows[case, "ours-auto"] = of_layer(forward, both)
        rows[case, "ours-cuda:cutlass"] = of_layer(cutlass, both)
        rows[f"{case}, max-autotune", "plain"] = of_layer(1.0, 1.0)
        rows[f"{case}, max-autotune", "peer-compiled"] = of_layer(1.2, 1.375)
    write(folder, "layers", rows)


def test_a_table_of_layers(tmp_path):
    layers(tmp_path)
    text = render_gpu.layers(tmp_path)
    assert "| forward, both | plain / floor | peer | ours, auto | ours, cuda:cutlass |" in text
    line = "| linear bfloat16, MLP 1: x 8x8, weight 8x8 | 2.0, 2.5 | 4.00, 4.40 | 1.05, 1.10 | 1.02, 1.10 |"
    assert line in text and text.count("\n| conv2d") == 2 and "max-autotune" not in text
    assert text.endswith(f"\n\n{WHERE}\n\n![Ratios to the plain layer, sorted, by backend](images/gpu_layers.png)")
    assert render_gpu.draw_layers(tmp_path / "plot.png", tmp_path) and (tmp_path / "plot.png").stat().st_size > 5000


def judged(folder):
    return {target.about: target.judged(folder) for target in render_gpu.TARGETS}


def test_targets_of_layers(tmp_path):
    layers(tmp_path)
    found = judged(tmp_path)
    worst = "(worst 1.05: MLP 1: x 8x8, weight 8x8)"
    assert found["ViT and 1×1 layers, forward / plain"] == (f"1.05 over 2 {worst}", "met")
    assert found["3×3 layers, forward / plain"][1] == found["layers, forward + backward / plain"][1] == "met"
    against = found["layers, forward + backward / peer-style, compiled (max-autotune)"]
    assert against[0].startswith("0.80 over 3") and against[1] == "met"
    against = found["layers, forward + backward / peer-style"]
    assert against[0].startswith("0.25 over 3") and against[1] == "met"
    rate = found["products with their epilogue, the library's rate of the product alone"]
    assert rate[0].startswith("0.98 (") and rate[0].endswith("3 of 3 meet it)") and rate[1] == "met"
    assert found["ResNet-50, batch 256, training step / plain"] == ("–", "not measured")


def test_targets_that_are_missed(tmp_path):
    layers(tmp_path, forward=1.2, both=1.3, cutlass=1.15)
    write(tmp_path, "networks", {
        **of_network(f"{RESNET}, eager", {"plain": 1.0, "peer": 2.4, "ours": 1.01, "ours-low": 0.6}),
        **of_network("vit_b, bfloat16, batch 256, eager", {"plain": 1.0, "ours": 0.9}),
        **of_network("vit_b, bfloat16, batch 256, compiled", {"plain": 1.0, "plain-compiled": 0.8}),
        **of_network("resnet50, float32, batch 256, eager", {"plain": 1.0, "ours": 9.0}),
    })  # fmt: skip
    label = "pass: layer_norm bfloat16, LayerNorm: x 8x8, weight 8, forward"
    write(tmp_path, "choices", {
        (label, "reference"): timed(1.0, share_of_copy=0.2), (label, "triton"): timed(0.3, share_of_copy=0.7),
        (label, "cuda"): timed(0.2, share_of_copy=0.9),
    })  # fmt: skip
    found = judged(tmp_path)
    missed = {about for about, (_, verdict) in found.items() if verdict == "**missed**"}
    assert missed == {
        "ViT and 1×1 layers, forward / plain", "3×3 layers, forward / plain", "layers, forward + backward / plain",
        "layers, forward + backward / peer-style, compiled (max-autotune)",
        "products with their epilogue, the library's rate of the product alone",
        "ResNet-50, batch 256, training step / plain", "ResNet-50, peak memory / peer-style",
        "ResNet-50, batch 256, training step, times as fast as peer-style",
        "ViT-S/B, batch 256, training step / plain, compiled",
    }  # fmt: skip
    assert found["ResNet-50, batch 256, training step / plain"][0] == "1.01"
    assert found["memory-bound passes, share of the copy's bandwidth"] == ("0.90", "met")
    assert found['ResNet-50, peak memory with `memory="low"` / plain'] == ("0.60", "met")
    text = render_gpu.targets(tmp_path)
    assert text.count("not measured") == sum(verdict == "not measured" for _, verdict in found.values()) > 0
    assert "| ResNet-50, batch 256, training step / plain | ≤ 1.00 | 1.01 | **missed** |" in text


def test_the_fine_tune_and_the_choices(tmp_path):
    label = "resnet50, bfloat16, batch 256, 224 pixels, 250 steps"
    losses = {"first_loss": 0.7, "last_loss": 0.1}
    row = timed(1.1, images_per_s=900.0, waiting=0.25, resident_ratio=1.02, memory_MiB=2048, **losses)
    write(tmp_path, "finetune", {(label, "ours"): row, (f"{label}: kernels of ours", "a"): {"share_of_step": 0.5}})
    line = f"| {label}: ours | 900 | 1.10 | 25 % | 1.02 | 0.7000 → 0.1000 | 2,048 MiB |"
    assert line in render_gpu.finetune(tmp_path)
    label = "launching: resnet50, bfloat16, batch 16"
    write(tmp_path, "choices", {
        (label, "ours"): timed(1.5, host_ms=150.0), (label, "ours, CUDA graph"): timed(0.9),
        ("tiles", "compiled side by side"): {"processes": 12},
    })  # fmt: skip
    told = "| ours, CUDA graph 90 ms (0.90); ours 150 ms (1.50; host 150.0 ms) |"
    assert f"| {label} {told}" in render_gpu.choices(tmp_path) and "side by side" not in render_gpu.choices(tmp_path)
