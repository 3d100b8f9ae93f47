"""docs/families.md: its example runs, its table names every family."""

import doctest
import re
import tempfile
from pathlib import Path

from bcosification.convert import rules
from bcosification.convert.families import FAMILIES

PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def test_the_example_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))
    own = f"{doctest.__name__}_page"
    monkeypatch.setitem(FAMILIES, f"{own}.Net", None)  # taken out again afterwards
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = doctest.testfile(str(PAGE), module_relative=False, globs={"__name__": own})
    assert found.attempted > 15 and found.failed == 0


def test_the_table_has_every_family_of_torchvision():
    written = PAGE.read_text(encoding="utf-8").partition("## All families")[0]  # that one is rendered
    rows = re.findall(r"^\| (torchvision [^|]*?) \|", written, re.MULTILINE)
    titles = [family.title for name, family in FAMILIES.items() if name.startswith("torchvision.")]
    assert sorted(rows) == sorted(titles)
