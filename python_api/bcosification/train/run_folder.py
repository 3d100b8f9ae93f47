"""The folder of a run: whether it can be written, how it is, and what a resumed run finds in it."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path

from bcosification.names import shortened

from .configuration import EMBEDDED, FinetuneConfig, with_absolute_paths


def check_output(folder, *, resume: bool = False) -> None:
    """Raises unless `folder` can take a new run (or, with resume, holds one); leaves nothing behind.

    Raises:
        NotADirectoryError, PermissionError: it cannot be written. FileExistsError: it is not empty.
        FileNotFoundError: resume, and there is no run in it.
    """
    folder = Path(folder)
    check_writable(folder)
    if resume:
        if not (folder / "config.yaml").is_file():
            raise FileNotFoundError(
                f"--resume: expected the folder of an earlier run (config.yaml), found none in {folder}"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        hint = "give --resume to continue the run in it, or " if (folder / "config.yaml").is_file() else ""
        raise FileExistsError(
            f"output: expected a new or empty folder, got {folder} with files in it; {hint}choose another"
        )


def check_writable(folder: Path) -> None:
    """Raises NotADirectoryError or PermissionError unless `folder` can be written or made; leaves nothing behind."""
    parent = folder.absolute()
    while not os.path.lexists(parent):  # a link to nowhere exists: nothing can be made in its place
        parent = parent.parent
    if not os.path.isdir(parent):
        kind = "a link to nothing" if parent.is_symlink() else "a file"
        raise NotADirectoryError(f"output: expected a folder, got {folder}, where {parent} is {kind}")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise PermissionError(
            f"output: expected a folder that can be written, got {folder}: {error.strerror}"
        ) from None


def write(path: Path, text: str) -> None:
    """The file is either the old or the new one, also when the process is killed in between."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_model(module, folder: Path) -> None:
    """What save_pretrained writes, written beside and moved into place."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    module.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def saved_config(output: Path, kind: type[FinetuneConfig] = FinetuneConfig) -> FinetuneConfig:
    """The configuration of the run in `output`."""
    import yaml

    check_output(output, resume=True)
    path = output / "config.yaml"
    return kind.from_mapping(yaml.safe_load(path.read_text()), str(path))


def check_same(config: FinetuneConfig, output: Path) -> int:
    """The number of complete epochs of the run in `output`; ValueError if `config` asks for another run."""
    path = output / "config.yaml"
    before, now = (_decisive(c) for c in (saved_config(output, type(config)), config))
    other = [name for name in before | now if before.get(name) != now.get(name)]
    if "data" in other and not {before["data"], now["data"]} & set(EMBEDDED):
        other.remove("data")  # it may have moved: `check_same_data` tells
    if other:
        values = [", ".join(f"{name}={options.get(name)!r}" for name in other) for options in (before, now)]
        raise ValueError(
            f"{config.COMMAND}: expected the options of the run that is resumed ({path}), {values[0]}; got "
            f"{values[1]}: another run needs a folder of its own"
        )
    done = complete_epochs(output)
    if config.epochs < done:
        raise ValueError(
            f"{config.COMMAND}: expected epochs >= {done}, which the run in {output} has done, got {config.epochs}"
        )
    return done


def _decisive(config: FinetuneConfig) -> dict:
    """The options that decide what comes out, those of the conversion among them, without the number of epochs."""
    options = with_absolute_paths(dataclasses.asdict(config))
    options |= options.pop("conversion")
    return {name: value for name, value in options.items() if name != "epochs" and name not in config.MACHINE}


def check_same_data(config: FinetuneConfig, datamodule, output: Path) -> None:
    """ValueError if `datamodule` has other classes than the run in `output` was trained on, or if its data are looked
    for in another place now and are not the same files; a UserWarning if the files of the same place have changed."""
    checkpoint = _checkpoint(output)
    if checkpoint is None:
        return
    before, now = checkpoint.get(type(datamodule).__qualname__), datamodule.state_dict()
    was = with_absolute_paths({"data": saved_config(output, type(config)).data})["data"]
    if before == now or (before is None and was == config.data):
        return
    expected = f"{config.COMMAND}: expected the data of the run that is resumed ({output}), "
    if before is None:
        raise ValueError(f"{expected}data={was!r}, as its checkpoint tells no more of them; got data={config.data!r}")
    first, second = _told(before, now), _told(now, before)
    if before["classes"] != now["classes"] or was != config.data:
        second = "as many, but other files" if first == second else second
        raise ValueError(
            f"{expected}{first}; got data={config.data!r} with {second}: another run needs a folder of its own"
        )
    warnings.warn(
        f"the images in {config.data} are not those that the run in {output} began with ({first} then, {second} now); "
        "it goes on with these",
        stacklevel=2,
    )


def _told(contents: dict, other: dict) -> str:
    """What the images are, in words; the classes where the other's differ."""
    text = f"{contents['images']['train']:,} images to train on and {contents['images']['val']:,} to validate on"
    if contents["classes"] == other["classes"]:
        return text
    return f"{text} in {len(contents['classes'])} classes ({shortened(contents['classes'])})"


def complete_epochs(output: Path) -> int:
    """Epochs that last.ckpt holds; 0 for a run that was killed in its first."""
    checkpoint = _checkpoint(output)
    return 0 if checkpoint is None else checkpoint["epoch"] + 1


def _checkpoint(output: Path) -> dict | None:
    """What last.ckpt holds; None where there is none."""
    import torch

    path = output / "last.ckpt"
    if not path.is_file():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["epoch"]
        return checkpoint
    except pickle.UnpicklingError:  # whose text goes on to tell how to switch the check off
        got = "another format, or a pickle with other objects, which could run code when it is read, so it is refused"
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, zipfile.BadZipFile) as error:
        got = f"one that cannot be read: {error}"
    raise ValueError(f"{path}: expected a checkpoint of finetune, got {got}")
