"""What comes as wheels: unpacked where it is missing, refused where it is no wheel."""

from __future__ import annotations

import zipfile

import pytest

from benchmarks.gpu import command, wheels
from tests.benchmarks.gpu.rows import rows_of


def wheel(folder, name, version, files=()):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        archive.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
        for path in files:
            archive.writestr(path, "VALUE = 7\n")


def test_what_is_not_installed_is_unpacked(tmp_path):
    wheel(tmp_path / "wheels", "abacus", "1.5", ["abacus/__init__.py", "abacus-1.5.data/purelib/beads.py"])
    wheel(tmp_path / "wheels", "torch", "99.0", ["torch.py"])  # installed
    (tmp_path / "wheels" / "README").write_text("no wheel")
    target = tmp_path / "target"
    assert wheels.unpack(tmp_path / "wheels", target) == {"abacus": "1.5"}
    assert (target / "abacus" / "__init__.py").is_file() and (target / "beads.py").is_file()
    assert not (target / "torch.py").exists()


@pytest.mark.parametrize(
    "name, message",
    [(None, "which is no folder"), ("", "which has none"), ("abacus-1.5-cp311-cp311-linux_x86_64.whl", "pure Python"),
     ("abacus-1.5-py3-none-any.whl", "abacus-1.5-py3-none-any.whl cannot be unpacked: File is not a zip file")],
)  # fmt: skip
def test_what_is_no_folder_of_wheels(name, message, tmp_path, capsys):
    folder = tmp_path / "wheels"
    if name is not None:
        folder.mkdir()
    if name:
        (folder / name).write_text("no zip")
    with pytest.raises(ValueError, match=message):
        wheels.unpack(folder, tmp_path / "target")
    with pytest.raises(SystemExit):
        command.main(["--rehearse", "--stage", "environment", "--out", str(tmp_path), "--wheels", str(folder)])
    assert f"--wheels: {'' if name else 'expected a folder'}" in capsys.readouterr().err


@pytest.mark.slow
def test_stages_have_what_comes_as_wheels(tmp_path, monkeypatch, capfd):
    """In their own processes, where the package of that name was not installed."""
    wheel(tmp_path / "wheels", "einops", "99.0", ["einops/__init__.py"])
    monkeypatch.setattr(wheels, "_installed", lambda distribution: False)
    monkeypatch.setenv("BCOS_WHEELS", str(tmp_path / "wheels"))
    assert command.main(["--rehearse", "--stage", "environment", "--out", str(tmp_path)]) == command.DONE
    assert "from wheels: einops 99.0" in capfd.readouterr().out
    assert rows_of("environment", tmp_path)["packages", "einops"]["says"] == "99.0"
