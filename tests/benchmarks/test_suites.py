"""The suites run on small images, and leave the rows that the tables are made of. Times are not looked at."""

import pytest
import torch

import bcosification
from bcos_kernels import reference
from benchmarks import bench_explanations, bench_layers, bench_memory, bench_models
from benchmarks.networks import Models, NotHere, inputs
from benchmarks.protocol import load_rows

CASE = "resnet18, batch 2, 64 pixels"


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setenv("BCOS_BENCH_RESULTS", str(tmp_path))
    for name, value in (("CONTENDERS", "eager"), ("ROUNDS", "1"), ("BATCH", "2"), ("SIZE", "64")):
        monkeypatch.setenv(f"BCOS_BENCH_{name}", value)
    monkeypatch.delenv("BCOS_BENCH_DTYPE", raising=False)


def rows_of(suite):
    return {(row["case"], row["contender"]): row for row in load_rows(suite)}


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_training(monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend="eager"))
    monkeypatch.setenv("BCOS_BENCH_CONTENDERS", "plain,peer,fused-peer,ours,ours-compiled,ours-low")
    bench_models.test_training("resnet18")
    rows = rows_of("training")
    assert set(rows) == {(CASE, who) for who in "plain peer fused-peer ours ours-compiled ours-low".split()}
    for who in ("fused-peer", "ours", "ours-compiled", "ours-low"):
        assert rows[CASE, who]["gradient_error"] < 1e-3
    assert "compile_s" in rows[CASE, "ours-compiled"] and "compile_s" not in rows[CASE, "ours"]
    assert all(row["median_ms"] > 0 and row["batch"] == 2 for row in rows.values())


def test_inference_where_a_network_is_not_convertible(monkeypatch):
    def refuse(model):
        raise ValueError("bcosify: no family knows it\n- at length")

    monkeypatch.setattr(bcosification, "bcosify", refuse)
    bench_models.test_inference("resnet18")
    rows = rows_of("inference")
    assert {who for _, who in rows} == {"plain", "peer", "fused-peer", "ours"}
    ours = rows[CASE, "ours"]
    assert (ours["status"], ours["reason"]) == ("not convertible yet", "bcosify: no family knows it")
    assert "status" not in rows[CASE, "fused-peer"]


def test_wrong_numbers_end_a_suite(monkeypatch):
    fuse = bcosification.fuse

    def wrong(model, **options):
        fuse(model, **options)
        with torch.no_grad():
            next(model.parameters()).mul_(-1)
        return model

    monkeypatch.setattr(bcosification, "fuse", wrong)
    monkeypatch.setenv("BCOS_BENCH_CONTENDERS", "fused-peer")
    with pytest.raises(AssertionError, match="fused-peer"):
        bench_models.test_training("resnet18")
    assert rows_of("training") == {}


def test_memory():
    bench_memory.test_memory("resnet18")
    rows = rows_of("memory")
    plain, peer = rows[CASE, "plain"], rows[CASE, "peer"]
    assert plain["kept_ratio"] == plain["peak_ratio"] == 1
    assert peer["kept_MiB"] > rows[CASE, "ours"]["kept_MiB"] > rows[CASE, "ours-low"]["kept_MiB"]
    assert peer["kept_ratio"] == pytest.approx(peer["kept_MiB"] / plain["kept_MiB"], rel=1e-3)
    assert all(row["peak_MiB"] > row["kept_MiB"] for row in rows.values())


def test_explanations():
    bench_explanations.test_explanations("resnet18", 16)
    rows = rows_of("explanations")
    assert {who for _, who in rows} == set(bench_explanations.CONTENDERS)
    for who in ("peer-batch", "fused-peer", "ours"):
        assert rows[CASE, who]["gradient_error"] < 1e-3
    ours = rows[CASE, "ours"]
    assert ours["explanations_per_s"] == pytest.approx(2 / ours["median_ms"] * 1e3, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers(dtype, monkeypatch):
    monkeypatch.setenv("BCOS_BENCH_DTYPE", dtype)
    shapes = bench_layers.convolutions("resnet50", 64)
    monkeypatch.setattr(bench_layers, "convolutions", lambda network, size: shapes[1:3])
    bench_layers.test_conv2d("resnet50")
    rows = rows_of("layers_resnet50" + ("" if dtype == "float32" else "_bfloat16"))
    assert {who for _, who in rows} == {"plain", "peer", "ours"} and len(rows) == 6
    assert all(row["dtype"] == dtype and row["forward_ms"] > 0 for row in rows.values())


def test_wrong_numbers_of_a_layer_are_not_timed(monkeypatch):
    linear = reference.linear
    monkeypatch.setattr(reference, "linear", lambda x, w: 1.1 * linear(x, w))
    with pytest.raises(AssertionError, match="ViT-Ti attention out"):
        bench_layers.test_linear()
    assert rows_of("layers_vit") == {}


def test_what_is_missing_is_named(monkeypatch):
    from benchmarks import networks

    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None if name == "einops" else name)
    with pytest.raises(NotHere, match="pip install einops") as error:
        Models("vit_ti", 32).build("fused-peer")
    assert error.value.status == "needs einops"


def test_inputs_are_what_a_contender_takes():
    plain, peer, nchw = (inputs(name, 2, 8) for name in ("plain", "fused-peer", "fused-peer-nchw"))
    assert plain.shape == (2, 3, 8, 8) and torch.equal(peer, torch.cat([plain, 1 - plain], 1))
    assert peer.is_contiguous(memory_format=torch.channels_last) and nchw.is_contiguous() and torch.equal(nchw, peer)
