"""The stage `profile`: kinds of kernels, and reports of Nsight Compute."""

from __future__ import annotations

import time

import pytest

from benchmarks.gpu import command, profile, running
from tests.benchmarks.gpu.rows import CPU, rows_of


def test_profile(rehearse):
    status, rows = rehearse("profile")
    assert status == command.DONE
    label = "step: resnet18, float32, batch 2"
    for who in ("plain", "ours"):
        row = rows[label, who]
        assert row["step_ms"] > 0 and 0 < row["busy"] and row["launches"] > 50
        shares = {key: value for key, value in row.items() if key.startswith("share: ")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
        assert ("share: B-cos kernels" in shares) == (who == "ours")
        kernels = {k: row for (case, k), row in rows.items() if case.startswith(f"kernels of {who}: ")}
        assert len(kernels) == profile.MOST and all(row["us_a_launch"] > 0 for row in kernels.values())
    assert rows["counters", "all"]["reason"] == "no GPU"


@pytest.mark.parametrize("kernel, kind", [
    ("conv2d_forward_kernel", "B-cos kernels"),
    ("void bcos::cuda::(anonymous namespace)::scale_kernel<float, 4>(bcos::cuda::Scale)", "B-cos kernels"),
    ("void cutlass::device_kernel<bcos::fused::Conv2dKernel>", "B-cos kernels"),
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16", "products and convolutions of the library"),
    ("void at::native::batch_norm_collect_statistics_channels_last_kernel<float>", "normalisation"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "elementwise"),
    ("Memcpy DtoD (Device -> Device)", "copies"),
    ("abacus", "other"),
])  # fmt: skip
def test_kinds_of_kernels(kernel, kind):
    assert profile.kind_of(kernel) == kind


REPORT = """==PROF== Connected to process 7
==PROF== Disconnected
"ID","Process ID","Kernel Name","{us}","{MB_read}","{MB_written}","{memory}","{compute}"
"","","","ns","byte","byte","%","%"
"0","7","at::cuda::spin_kernel(long)","1,024","0","0","0","0"
"1","7","linear_forward_persistent_kernel","50,000","150,000,000","50,000,000","61.5","70.25"
"2","7","void bcos::cuda::scale_kernel<float>(bcos::cuda::Scale)","2000","8000000","0","","3"
"3","7","at::cuda::spin_kernel(long)","1024","0","0","0","0"
"4","7","conv2d_forward_kernel","9000","7","0","1","2"
""".format(**{name: metric for metric, name in profile.METRICS.items()})


def test_a_report_of_counters():
    found = profile.counters(REPORT, profile.looked_at())
    linear, conv2d = profile.looked_at()[:2]
    assert found == [
        (linear, "linear_forward_persistent_kernel",
         {"us": 50.0, "MB_read": 150.0, "MB_written": 50.0, "memory": 61.5, "compute": 70.25}),
        (linear, "void bcos::cuda::scale_kernel<float>",
         {"us": 2.0, "MB_read": 8.0, "MB_written": 0.0, "compute": 3.0}),
        (conv2d, "conv2d_forward_kernel",
         {"us": 9.0, "MB_read": pytest.approx(7e-6), "MB_written": 0.0, "memory": 1.0, "compute": 2.0}),
    ]  # fmt: skip


@pytest.mark.parametrize("said, status", [((0, REPORT), "done"), ((1, "==ERROR== ERR_NVGPUCTRPERM"), "not run"),
                                          ((0, REPORT.partition('"0"')[0]), "failed")])  # fmt: skip
def test_what_the_profiler_says(said, status, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "output_of", lambda *command, timeout: said)
    run = running.Run(CPU, True, running.Rows("profile", tmp_path, CPU), tmp_path, time.monotonic() + 60)
    profile.looked_at_by_ncu(run, "triton")
    rows = rows_of("profile", tmp_path)
    assert rows["counters: triton", "ncu"]["status"] == status and run.wrong == (status == "failed")
    layers = {case for case, _ in rows if case.startswith("counters of triton: ")}
    assert len(layers) == (2 if status == "done" else 0)
    for case in layers:
        assert all(row["MB_at_least"] > 1 for (of, _), row in rows.items() if of == case)
