"""Folders of models and of runs. Nothing but the standard library is needed here."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["best_of_run"]


def best_of_run(folder: str | os.PathLike) -> Path:
    """The folder of a model; of a run of `finetune` or `distill`, that of its best epoch.

    Raises:
        FileNotFoundError: a run without a complete epoch.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() or not (folder / "config.yaml").is_file():
        return folder
    if not (folder / "best" / "config.json").is_file():
        raise FileNotFoundError(f"load: expected a run with at least one complete epoch, found none in {folder}")
    return folder / "best"
