"""Builds the native parts of bcos-kernels; everything declarative is in pyproject.toml.

Two things are built wherever a C++ compiler is, and a third where nvcc is as well (a GPU is not looked for):

    bcos_kernels/_lib/libbcos_kernels_cpu.so   the CPU ops, from csrc/cpu/*.cpp, against the LibTorch stable ABI.
                                               No Python in it, and one file serves every torch >= 2.11.
    bcos_kernels/_lib/libbcos_kernels_cuda.so  the passes of the CUDA backend, from csrc/cuda, against the same ABI and
                                               with CUDA's runtime linked in.
    bcos_kernels/_C.*.so                       from csrc/module.cpp with pybind11: how the package was built, what this
                                               machine runs. No torch in it.

Instruction sets are chosen at run time: csrc/cpu/*_kernels.cpp is compiled once per set (BCOS_ISA names it), everything
else once, for the oldest processor of the architecture.

A missing compiler never fails an installation: what could not be built is left out, and the reason is written to
bcos_kernels/_build_report.json, from where bcos_kernels.backends() tells it. A compile error does fail it.

Environment: CXX (compiler, may hold arguments), MAX_JOBS (parallel compilations), BCOS_NO_NATIVE=1 (build nothing),
BCOS_NO_CUDA=1 (no CUDA), CUDA_HOME (the toolkit; else nvcc is looked for on PATH), BCOS_CUDA_ARCHS="80 90 100"
(default: of 80 and 90 those that nvcc knows).
"""

import concurrent.futures
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "bcos_kernels"
CUDA_LIBRARY = "_lib/libbcos_kernels_cuda.so"
CPU_LIBRARY = "_lib/libbcos_kernels_cpu.so"  # .so on macOS too: torch.ops.load_library takes any name
BUILD_REPORT = "_build_report.json"

TORCH_MINIMUM = (2, 11)
TORCH_REQUIREMENT = f"torch>={TORCH_MINIMUM[0]}.{TORCH_MINIMUM[1]}"
# The layout of TORCH_ABI_VERSION in torch/headeronly/version.h: one byte each for major, minor, patch.
TORCH_TARGET_VERSION = (TORCH_MINIMUM[0] << 56) | (TORCH_MINIMUM[1] << 48)

# No -ffast-math: NaN and infinities keep their meaning. errno and floating-point traps are given up, which is what
# lets the compilers vectorise sqrt, comparisons and selections.
CXX_FLAGS = (
    "-O3 -std=c++17 -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd "
    "-fvisibility=hidden -fvisibility-inlines-hidden"
).split()

# For #include "…" only: csrc/math.h must not be taken for the system's <math.h>.
QUOTED_INCLUDES = ["-iquote", str(ROOT / "csrc")]

# In the order in which their objects are linked, oldest first: of an inline function that several objects carry, the
# linker keeps the first copy, and only the oldest one runs everywhere.
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": "-mavx2 -mfma -mf16c".split(),
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512".split(),
}


CUDA_ARCHITECTURES = ["80", "90"]  # later ones compile the last one's PTX at their first use
NVCC_FLAGS = "-O3 -std=c++17 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden".split()


class NotBuildable(Exception):
    """Why a native part cannot be built on this machine: a missing tool, not an error in the code."""


@dataclass
class Step:
    """One command of the build: `output` is made from `inputs` (what it includes is found through `depfile`)."""

    output: Path
    inputs: list[Path]
    command: list[str]
    depfile: Path | None = None


def machine_instruction_sets() -> list[str]:
    return list(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]


def find_compiler() -> tuple[list[str], str]:
    """The C++ compiler's command and the first line of its --version; NotBuildable when there is none that works."""
    if os.environ.get("BCOS_NO_NATIVE") == "1":
        raise NotBuildable("BCOS_NO_NATIVE=1 was set at build time")
    if sys.platform == "win32":
        raise NotBuildable("the native parts are not built on Windows")
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    found = [c for c in candidates if shutil.which(c[0])]
    if not found:
        looked_for = f"CXX={' '.join(named)}" if named else "c++, g++ and clang++"
        raise NotBuildable(f"no C++ compiler: {looked_for} not found on PATH at build time")
    compiler = found[0]
    # A driver without its headers or its linker is as good as none, and so is one that is too old (_Float16 in C++ came
    # with GCC 12 on x86 and Clang 15); an error after this probe is one in our code.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <optional>\nfloat probe(std::optional<_Float16> x) { return float(*x); }\n")
        probe = [*compiler, "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(Path(folder, "probe.so"))]
        result = subprocess.run(probe, capture_output=True, text=True)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise NotBuildable(f"{' '.join(compiler)} cannot build a shared C++17 library with _Float16: {lines[0]}")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.strip().splitlines()
    return compiler, version[0] if version else " ".join(compiler)


def find_torch() -> tuple[Path, str] | None:
    """Folder and version of a torch whose headers serve, without the seconds that importing it takes; None without one.

    pip's build isolation hides the packages of the environment that is installed into, but a torch there is as good as
    one downloaded for the build alone (5 GB unpacked), as only its headers and its symbols are looked at.
    """
    folders = [Path(sysconfig.get_path(scheme), "torch") for scheme in ("platlib", "purelib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        folders.insert(0, Path(spec.submodule_search_locations[0]))
    for folder in folders:
        try:
            match = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", (folder / "version.py").read_text())
        except OSError:
            continue
        if match and (int(match[2]), int(match[3])) >= TORCH_MINIMUM and (folder / "include").is_dir():
            return folder, match[1]
    return None


def build_requirements() -> list[str]:
    """What pip has to add to an isolated build besides pyproject.toml's list: torch, if there is a use for it."""
    try:
        find_compiler()
    except NotBuildable:
        return []
    return [] if find_torch() else [TORCH_REQUIREMENT]


def link_command(compiler: list[str], output: Path, objects: list[Path], libraries: list[str]) -> list[str]:
    if sys.platform == "darwin":
        flags = ["-bundle", "-undefined", "dynamic_lookup"]
    else:
        flags = ["-shared", "-Wl,-O1", "-Wl,--gc-sections"]
    return [*compiler, *flags, *map(str, objects), *libraries, "-o", str(output)]


def compile_step(compiler: list[str], source: Path, output: Path, flags: list[str]) -> Step:
    depfile = output.with_suffix(".d")
    command = [*compiler, *flags, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
    return Step(output, [source], command, depfile)


def cpu_library_steps(compiler: list[str], torch: Path, work: Path, output: Path) -> list[Step]:
    """The CPU op library: kernels once per instruction set, the rest once."""
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    if not sources:
        raise SystemExit(f"bcos-kernels: expected C++ sources in {ROOT / 'csrc' / 'cpu'}, found none")
    sets = machine_instruction_sets()
    common = [
        *CXX_FLAGS,
        f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET_VERSION:016x}",
        "-D_GLIBCXX_USE_CXX11_ABI=1",
        *QUOTED_INCLUDES,
        "-isystem",
        str(torch / "include"),
    ]
    have = [f"-DBCOS_HAVE_{name.upper()}" for name in sets if name != "baseline"]
    steps = []
    for source in sources:
        if not source.stem.endswith("_kernels"):
            steps.append(compile_step(compiler, source, work / f"{source.stem}.o", common + have))
    for name in sets:
        for source in sources:
            if source.stem.endswith("_kernels"):
                flags = [*common, *INSTRUCTION_SETS[name], f"-DBCOS_ISA={name}"]
                steps.append(compile_step(compiler, source, work / f"{source.stem}.{name}.o", flags))
    objects = [step.output for step in steps]
    # Found again by name at run time: torch is loaded before this library is, whatever its folder is then. A symbol
    # that no torch library exports fails here (-z defs), not at the user's.
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    if sys.platform != "darwin":
        libraries += ["-Wl,-z,defs", "-Wl,--allow-shlib-undefined"]
    return [*steps, Step(output, objects, link_command(compiler, output, objects, libraries))]


def find_nvcc(compiler: list[str]) -> tuple[list[str], list[str]]:
    """nvcc's command and the architectures to build for; NotBuildable where there is none that works."""
    if os.environ.get("BCOS_NO_CUDA") == "1":
        raise NotBuildable("BCOS_NO_CUDA=1 was set at build time")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if nvcc is None:
        where = f"not in CUDA_HOME={home}" if home else "not on PATH, and CUDA_HOME not set"
        raise NotBuildable(f"no CUDA compiler (nvcc at build time: {where})")
    command = [nvcc]
    if os.environ.get("CXX"):
        command += ["-ccbin", compiler[0]]
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    asked = os.environ.get("BCOS_CUDA_ARCHS", "").split()
    architectures = asked or [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in known]
    if not architectures:
        raise NotBuildable(f"{nvcc} knows none of the architectures {' '.join(CUDA_ARCHITECTURES)}")
    # nvcc takes the host compilers of a certain age only: the probe finds out, before our code is compiled
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <optional>\n__global__ void probe(float* x) { *x = 0; }\n")
        flags = [*NVCC_FLAGS, f"-arch=sm_{architectures[0]}", "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        result = subprocess.run([*command, *flags], capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stderr + result.stdout).strip().splitlines() or [f"exit status {result.returncode}"]
        raise NotBuildable(f"{nvcc} does not compile with {' '.join(compiler)}: {lines[0]}")
    return command, architectures


def cuda_library_steps(nvcc: list[str], architectures: list[str], torch: Path, work: Path, output: Path) -> list[Step]:
    """The CUDA op library: kernels for every architecture, and the last one's PTX for those to come; NotBuildable
    where torch is one without CUDA."""
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        raise NotBuildable(f"the torch at build time is one without CUDA ({torch / 'lib'} has no libtorch_cuda.so)")
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    code.append(f"-gencode=arch=compute_{architectures[-1].rstrip('af')},code=compute_{architectures[-1].rstrip('af')}")
    definitions = [f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET_VERSION:016x}", "-D_GLIBCXX_USE_CXX11_ABI=1"]
    steps = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.c[pu]*")):
        flags = NVCC_FLAGS + (code if source.suffix == ".cu" else [*definitions, "-isystem", str(torch / "include")])
        steps.append(compile_step(nvcc, source, work / f"cuda.{source.stem}.o", flags))
    objects = [step.output for step in steps]
    command = [*nvcc, "-shared", "-cudart", "static", *map(str, objects), f"-L{torch / 'lib'}"]
    libraries = ["-ltorch_cuda", "-ltorch_cpu", "-lc10"]  # found again by name at run time, as the CPU library's
    return [*steps, Step(output, objects, [*command, *libraries, "-o", str(output)])]


def module_steps(compiler: list[str], work: Path, output: Path) -> list[Step]:
    """The pybind11 module _C; NotBuildable where Python came without its headers (Debian: python3-dev)."""
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").exists():
        raise NotBuildable(f"Python.h was not in {include} at build time (Debian and Ubuntu: install python3-dev)")
    if importlib.util.find_spec("pybind11") is None:
        raise SystemExit("bcos-kernels: building without isolation needs pybind11. Run: pip install pybind11")
    import pybind11

    flags = [*CXX_FLAGS, *(f"-DBCOS_HAVE_{name.upper()}" for name in machine_instruction_sets() if name != "baseline")]
    flags += ["-O1", *QUOTED_INCLUDES, "-iquote", str(work)]  # nothing here is called often; pybind11 compiles slowly
    flags += ["-isystem", pybind11.get_include(), "-isystem", str(include)]
    step = compile_step(compiler, ROOT / "csrc" / "module.cpp", work / "module.o", flags)
    return [step, Step(output, [step.output], link_command(compiler, output, [step.output], []))]


def write_build_config(work: Path, compiler_version: str, torch_version: str, cuda_archs: list[str]) -> None:
    """The header that module.cpp takes build_info() from; left alone when nothing changed, so nothing is recompiled."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    values = {
        "VERSION": version,
        "COMPILER": compiler_version,
        "TORCH": torch_version,
        "TORCH_ABI": ".".join(map(str, TORCH_MINIMUM)),
        "INSTRUCTION_SETS": " ".join(machine_instruction_sets()),
        "CUDA_ARCHS": " ".join(f"sm_{arch}" for arch in cuda_archs),
        "FLAGS": " ".join(CXX_FLAGS),
    }
    # json.dumps writes a string as C++ does.
    text = "".join(f"#define BCOS_BUILD_{key} {json.dumps(value)}\n" for key, value in values.items())
    header = work / "build_config.h"
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


def find_ninja() -> str | None:
    if importlib.util.find_spec("ninja"):
        import ninja

        program = Path(ninja.BIN_DIR, "ninja")
        if program.exists():
            return str(program)
    return shutil.which("ninja")


def run_with_ninja(ninja: str, steps: list[Step], work: Path, jobs: int) -> None:
    def path(p: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(p))

    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        "  command = $cmd",
        "  depfile = $dep",
        "  deps = gcc",
        "rule link",
        "  command = $cmd",
    ]
    for step in steps:
        rule = "compile" if step.depfile else "link"
        lines.append(f"build {path(step.output)}: {rule} {' '.join(map(path, step.inputs))}")
        lines.append("  cmd = " + shlex.join(step.command).replace("$", "$$"))
        if step.depfile:
            lines.append(f"  dep = {path(step.depfile)}")
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    result = subprocess.run([ninja, "-C", str(work), "-j", str(jobs)])
    if result.returncode != 0:
        raise SystemExit("bcos-kernels: the native code did not compile; the compiler's messages are above")


def run_plainly(steps: list[Step], jobs: int) -> None:
    def run(step: Step) -> None:
        print(shlex.join(step.command), flush=True)
        result = subprocess.run(step.command, capture_output=True, text=True)
        sys.stdout.write(result.stdout + result.stderr)
        if result.returncode != 0:
            raise SystemExit(f"bcos-kernels: could not build {step.output.name}; the compiler's messages are above")

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, [step for step in steps if step.depfile]))
    for step in steps:
        if not step.depfile:
            run(step)


class NativeBuild(build_ext):
    """Builds the op library and _C, into build_lib or (editable, --inplace) into the source tree."""

    def run(self):
        in_tree = self.inplace or self.editable_mode
        target = (ROOT if in_tree else Path(self.build_lib).resolve()) / PACKAGE
        library, module = target / CPU_LIBRARY, target / self.module_name()
        cuda_library = target / CUDA_LIBRARY
        report_file = target / BUILD_REPORT
        report = {"cpu": None, "module": None, "cuda": None}
        steps: list[Step] = []
        # Not build_temp when editable: that is a temporary folder then, and nothing would ever be incremental.
        platform_tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work = (ROOT / "build" / f"native-{platform_tag}") if in_tree else Path(self.build_temp).resolve()
        try:
            compiler, compiler_version = find_compiler()
            found = find_torch()
            if found is None:
                raise SystemExit(
                    f"bcos-kernels: expected {TORCH_REQUIREMENT} at build time, found none in {sys.prefix}. "
                    f"Run: pip install '{TORCH_REQUIREMENT}' 'setuptools>=77' pybind11 ninja"
                )
            torch, torch_version = found
            work.mkdir(parents=True, exist_ok=True)
            architectures: list[str] = []
            try:
                nvcc, architectures = find_nvcc(compiler)
                steps += cuda_library_steps(nvcc, architectures, torch, work, cuda_library)
            except NotBuildable as reason:
                report["cuda"] = str(reason)
            write_build_config(work, compiler_version, torch_version, architectures)
            steps += cpu_library_steps(compiler, torch, work, library)
            try:
                steps += module_steps(compiler, work, module)
            except NotBuildable as reason:
                report["module"] = str(reason)
        except NotBuildable as reason:
            report["cpu"] = report["module"] = report["cuda"] = str(reason)

        # What an earlier build left behind must not be taken for this one's.
        for part, file in (("cpu", library), ("module", module), ("cuda", cuda_library)):
            if report[part]:
                file.unlink(missing_ok=True)
        report_file.unlink(missing_ok=True)
        if steps:
            library.parent.mkdir(parents=True, exist_ok=True)
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            ninja = find_ninja()
            if ninja:
                run_with_ninja(ninja, steps, work, jobs)
            else:
                run_plainly(steps, jobs)
        for part, reason in report.items():
            print(f"bcos-kernels: {part}: {'built' if reason is None else 'left out: ' + reason}", flush=True)
        target.mkdir(parents=True, exist_ok=True)
        report_file.write_text(json.dumps(report, indent=2) + "\n")

    def module_name(self) -> str:
        return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

    def get_source_files(self):
        sources = {".cpp", ".h", ".cu", ".cuh"}
        return [str(f.relative_to(ROOT)) for f in sorted((ROOT / "csrc").rglob("*")) if f.suffix in sources]

    def get_output_mapping(self):
        """Files of build_lib → files of the source tree, for editable installations."""
        if not (self.inplace or self.editable_mode):
            return {}
        names = [CPU_LIBRARY, CUDA_LIBRARY, self.module_name(), BUILD_REPORT]
        return {
            os.path.join(self.build_lib, PACKAGE, name): str(Path(PACKAGE, name))
            for name in names
            if (ROOT / PACKAGE / name).exists()
        }

    def get_outputs(self):
        if self.inplace or self.editable_mode:
            return sorted(self.get_output_mapping())
        folder = Path(self.build_lib, PACKAGE)
        return [str(folder / n) for n in (CPU_LIBRARY, self.module_name(), BUILD_REPORT) if (folder / n).exists()]


class CleanBuildPy(build_py):
    """Copies the packages into an empty build_lib: setuptools would keep modules that were removed since."""

    def run(self):
        if not self.editable_mode:
            for package in {name.partition(".")[0] for name in self.packages or []}:
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()

    def find_data_files(self, package, src_dir):
        # The report of a build in the source tree is not this build's.
        return [f for f in super().find_data_files(package, src_dir) if Path(f).name != BUILD_REPORT]


setup(
    # Named so that wheels are tagged for this platform; NativeBuild is what builds it.
    ext_modules=[Extension(f"{PACKAGE}._C", sources=["csrc/module.cpp"])],
    # build_meta reads this when pip asks what an isolated build needs; nothing else does.
    setup_requires=build_requirements() if "egg_info" in sys.argv else [],
    cmdclass={"build_ext": NativeBuild, "build_py": CleanBuildPy},
)
