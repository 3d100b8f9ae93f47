"""Tuning tables: what a row is about, which rows count, and what happens to files that are none."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from bcos_kernels import cpu, tuning

HERE = ("NVIDIA Abacus", "sm_99")


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """Empty folders for both kinds of tables, and nothing read or warned about."""
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    shipped.mkdir()
    monkeypatch.setattr(tuning, "SHIPPED", shipped)
    monkeypatch.setenv("BCOS_TUNING_CACHE", str(own))
    monkeypatch.setattr(tuning, "_tables", {})
    monkeypatch.setattr(tuning, "_warned", set())
    return shipped, own


def row(
    backends=("triton", "reference"), op="linear", direction="forward", shape_class=("two", False, 1, 2, 3), **more
):
    return {
        "op": op, "direction": direction, "dtype": "bfloat16", "shape_class": list(shape_class),
        "backends": list(backends), **tuning.versions(),
        "kernels": {name: tuning.fingerprint(name) for name in backends if name in tuning.KERNELS}, **more,
    }  # fmt: skip


def write(folder: Path, rows, device=HERE[0], architecture=HERE[1], schema=tuning.SCHEMA) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / tuning.file_name(device)
    content = {"schema": schema, "device": device, "architecture": architecture, "rows": rows}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


KEY = ("linear", "forward", "bfloat16", ("two", False, 1, 2, 3))
INFERENCE = ("linear", "inference", *KEY[2:])


def assembled() -> dict:
    """What is assembled here without the entries that inference takes from the forward's."""
    return {what: backends for what, backends in tuning.assembled(*HERE).items() if what[1] != "inference"}


# --- what a row is about ----------------------------------------------------------------------------------------------


def arguments(op: str, direction: str, given: dict) -> tuple:
    """A launcher's arguments by name, in the order in which the launchers of the CPU backend take them."""
    return tuple(given.get(name) for name in inspect.signature(getattr(cpu, f"{op}_{direction}")).parameters)


X = torch.empty(8, 6, 30, 20, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
CONVOLUTION = dict(
    x=X, dy=X, dz=X, weight=torch.empty(36, 6, 3, 5, device="meta"), stride=(1, 2), padding=(1, 1), dilation=(1, 3),
    groups=1, b=2.0, b_tensor=None, max_out=3, training=True, keep=True,
)  # fmt: skip
ROWS = torch.empty(100, 384, dtype=torch.float16, device="meta")
LAYER = dict(
    x=ROWS, dy=ROWS, dh=ROWS, weight=torch.empty(1000, 384, device="meta"), b=1.5, b_tensor=None, max_out=1, keep=True
)  # fmt: skip
# 8·30·20/2 = 2400 windows: below 8⁴; 6 channels: below 2³; 36 units: below 2⁶
WINDOW = ("two", True, 3, 5, 2, 3, 0, True, 4, 3, 6)
CLASSES = [
    ("linear", LAYER, "float16", ("general", False, 2, 9, 10)),
    ("linear_gelu", LAYER, "float16", ("general", False, 2, 9, 10)),
    ("conv2d", CONVOLUTION, "bfloat16", WINDOW),
    ("conv2d_batch_norm", CONVOLUTION, "bfloat16", (*WINDOW, True)),
    ("batch_norm_uncentered", CONVOLUTION, "bfloat16", (True, True, 4, 3)),
    ("layer_norm", dict(LAYER, dims=1), "float16", (2, 9)),
]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op, given, dtype, shape_class", CLASSES, ids=[case[0] for case in CLASSES])
def test_forward_and_backward_are_of_one_class(op, given, dtype, shape_class, direction):
    """Of the launchers' arguments as they are declared: a place that moved would show here."""
    expected = (op, "forward" if op in tuning.JOINT else direction, dtype, shape_class)
    assert tuning.key(op, direction, arguments(op, direction, given)) == expected
    assert json.loads(json.dumps(expected[3])) == list(expected[3])


@pytest.mark.parametrize("op, given, dtype, shape_class", CLASSES, ids=[case[0] for case in CLASSES])
def test_a_forward_that_keeps_nothing_is_inference(op, given, dtype, shape_class):
    """Of the ops that can keep nothing, fused ones among them; by the arguments as they are declared."""
    has_flag = "keep" in inspect.signature(getattr(cpu, f"{op}_forward")).parameters
    assert has_flag == (op in tuning.KEEP)
    what = tuning.key(op, "forward", arguments(op, "forward", dict(given, keep=False)))
    assert what == (op, "inference" if has_flag else "forward", dtype, shape_class)


def test_a_tensor_exponent_is_a_class_of_its_own():
    given = dict(LAYER, b=0.0, b_tensor=torch.tensor(1.0))
    assert tuning.key("linear", "forward", arguments("linear", "forward", given))[3][0] == "general"
    given = dict(LAYER, b=1.0)
    assert tuning.key("linear", "forward", arguments("linear", "forward", given))[3][0] == "one"


def test_groups_and_layouts_are_told_apart():
    def of(x, weight, groups):
        given = dict(CONVOLUTION, x=x, weight=weight, groups=groups)
        return tuning.key("conv2d", "forward", arguments("conv2d", "forward", given))[3][6:8]

    x = torch.empty(2, 8, 5, 5)
    rows = x.to(memory_format=torch.channels_last)
    assert of(x, torch.empty(8, 8, 3, 3), 1) == (0, False)
    assert of(rows, torch.empty(8, 1, 3, 3), 8) == (1, True)
    assert of(rows, torch.empty(8, 4, 3, 3), 2) == (2, True)


@pytest.mark.parametrize("count, expected", [(0, 0), (1, 0), (2, 0), (8, 1), (9, 1), (64, 2), (2**18, 6), (2**40, 6)])
def test_rows_are_classed_by_factors_of_eight(count, expected):
    assert tuning._rows(count) == expected


def test_float32_is_named_by_how_it_multiplies(monkeypatch):
    assert tuning.precision("linear", torch.float64) == ""
    monkeypatch.setattr(tuning, "_tf32", lambda op: op.startswith("conv2d"))
    assert tuning.precision("linear", torch.float32) == tuning.precision("linear_gelu", torch.float32) == "float32"
    assert tuning.precision("conv2d", torch.float32) == tuning.precision("conv2d_batch_norm", torch.float32) == "tf32"
    monkeypatch.setattr(tuning, "_tf32", lambda op: True)
    assert tuning.precision("batch_norm_uncentered", torch.float32) == "float32"
    assert tuning.precision("conv2d", torch.bfloat16) == "bfloat16"


# --- which rows count -------------------------------------------------------------------------------------------------


def test_without_tables_nothing_is_verified():
    assert tuning.assembled(*HERE) == {}


def test_the_package_s_own_tables_are_tables(monkeypatch):
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in tuning.SHIPPED.glob("*.json"):
            assert path.name == tuning.file_name(tuning.read(path)["device"])


def test_a_row_is_found(folders):
    write(folders[0], [row()])
    assert assembled() == {KEY: ("triton", "reference")}


def test_the_reference_is_behind_every_kernel_and_nothing_behind_it(folders):
    other = ("two", False, 2, 2, 3)
    write(folders[0], [row(("cuda",)), row(("reference", "triton"), shape_class=other)])
    found = tuning.assembled(*HERE)
    assert found[KEY] == ("cuda", "reference")
    assert found[*KEY[:3], other] == ("reference",)


def test_a_variant_is_verified_apart_from_its_backend(folders):
    both = row(("cuda:cutlass", "cuda", "reference"))
    write(folders[0], [both])
    assert assembled() == {KEY: ("cuda:cutlass", "cuda", "reference")}
    write(folders[0], [dict(both, kernels=both["kernels"] | {"cuda:cutlass": "0" * 12})])
    assert assembled() == {KEY: ("cuda", "reference")}
    write(folders[1], [tuning.row(KEY, {"reference": 2.0, "cuda": 1.0}, "", ["cuda:cutlass"])])
    write(folders[0], [dict(both, shape_class=["two", False, 5, 2, 3])])
    assert set(tuning.assembled(*HERE).values()) == {("cuda", "reference")}


def test_the_last_word(folders):
    """Another device's rows, before this device's; the package's before the user's."""
    shipped, own = folders
    write(shipped, [row(("cuda", "reference"))], device="NVIDIA Other")
    assert tuning.assembled(*HERE)[KEY] == ("cuda", "reference")
    write(shipped, [row(("triton", "reference"))])
    assert tuning.assembled(*HERE)[KEY] == ("triton", "reference")
    write(own, [row(("triton", "cuda", "reference"))], device="NVIDIA Other")
    assert tuning.assembled(*HERE)[KEY] == ("triton", "cuda", "reference")
    write(own, [row(("reference",))])
    assert tuning.assembled(*HERE)[KEY] == ("reference",)


def test_inference_goes_by_its_own_row_else_by_the_forward_s(folders):
    other, of_block = ("two", False, 2, 2, 3), dict(op="conv2d_batch_norm", shape_class=("two", 1))
    write(folders[0], [
        row(("triton", "cuda")), row(("cuda", "triton"), direction="inference"), row(("cuda",), shape_class=other),
        row(("triton",), **of_block), row(("cuda",), direction="backward"), row(("triton",), op="layer_norm"),
    ])  # fmt: skip
    found = tuning.assembled(*HERE)
    assert found[KEY] == ("triton", "cuda", "reference") and found[INFERENCE] == ("cuda", "triton", "reference")
    assert found[*INFERENCE[:3], other] == ("cuda", "reference")
    assert found["conv2d_batch_norm", "inference", "bfloat16", ("two", 1)] == ("triton", "reference")
    assert sum(what[1] == "inference" for what in found) == 3  # nothing of a backward, and of ops that always keep


def test_a_row_of_inference_says_nothing_about_training(folders):
    write(folders[0], [row(direction="inference")])
    assert tuning.assembled(*HERE) == {INFERENCE: ("triton", "reference")}


def test_inference_with_a_row_that_holds_no_more_goes_by_the_forward_s(folders):
    stale = dict(row(("triton", "cuda"), direction="inference"), kernels={"triton": "0" * 12, "cuda": "0" * 12})
    write(folders[0], [row(("cuda", "triton")), stale])
    assert tuning.assembled(*HERE)[INFERENCE] == ("cuda", "triton", "reference")
    write(folders[1], [tuning.row(INFERENCE, {"reference": 1.0}, "", ["cuda"])])  # wrong in one is wrong in all
    assert tuning.assembled(*HERE) == {KEY: ("triton", "reference"), INFERENCE: ("reference",)}


def test_other_architectures_and_versions_do_not_count(folders):
    write(folders[0], [row()], device="NVIDIA Old", architecture="sm_10")
    write(folders[1], [row(torch="1.0"), row(triton="1.0")])
    assert tuning.assembled(*HERE) == {}


def test_code_that_changed_is_unverified(folders):
    stale = row(("triton", "cuda", "reference"))
    stale["kernels"]["triton"] = "0" * 12
    write(folders[1], [stale])
    assert assembled() == {KEY: ("cuda", "reference")}
    for backends in (["triton"], ["reference", "triton"]):
        write(folders[1], [dict(stale, backends=backends)])
        assert tuning.assembled(*HERE) == {}


def test_what_the_user_found_wrong_serves_no_shape_of_that_op_and_dtype(folders):
    others = [row(shape_class=("two", False, 3, 2, 3)), row(dtype="float16"), row(op="linear_gelu")]
    write(folders[0], others)
    found = tuning.row(KEY, {"reference": 1.0}, "", ["triton"])
    assert found["kernels"] == {"triton": tuning.fingerprint("triton")}
    write(folders[1], [found])
    table = assembled()
    assert table.pop(KEY) == ("reference",) and table.pop((*KEY[:3], ("two", False, 3, 2, 3))) == ("reference",)
    assert set(table.values()) == {("triton", "reference")} and len(table) == 2
    write(folders[1], [dict(found, kernels={"triton": "0" * 12})])  # of kernels that have changed since
    assert ("reference",) not in tuning.assembled(*HERE).values()


def test_fingerprints_are_of_the_code():
    assert len({tuning.fingerprint(name) for name in tuning.KERNELS}) == len(tuning.KERNELS)
    assert all(len(tuning.fingerprint(name)) == 12 for name in tuning.KERNELS)


def test_a_device_s_table_is_read_once(folders, monkeypatch):
    device = torch.device("cuda", 3)
    monkeypatch.setattr(tuning, "identity", lambda device: HERE)
    write(folders[1], [row()])
    assert tuning.table(device) == {KEY: ("triton", "reference"), INFERENCE: ("triton", "reference")}
    write(folders[1], [])
    assert tuning.table(device) is tuning.table(device) and KEY in tuning.table(device)
    tuning.drop(device, KEY, "triton")
    assert tuning.table(device) == {KEY: ("reference",), INFERENCE: ("triton", "reference")}
    tuning.drop(device, ("elsewhere",), "triton")
    tuning.forget()
    assert tuning.table(device) == {}


# --- files that are no tables -----------------------------------------------------------------------------------------

CORRUPT = {
    "no JSON": "{",
    "cut off": '{"schema": 1, "rows": [',
    "not text": b"\xff\xfe\x00",
    "a list": "[]",
    "another schema": json.dumps({"schema": 99, "device": "", "architecture": "", "rows": []}),
    "no rows": json.dumps({"schema": 1, "device": "", "architecture": ""}),
    "a row without backends": json.dumps(
        {"schema": 1, "device": HERE[0], "architecture": HERE[1], "rows": [{"op": "linear"}]}
    ),
    "an unknown op": None,
    "inference of an op that always keeps": None,
    "an unknown backend": None,
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("kind", CORRUPT)
@pytest.mark.parametrize("place", [0, 1], ids=["shipped", "own"])
def test_a_file_that_is_no_table_is_ignored_with_one_warning(kind, place, folders):
    rows = {
        "an unknown op": row(op="conv9d"),
        "inference of an op that always keeps": row(op="layer_norm", direction="inference"),
    }
    path = write(folders[place], [rows.get(kind, row(("abacus",)))])
    if CORRUPT[kind] is not None:
        text = CORRUPT[kind]
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    good = write(folders[1 - place], [row()])
    with pytest.warns(RuntimeWarning, match=f"tuning table {path} is ignored: "):
        assert assembled() == {KEY: ("triton", "reference")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assembled() == {KEY: ("triton", "reference")}
    assert good.is_file()


def test_a_file_that_cannot_be_read(folders):
    path = write(folders[1], [])
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert tuning.assembled(*HERE) == {}


# --- writing ----------------------------------------------------------------------------------------------------------


def test_rows_that_are_written_are_found(folders):
    made = tuning.row(KEY, {"reference": 2.0, "triton": 1.23456}, "x 64x384", ["cuda"])
    assert made["backends"] == ["triton", "reference"] and made["median_ms"] == {"triton": 1.235, "reference": 2.0}
    assert made["wrong"] == ["cuda"] and made["example"] == "x 64x384"
    path = tuning.save([made], *HERE)
    assert path == folders[1] / "nvidia_abacus.json"
    assert assembled() == {KEY: ("triton", "reference")}
    assert [p.name for p in folders[1].iterdir()] == [path.name]


def test_rows_about_the_same_are_replaced_and_others_stay():
    other = (*KEY[:3], ("two", False, 5, 2, 3))
    tuning.save(
        [tuning.row(KEY, {"reference": 2.0, "triton": 1.0}, ""), tuning.row(other, {"reference": 1.0}, "")], *HERE
    )
    tuning.save([tuning.row(KEY, {"reference": 1.0, "triton": 2.0}, "")], *HERE)
    assert assembled() == {KEY: ("reference",), other: ("reference",)}
    assert len(tuning.read(tuning.folder() / "nvidia_abacus.json")["rows"]) == 2


def test_a_write_that_fails_leaves_the_table_as_it_was(folders, monkeypatch):
    path = tuning.save([tuning.row(KEY, {"reference": 2.0, "triton": 1.0}, "")], *HERE)
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        tuning.save([tuning.row(KEY, {"reference": 1.0}, "")], *HERE)
    assert path.read_bytes() == before and [p.name for p in folders[1].iterdir()] == [path.name]


def test_a_corrupt_table_is_written_anew(folders):
    path = write(folders[1], [])
    path.write_text("{")
    with pytest.warns(RuntimeWarning, match="is ignored"):
        tuning.save([tuning.row(KEY, {"reference": 2.0, "triton": 1.0}, "")], *HERE)
    assert assembled() == {KEY: ("triton", "reference")}


def test_where_tables_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("BCOS_TUNING_CACHE", "~/tables")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.folder() == tmp_path / "tables"
    monkeypatch.delenv("BCOS_TUNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tuning.folder() == tmp_path / "cache" / "bcos_kernels" / "tuning"
    for absent in ("", "relative/path"):  # to be ignored, says the XDG specification
        monkeypatch.setenv("XDG_CACHE_HOME", absent)
        assert tuning.folder() == tmp_path / ".cache" / "bcos_kernels" / "tuning"
    monkeypatch.setenv("BCOS_TUNING_CACHE", "off")
    assert tuning.folder() is None and tuning.assembled(*HERE) == {}
    with pytest.raises(OSError, match="there is no folder for tuning tables"):
        tuning.save([], *HERE)


def test_summary():
    table = {KEY: ("triton", "reference"), (*KEY[:3], (1,)): ("triton", "reference"), (*KEY[:3], (2,)): ("reference",)}
    of = {"op": "linear", "direction": "forward", "dtype": "bfloat16"}
    assert tuning.summary(table) == [
        {**of, "backend": "reference", "shape_classes": 1},
        {**of, "backend": "triton", "shape_classes": 2},
    ]


# --- python -m bcos_kernels -------------------------------------------------------------------------------------------


def test_the_report_shows_what_is_verified_where(monkeypatch):
    from bcos_kernels import __main__ as report

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(tuning, "identity", lambda device: HERE)
    monkeypatch.setattr(tuning, "_tables", {0: {KEY: ("triton", "reference"), (*KEY[:3], ()): ("triton",)}, 1: {}})
    verified = report._verified()
    row = {"op": "linear", "direction": "forward", "dtype": "bfloat16", "backend": "triton", "shape_classes": 2}
    assert verified == {"cuda:0": {"name": HERE[0], "rows": [row]}, "cuda:1": {"name": HERE[0], "rows": []}}
    monkeypatch.undo()
    text = report._text({**report.environment(), "verified": verified})
    assert "verified on cuda:0, NVIDIA Abacus\n  linear forward bfloat16  triton, 2 shape classes\n" in text
    assert "verified on cuda:1, NVIDIA Abacus\n  none  auto runs the library plus eager passes; python -m" in text
