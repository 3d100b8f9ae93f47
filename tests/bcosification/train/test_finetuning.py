"""Fine-tuning runs end to end, on a small network and real digits."""

import copy
import csv
import dataclasses
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import bcosification
from bcosification.evaluation import evaluate
from bcosification.train import finetuning, run_folder
from bcosification.train.data import build_datamodule
from bcosification.train.finetuning import FinetuneConfig, check_output, finetune
from bcosification.train.run_folder import saved_config
from tests.bcosification.train.small import STATISTICS, small_network


def _config(output, **changes):
    options = dict(
        data="digits", output=str(output), epochs=3, batch_size=16, limit_batches=3, lr=1e-2, progress=False,
        conversion=STATISTICS, accelerator="cpu",
    )  # fmt: skip
    return FinetuneConfig(**(options | changes))


def _weights(folder, model):
    return bcosification.load(folder, model=model).state_dict()


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_it_says(tmp_path):
    network = small_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = finetune(_config(tmp_path / "run"), model=network)
    assert _equal(before, network.state_dict())
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.csv", "training_curves.png", "backends.json", "last.ckpt", "last", "best",
    }  # fmt: skip
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [int(row["step"]) for row in rows] == [3, 6, 9]
    assert [float(row["val_loss"]) for row in rows] == [row["val_loss"] for row in result.history]
    assert Image.open(folder / "training_curves.png").size[0] > 500
    last = bcosification.load(folder / "last", model=small_network(1))
    assert _equal(last.state_dict(), result.model.state_dict())
    assert last.config["class_names"] == [str(i) for i in range(10)]
    assert last.config["input_size"] == [32, 32]
    # The accuracy in the file is that of the weights in the folder, measured by other code.
    best = bcosification.load(folder / "best", model=small_network(1))
    val = build_datamodule("digits", batch_size=16).val_dataloader()
    batches = [batch for batch, _ in zip(val, range(3), strict=False)]
    assert evaluate(best, batches, progress=False)["top1"] == pytest.approx(result.best)
    assert result.best == max(row["val_top1"] for row in result.history)
    # The folder of a run stands for its best epoch.
    assert _equal(bcosification.load(folder, model=small_network(1)).state_dict(), best.state_dict())
    assert bcosification.resolve(str(folder), model=small_network(1))[1]["converted"]
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "config.yaml").write_text("model: x\n")
    with pytest.raises(FileNotFoundError, match="expected a run with at least one complete epoch, found none in .*ed$"):
        bcosification.load(tmp_path / "killed")


def test_training_improves_on_the_start(tmp_path):
    config = _config(tmp_path / "run", limit_batches=None, batch_size=32, augment=False)
    result = finetune(config, model=small_network())
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"] - 0.01
    assert result.history[-1]["val_top1"] > 0.18  # chance: 0.1; this network has eight hidden units


@pytest.mark.parametrize(
    "changes",
    [
        dict(optimizer="adamw", weight_decay=0.05, warmup_epochs=0.5, agc=0.1),
        dict(b_epochs=2.5, bias="decay", bias_epochs=1.5),
        dict(bias="decay", bias_epochs=2.5, clip_norm=1.0),
    ],
    ids=["adamw", "schedules-ended", "schedules-running"],
)
def test_resumed_equals_uninterrupted(tmp_path, changes, monkeypatch):
    """A run stopped in its third epoch and continued: weights, history, checkpoint equal, bit for bit."""
    whole = finetune(_config(tmp_path / "whole", epochs=4, **changes), model=small_network())

    class Stop(Exception):
        pass

    from bcosification.train.lightning_module import ClassificationModule

    step = ClassificationModule.training_step

    def stopping(self, batch, batch_idx):
        if self.trainer.current_epoch == 2 and batch_idx == 1:
            raise Stop
        return step(self, batch, batch_idx)

    config = _config(tmp_path / "parts", epochs=4, **changes)
    monkeypatch.setattr(ClassificationModule, "training_step", stopping)
    with pytest.raises(Stop):
        finetune(config, model=small_network())
    monkeypatch.undo()
    torch.manual_seed(99)
    resumed = finetune(config, model=small_network(5), resume=True)
    assert _equal(whole.model.state_dict(), resumed.model.state_dict())
    assert _equal(
        _weights(tmp_path / "whole/best", small_network()), _weights(tmp_path / "parts/best", small_network())
    )
    without_time = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (whole, resumed)]
    assert without_time[0] == without_time[1]
    states = [torch.load(r.output / "last.ckpt", weights_only=True)["optimizer_states"][0] for r in (whole, resumed)]
    for a, b in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True):
        assert _equal(a, b)
    assert states[0]["param_groups"] == states[1]["param_groups"]


def test_killed_for_real_and_resumed(tmp_path):
    """SIGKILL in the middle of the run, from outside; what is left is complete enough to go on."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from tests.bcosification.train.test_finetuning import _config, finetune, small_network\n"
        "finetune(_config(sys.argv[1], epochs=400), model=small_network())\n"
    )
    root = str(Path(__file__).resolve().parents[3])
    output = tmp_path / "run"
    process = subprocess.Popen([sys.executable, str(script), str(output), root], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (output / "last.ckpt").is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    checkpoint = torch.load(output / "last.ckpt", weights_only=True)
    done = checkpoint["epoch"] + 1
    assert done < 390
    # The same run, cut short: its configuration is what a resume compares with.
    config = _config(output, epochs=done + 2, model="Sequential")
    (output / "config.yaml").write_text(config.to_yaml())
    result = finetune(config, model=small_network(), resume=True)
    assert [row["epoch"] for row in result.history] == list(range(1, done + 3))
    assert result.history[-1]["step"] == 3 * (done + 2)


def test_resume_before_the_first_checkpoint_starts_again(tmp_path):
    whole = finetune(_config(tmp_path / "whole", epochs=1), model=small_network())
    (tmp_path / "killed").mkdir()
    config = _config(tmp_path / "killed", epochs=1, model="Sequential")
    (tmp_path / "killed/config.yaml").write_text(config.to_yaml())
    resumed = finetune(config, model=small_network(), resume=True)
    assert _equal(whole.model.state_dict(), resumed.model.state_dict())


def test_resume_refuses_another_configuration(tmp_path):
    config = _config(tmp_path / "run", epochs=1)
    finetune(config, model=small_network())
    other = dataclasses.replace(config, lr=0.5, conversion=STATISTICS | {"pool": "keep"})
    message = (
        r"the run that is resumed \(.*config.yaml\), lr=0.01, pool=None; got lr=0.5, pool='keep': another run needs"
    )
    with pytest.raises(ValueError, match=message):
        finetune(other, model=small_network(), resume=True)
    again = finetune(dataclasses.replace(config, num_workers=0), model=small_network(), resume=True)
    assert len(again.history) == again.earlier == 1  # complete already: nothing is trained


def test_complete_run_goes_on_with_more_epochs(tmp_path, capsys):
    """The rates of the new epochs are those of a run that was meant to be as long from the start."""
    config = _config(tmp_path / "run", epochs=2, warmup_epochs=0.5, progress=False)
    first = finetune(config, model=small_network())
    capsys.readouterr()
    longer = finetune(dataclasses.replace(config, epochs=4), model=small_network(), resume=True)
    assert "going on after epoch 2 of 4" in capsys.readouterr().out
    assert longer.earlier == 2 and first.earlier == 0
    assert longer.history[:2] == first.history and [row["step"] for row in longer.history] == [3, 6, 9, 12]
    whole = finetune(_config(tmp_path / "whole", epochs=4, warmup_epochs=0.5), model=small_network())
    assert [row["lr"] for row in longer.history[2:]] == pytest.approx([row["lr"] for row in whole.history[2:]])
    assert longer.history[2]["lr"] > 1e-3 and first.history[1]["lr"] == pytest.approx(0, abs=1e-12)
    assert longer.history[2]["train_loss"] < first.history[0]["train_loss"]
    assert saved_config(tmp_path / "run").epochs == 4
    with pytest.raises(ValueError, match="expected epochs >= 4, which the run in .*run has done, got 3"):
        finetune(dataclasses.replace(config, epochs=3), model=small_network(), resume=True)


@pytest.mark.parametrize("columns", [0, 80])
def test_a_bar_needs_a_terminal_with_a_width(columns):
    """On a real pseudo-terminal: a width of 0 is what a container without a size has."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        code = "from bcosification.train.training import _has_terminal; raise SystemExit(3 + _has_terminal())"
        done = subprocess.run([sys.executable, "-c", code], stdout=slave, timeout=120)
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == (4 if columns else 3)


def test_what_is_printed(tmp_path, capsys):
    for progress in (True, False, None):
        result = finetune(_config(tmp_path / str(progress), epochs=2, progress=progress), model=small_network())
        out = capsys.readouterr().out
        lines = re.findall(
            r"^epoch (\d) of 2: training: loss (\S+), top-1 (\S+) %; validation: loss (\S+), ", out, re.M
        )
        if progress is None:
            assert out == ""
            continue
        assert "1,438 images to train on" in out
        expected = [
            (str(row["epoch"]), f"{row['train_loss']:.4f}", f"{100 * row['train_top1']:.2f}", f"{row['val_loss']:.4f}")
            for row in result.history
        ]
        assert lines == expected


def test_folder_of_images_with_corrupt_files(tmp_path):
    digits = build_datamodule("digits")
    for part, data in (("train", digits.train), ("val", digits.val)):
        for i in range(24):
            label = int(data.labels[i])
            path = tmp_path / "data" / part / f"class{label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.images[i].permute(1, 2, 0).numpy()).save(path)
    broken = tmp_path / "data" / "train" / "class0" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 no")
    config = _config(tmp_path / "run", data=str(tmp_path / "data"), image_size=32, epochs=1, batch_size=8)
    with pytest.warns(UserWarning, match=f"1 unreadable image file is left out, listed in .*; first: {broken}"):
        result = finetune(dataclasses.replace(config, num_workers=0), model=small_network())
    assert [path for path, _ in result.unreadable] == [str(broken)]
    assert str(broken) in (tmp_path / "run/unreadable_images.txt").read_text()
    assert result.model.config["class_names"] == [f"class{i}" for i in range(10)]
    assert result.model.config["resize"] == round(32 * 256 / 224)


def test_b_cosified_model_is_trained_on_as_it_is(tmp_path, monkeypatch):
    """What convert wrote: fine-tuned further, its options kept, others refused."""
    model = bcosification.bcosify(small_network(), b=1.5, **STATISTICS)
    result = finetune(_config(tmp_path / "run", conversion={}, b=1.5, epochs=1), model=copy.deepcopy(model))
    assert {module.b for module in result.model.modules() if hasattr(module, "set_b")} == {1.5}
    with pytest.raises(ValueError, match="expected b=1.5, which .* was B-cosified with, got b=2.0"):
        finetune(_config(tmp_path / "other", conversion={}), model=model)
    with pytest.raises(ValueError, match="expected no options of conversion.*got mean=, std="):
        finetune(_config(tmp_path / "other", b=1.5), model=model)
    assert not (tmp_path / "other").exists()


def test_ctrl_c_is_passed_on(tmp_path, monkeypatch):
    from bcosification.train.lightning_module import ClassificationModule

    def interrupted(self, batch, batch_idx):
        raise KeyboardInterrupt

    monkeypatch.setattr(ClassificationModule, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(_config(tmp_path / "run"), model=small_network())
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_head_for_another_number_of_classes(tmp_path):
    for part in ("train", "val"):
        for name in ("a", "b", "c"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), "red").save(tmp_path / "data" / part / name / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _config(tmp_path / "run", data=str(tmp_path / "data"), image_size=16, epochs=1, num_workers=0)
        result = finetune(config, model=small_network())
    assert result.model.num_classes == 3
    config = json.loads((tmp_path / "run/last/config.json").read_text())
    assert config["num_classes"] == 3 and config["class_names"] == ["a", "b", "c"]
    assert config["logit_bias"] == pytest.approx(-0.6931472)


def test_compiled_training_saves_plain_names(tmp_path):
    plain = finetune(_config(tmp_path / "plain", epochs=1), model=small_network())
    compiled = finetune(_config(tmp_path / "compiled", epochs=1, compile=True), model=small_network())
    a, b = plain.model.state_dict(), _weights(tmp_path / "compiled/last", small_network())
    assert a.keys() == b.keys()
    # Adam divides by the root of tiny second moments: rounding in the gradient shows up to a step's size (1e-2).
    assert compiled.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=1e-4)


def test_mixed_precision_trains(tmp_path):
    mixed = finetune(_config(tmp_path / "mixed", precision="bf16-mixed"), model=small_network())
    full = finetune(_config(tmp_path / "full"), model=small_network())
    assert mixed.history[-1]["train_loss"] == pytest.approx(full.history[-1]["train_loss"], rel=0.02)
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}


# --- bad input: told before anything is written -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(epochs=0), "expected epochs >= 1, got 0"),
        (dict(lr=-1.0), "expected lr > 0, got -1.0"),
        (dict(b=0.5), "expected b >= 1, got 0.5"),
        (dict(bias="drop"), r"expected bias in \('remove', 'keep', 'decay'\), got 'drop'"),
        (dict(bias="decay"), "expected bias_epochs > 0 with bias='decay', got 0"),
        (dict(bias_epochs=1.0), "expected bias_epochs to be 0 without bias='decay', got 1.0"),
        (dict(b_epochs=7.0), r"expected b_epochs between 0 and the number of epochs, 3, got 7.0"),
        (dict(warmup_epochs=3.0), r"expected warmup_epochs >= 0 and < 3 .*, got 3.0"),
        (dict(loss="mse"), "expected loss in .*got 'mse'"),
        (dict(agc=0.01, clip_norm=1.0), "expected agc= or clip_norm=, got both: 0.01 and 1.0"),
        (dict(data="nowhere"), "expected one of .*got 'nowhere'"),
        (dict(image_size=8), "expected image_size to be one that .* can take"),
        (dict(conversion={"b": 1.5}), "expected b outside of conversion"),
        (dict(limit_batches=0), "expected limit_batches >= 1, got 0"),
        (dict(accelerator="abacus"), "expected accelerator to be one of auto, .*cpu.*, got 'abacus'$"),
        (
            dict(accelerator="tpu"),
            "expected accelerator to be one of auto, .*, got 'tpu', of which torch finds none here",
        ),
        (dict(devices="two"), "expected devices to be a number >= 1, auto, .* got 'two'"),
        (dict(devices="0"), "expected devices to be a number >= 1, auto, .* got '0'"),
        (dict(devices="0,1"), "expected precision=, accelerator= and devices= that this machine has.*'cpu' and '0,1'"),
        (dict(precision="3-bits"), "expected precision to be one of 32-true, bf16-mixed, .*, got '3-bits'"),
    ],
)
def test_bad_configuration_writes_nothing(tmp_path, changes, message):
    model = small_network()
    if "image_size" in changes:
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 9), *list(small_network())[5:7], torch.nn.Linear(4, 10))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune(_config(tmp_path / "run", **changes), model=model)
    assert list(tmp_path.iterdir()) == []


def test_output_folder_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "_prepare", lambda *a: pytest.fail("the model was built before the check"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a new or empty folder, got .*full with files in it; choose"):
        finetune(_config(tmp_path / "full", model="x"))
    with pytest.raises(NotADirectoryError, match="expected a folder, got .*notes.txt"):
        finetune(_config(tmp_path / "full" / "notes.txt", model="x"))
    with pytest.raises(NotADirectoryError):
        finetune(_config(tmp_path / "full" / "notes.txt" / "run", model="x"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("link", "link/run", "circle/run"):
        with pytest.raises(NotADirectoryError, match="expected a folder, got .*, where .* is a link to nothing"):
            finetune(_config(tmp_path / name, model="x"))
    with pytest.raises(FileNotFoundError, match="expected the folder of an earlier run"):
        finetune(_config(tmp_path / "none", model="x"), resume=True)
    (tmp_path / "full" / "config.yaml").write_text("")
    with pytest.raises(FileExistsError, match="give --resume to continue"):
        check_output(tmp_path / "full")


def test_the_data_is_looked_for_before_the_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "_prepare", lambda *a: pytest.fail("the model was built before the check"))
    (tmp_path / "data" / "train").mkdir(parents=True)
    for name, message in (("nowhere", "expected one of digits, scenes, or a folder of images, got 'nowhere'"),
                          (str(tmp_path / "data"), "each with one sub-folder per class; missing: val/")):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=message):
            finetune(_config(tmp_path / "run", data=name, model="x"))
    assert not (tmp_path / "run").exists()


def test_unwritable_output(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match="expected a folder that can be written, got .*run: Permission denied"):
        check_output(tmp_path / "run")
