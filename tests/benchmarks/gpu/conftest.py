"""What the tests of the GPU's stages share."""

from __future__ import annotations

import pytest

from benchmarks.gpu import command
from tests.benchmarks.gpu.rows import rows_of


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    monkeypatch.setenv("BCOS_TUNING_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    def run(name):
        """(exit status, rows) of a stage."""
        status = command.run_here(command.all_stages()[name], tmp_path, 120, rehearsal=True)
        return status, rows_of(name, tmp_path)

    return run
