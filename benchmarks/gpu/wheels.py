"""Packages that a machine without a network lacks, from a folder of wheels: pure Python, unpacked, nothing installed.

    pip download --no-deps -d wheels bcos==0.1.3 einops nvidia-cutlass==4.2.0.0      # where there is a network
    python -m benchmarks.gpu --wheels wheels                                         # where there is none
"""

from __future__ import annotations

import importlib.metadata
import zipfile
from pathlib import Path


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def unpack(folder: Path, target: Path) -> dict[str, str]:
    """Unpack the wheels of packages that are not installed here into ``target``, to be put on sys.path.

    Args:
        folder: wheels in it are looked at, other files are not.

    Returns:
        distribution → version of what was unpacked.

    Raises:
        ValueError: no such folder, no wheels in it, one with compiled code (which this Python may not fit), or a file
            that is no wheel.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        why = "which has none" if folder.is_dir() else "which is no folder"
        raise ValueError(f"expected a folder with wheels, got {folder}, {why}")
    found = {}
    for wheel in wheels:
        parts = wheel.stem.split("-")
        if len(parts) not in (5, 6) or parts[-2:] != ["none", "any"]:
            raise ValueError(f"expected wheels of pure Python (…-none-any.whl), got {wheel.name}")
        name, version = parts[0].replace("_", "-"), parts[1]
        if _installed(name):
            continue
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{wheel.name} cannot be unpacked: {error}") from error
        for kind in ("purelib", "platlib"):  # what a wheel keeps apart from its root
            for path in target.glob(f"*.data/{kind}/*"):
                path.rename(target / path.name)
        found[name] = version
    return found
