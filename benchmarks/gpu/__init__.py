"""Everything that waits for a GPU: the command (command.py) and its stages, one or a few a file."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("bcosification") is None:  # a bare checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_api"))
