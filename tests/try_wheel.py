"""`python -m tests.try_wheel WHEEL`: right numbers from a wheel on a machine without compilers.

The wheel is installed into a folder of its own and runs with this interpreter's torch and nothing on PATH.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.test_install import FACTS, python, run


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        site, nothing = Path(folder, "site"), Path(folder, "bin")
        nothing.mkdir()
        run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, Path(wheel).resolve()])
        ran, told = python(FACTS, site, site=site, PATH=nothing, CXX=None).stdout.strip().split("\n")
        backends, build = json.loads(told)["backends"], json.loads(told)["json"]["build"]
    expected = (None, "no CUDA device")
    if ran != "cpu" or backends["cuda"] not in expected or not build["cuda_archs"]:
        raise SystemExit(f"{wheel}: expected CPU and CUDA kernels, got {ran}, {backends}, {build}")
    print(f"{Path(wheel).name}: right numbers from {ran}; CUDA kernels for {', '.join(build['cuda_archs'])}")


if __name__ == "__main__":
    main(sys.argv[1])
