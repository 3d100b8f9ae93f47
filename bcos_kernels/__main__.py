"""`python -m bcos_kernels`: what is installed, what this machine has, which backends run here (or why not), and which
kernels are verified on its GPUs. With `selftest` and `tune`, these commands (selftest_commands.py)."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__, backends, dispatch, tuning


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; platform.processor() is empty on many Linux systems."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _devices() -> list[str]:
    devices = [f"cpu: {_processor()}, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            arch = f"sm_{properties.major}{properties.minor}"
            devices.append(f"cuda:{index}: {properties.name}, {arch}, {memory:.1f} GiB")
    return devices


def _verified() -> dict[str, dict]:
    """Of every GPU its name and what the tuning tables say for it, by op, direction, dtype and the fastest backend."""
    if not torch.cuda.is_available():
        return {}
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        str(device): {"name": tuning.identity(device)[0], "rows": tuning.summary(tuning.table(device))}
        for device in devices
    }


def environment() -> dict:
    """The report as plain data.

    Returns:
        dict with "versions" (name → str or None where absent), "devices" (list of str), "build" (how the native parts
        were built: `bcos_kernels._C.build_info()`, or {"missing": reason}), "cpu_capability" ("avx512", "avx2",
        "baseline", or None where the native parts are missing), "cpu_features" (name → bool), "backends" and "variants"
        of backends (name → None where usable, else the reason) and "verified" (GPU → its name, and how many shape
        classes of which op, direction and dtype a backend is the fastest verified for).
    """
    try:
        from . import _C
    except ImportError as error:
        from .dispatch import build_report

        build = {"missing": build_report().get("module") or str(error)}
        capability, features = None, {}
    else:
        build, capability, features = _C.build_info(), _C.cpu_capability(), _C.cpu_features()
    return {
        "versions": {
            "bcos-kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
        },
        "devices": _devices(),
        "build": build,
        "cpu_capability": capability,
        "cpu_features": features,
        "backends": backends(),
        "variants": {name: backends()[name] for name in dispatch.VARIANTS},
        "verified": _verified(),
    }


def _text(report: dict) -> str:
    def section(title: str, rows: list[tuple[str, str]]) -> list[str]:
        width = max(len(key) for key, _ in rows)
        return [title, *(f"  {key:<{width}}  {value}" for key, value in rows), ""]

    build = report["build"]
    if "missing" in build:
        native = [("native parts", f"not built: {build['missing']}")]
    else:
        native = [
            ("compiler", build["compiler"]),
            ("torch headers", f"{build['torch']} (stable ABI: serves torch >= {build['torch_abi']})"),
            ("instruction sets", ", ".join(build["instruction_sets"])),
            ("CUDA architectures", ", ".join(build["cuda_archs"]) or "none"),
            ("flags", build["flags"]),
            ("used on this CPU", report["cpu_capability"]),
            ("CPU features", " ".join(k for k, present in report["cpu_features"].items() if present) or "none"),
        ]
    lines = section("versions", [(k, v or "not installed") for k, v in report["versions"].items()])
    lines += section("devices", [(d.split(": ", 1)[0], d.split(": ", 1)[1]) for d in report["devices"]])
    lines += section("build", native)
    usable = report["backends"] | report["variants"]
    lines += section("backends", [(k, "usable" if v is None else f"no: {v}") for k, v in usable.items()])
    for device, found in report["verified"].items():
        rows = [
            (f"{r['op']} {r['direction']} {r['dtype']}", f"{r['backend']}, {r['shape_classes']} shape classes")
            for r in found["rows"]
        ]
        nothing = [("none", "auto runs the library plus eager passes; python -m bcos_kernels selftest unlocks kernels")]
        lines += section(f"verified on {device}, {found['name']}", rows or nothing)
    return "\n".join(lines).rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["selftest"], ["tune"]):
        from . import selftest_commands

        return getattr(selftest_commands, argv[0])(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bcos_kernels",
        description="Print versions, devices, how the native parts were built, which backends run here, and which "
        "kernels are verified on its GPUs.",
        epilog="Commands, each with --help: selftest (check the backends; on a GPU also time them and unlock the "
        "fastest), tune (the same for the shapes of networks).",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(argv)
    report = environment()
    print(json.dumps(report, indent=2) if options.json else _text(report))
    return 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read this has read enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # 128 + SIGPIPE
    sys.exit(code)
