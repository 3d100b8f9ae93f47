"""The package as pip installs it: with a C++ compiler and without one, without nvcc, without any extra.

Wheels are built from a copy of the sources and run from a folder of their own, so that nothing of the checkout's own
(editable) installation is seen. What is run compares with the formula written out in plain PyTorch.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock
from packaging.metadata import parse_email
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"bcos_kernels": ROOT / "bcos_kernels", "bcosification": ROOT / "python_api" / "bcosification"}
X86 = platform.machine() in ("x86_64", "AMD64")

# Every package that only an extra installs.
EXTRAS = (
    "lightning torchmetrics torchvision timm open_clip webdataset sklearn safetensors yaml matplotlib captum PIL "
    "gradio tqdm"
).split()

# B = 2, written out: bias-free convolution and linear layer, gradients through everything.
RIGHT_NUMBERS = """
import sys
import torch
import torch.nn.functional as F
import bcos_kernels

assert bcos_kernels.__file__.startswith(sys.argv[1]), bcos_kernels.__file__
torch.manual_seed(0)

def error(got, expected):
    return float((got - expected).norm() / expected.norm())

x = torch.randn(2, 6, 9, 7, requires_grad=True)
w = torch.randn(5, 6, 3, 3, requires_grad=True)
dy = torch.randn(2, 5, 5, 4)
y = bcos_kernels.conv2d(x, w, stride=2, padding=1)
got = (y, *torch.autograd.grad(y, (x, w), dy))
xd, wd = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
a = F.conv2d(xd, wd, stride=2, padding=1)
n = (F.conv2d(xd * xd, torch.ones(1, 6, 3, 3).double(), stride=2, padding=1) + 1e-6).sqrt()
expected = a * a.abs() / n
expected = (expected, *torch.autograd.grad(expected, (xd, wd), dy.double()))
errors = [error(g.double(), e) for g, e in zip(got, expected)]

x = torch.randn(11, 13, requires_grad=True)
w = torch.randn(7, 13, requires_grad=True)
dy = torch.randn(11, 7)
y = bcos_kernels.linear(x, w)
got = (y, *torch.autograd.grad(y, (x, w), dy))
xd, wd = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
a = F.linear(xd, wd)
expected = a * a.abs() / (xd.norm(dim=1, keepdim=True) + 1e-12)
expected = (expected, *torch.autograd.grad(expected, (xd, wd), dy.double()))
errors += [error(g.double(), e) for g, e in zip(got, expected)]
assert max(errors) < 1e-5, errors
print(" ".join(sorted(set(bcos_kernels.dispatched().values()))))
"""

# The same, and then everything that an installation tells about itself, as JSON.
FACTS = (
    RIGHT_NUMBERS
    + """
import contextlib, io, json
from bcos_kernels.__main__ import main

def printed(*options):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(options) == 0
    return out.getvalue()

try:
    with bcos_kernels.backend("cpu"):
        refusal = None
except RuntimeError as error:
    refusal = str(error)
told = dict(backends=bcos_kernels.backends(), refusal=refusal, text=printed(), json=json.loads(printed("--json")))
print(json.dumps(told))
"""
)


def run(command, *, check=True, **environment):
    """Runs with the environment changed by keywords (None removes one); never in the checkout."""
    environment = {**os.environ, **environment}
    environment = {k: str(v) for k, v in environment.items() if v is not None}
    result = subprocess.run([str(c) for c in command], cwd="/", env=environment, capture_output=True, text=True)
    if check:
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result


def python(code, *arguments, site, check=True, **environment):
    """Runs code with the packages installed in the folder `site`, and those of this interpreter.

    Without site's .pth files: with them, setuptools' finder of an editable installation would find in the checkout what
    is missing in `site`.
    """
    command = [sys.executable, "-S", "-P", "-c", textwrap.dedent(code), *arguments]
    path = os.pathsep.join([str(site), sysconfig.get_path("platlib"), sysconfig.get_path("purelib")])
    return run(command, check=check, PYTHONPATH=path, **environment)


def copy_sources(target):
    """What a clone holds of the sources, without what builds in the checkout have left there."""
    left_behind = shutil.ignore_patterns("__pycache__", "_lib", "*.so", "_build_report.json", "*.egg-info")
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, target)
    for name in ("csrc", "bcos_kernels", "python_api"):
        shutil.copytree(ROOT / name, target / name, ignore=left_behind)
    return target


def build_wheel(sources, folder, *, check=True, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, sources]
    result = run(command, check=check, **environment)
    return next(folder.glob("*.whl")) if check else result


def links(folder, programs):
    """A folder for PATH that holds these programs (name → file) and nothing else."""
    folder.mkdir()
    for name, program in programs.items():
        (folder / name).symlink_to(program)
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make) → a folder that make(folder) has filled, in one of the processes that run these tests."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has a folder of its own in it

    def made(name, make):
        folder = root / f"install-{name}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "complete").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                (folder / "complete").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def compiler_path(tmp_path_factory):
    """A PATH with a C++ compiler, and with no nvcc and no ninja program."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    assert compiler, "these tests need a C++ compiler: c++, g++ or clang++ on PATH"
    tools = {name: found for name in ("as", "ld") if (found := shutil.which(name))}
    return links(tmp_path_factory.mktemp("path") / "bin", {"c++": compiler, **tools})


def install_and_ask(folder, path):
    """Wheel, installation and what it tells about itself, in `folder`; PATH as on the machine that it is built on."""
    no_cuda = dict(CUDA_HOME=None, CUDA_PATH=None)
    wheel = build_wheel(copy_sources(folder / "sources"), folder, PATH=path, CXX=None, **no_cuda)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder / "site", wheel]
    run(command)
    ran, told = python(FACTS, folder / "site", site=folder / "site").stdout.strip().split("\n")
    (folder / "facts.json").write_text(json.dumps({"ran": ran, **json.loads(told)}))


@pytest.fixture(scope="session")
def compiled(once, compiler_path):
    """Folder of an installation from a machine with a C++ compiler and without nvcc."""
    return once("compiled", lambda folder: install_and_ask(folder, compiler_path))


@pytest.fixture(scope="session")
def plain(once, tmp_path_factory):
    """Folder of an installation from a machine without any compiler."""
    nothing = links(tmp_path_factory.mktemp("nothing") / "bin", {})
    return once("plain", lambda folder: install_and_ask(folder, nothing))


@pytest.fixture(scope="session")
def plain_sources(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp("plain") / "sources")


def wheel_of(installation):
    return next(installation.glob("*.whl"))


def facts_of(installation):
    """The backends that ran (of which the numbers were right: "ran"), and what `python -m bcos_kernels` reports."""
    return json.loads((installation / "facts.json").read_text())


def test_compiled_runs_the_cpu_kernels(compiled):
    """With a compiler and without nvcc: right numbers from the CPU kernels, and what is missing says so."""
    facts = facts_of(compiled)
    assert facts["ran"] == "cpu"
    backends = facts["backends"]
    assert backends["cpu"] is None and backends["reference"] is None
    assert "nvcc at build time: not on PATH" in backends["cuda"]
    assert facts["refusal"] is None


@pytest.mark.skipif(not X86, reason="one instruction set on this architecture")
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_compiled_runs_on_older_processors(compiled, capability):
    code = "from bcos_kernels import _C\nprint(_C.cpu_capability())\n" + RIGHT_NUMBERS
    lines = python(code, compiled, site=compiled / "site", BCOS_CPU_CAPABILITY=capability).stdout.split("\n")
    assert lines[:2] == [capability, "cpu"]


def test_build_info(compiled):
    report = facts_of(compiled)["json"]
    info = report["build"]
    assert info["instruction_sets"] == (["baseline", "avx2", "avx512"] if X86 else ["baseline"])
    assert report["cpu_capability"] in info["instruction_sets"]
    assert info["torch_abi"] == "2.11"
    assert info["version"] == "0.1.0"
    assert info["cuda_archs"] == []


def test_library_is_free_of_python(compiled):
    with zipfile.ZipFile(wheel_of(compiled)) as wheel:
        library = wheel.read("bcos_kernels/_lib/libbcos_kernels_cpu.so")
    assert b"libtorch_cpu" in library
    assert b"libtorch_python" not in library
    assert b"PyObject_" not in library


def test_wheel_is_complete(compiled):
    """Every module and every table and recipe of both packages, and nothing else but what was built."""
    with zipfile.ZipFile(wheel_of(compiled)) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    expected = {
        f"{package}/{file.relative_to(folder)}"
        for package, folder in PACKAGES.items()
        for file in folder.rglob("*")
        if file.suffix in (".py", ".json", ".yaml") and file.name != "_build_report.json"
    }
    built = names - expected
    assert not expected - names
    assert {n.split(".")[0] for n in built} == {
        "bcos_kernels/_C",
        "bcos_kernels/_build_report",
        "bcos_kernels/_lib/libbcos_kernels_cpu",
    }


def test_without_compiler(plain):
    """Right numbers from the reference, and what is missing says so."""
    facts = facts_of(plain)
    assert facts["ran"] == "reference"
    assert facts["backends"]["reference"] is None
    assert "no C++ compiler" in facts["backends"]["cpu"]
    assert "no C++ compiler" in facts["refusal"]


def test_without_compiler_holds_no_library(plain):
    with zipfile.ZipFile(wheel_of(plain)) as wheel:
        assert [n for n in wheel.namelist() if n.endswith(".so")] == []


def test_unusable_compiler_is_a_missing_one(plain_sources, tmp_path):
    wheel = build_wheel(plain_sources, tmp_path, CXX="false --option")
    with zipfile.ZipFile(wheel) as file:
        report = json.loads(file.read("bcos_kernels/_build_report.json"))
    assert report["cpu"].startswith("false --option cannot build a shared C++17 library")


def test_isolated_build_asks_for_torch_only_where_it_is_of_use(plain_sources, tmp_path, compiler_path):
    """torch (gigabytes) is added to an isolated build if there is a compiler and no torch that would do."""
    ask = "import os, sys; os.chdir(sys.argv[1]); from setuptools import build_meta as b; import json; "
    ask += "print(json.dumps(b.get_requires_for_build_wheel()))"
    # As pip's isolation: another environment's packages out of sight, here those of this interpreter too.
    hide = "import sysconfig, importlib.util\n"
    hide += "sysconfig.get_path = lambda name, *a, _f=sysconfig.get_path, **k: "
    hide += "'/nowhere' if name in ('platlib', 'purelib') else _f(name, *a, **k)\n"
    hide += "importlib.util.find_spec = lambda name, *a, _f=importlib.util.find_spec: "
    hide += "None if name == 'torch' else _f(name, *a)\n"

    def asked(code, path):
        result = run([sys.executable, "-c", code, plain_sources], PATH=path, CXX=None)
        return json.loads(result.stdout.strip().splitlines()[-1])

    assert asked(ask, compiler_path) == []
    assert asked(hide + ask, compiler_path) == ["torch>=2.11"]
    assert asked(hide + ask, links(tmp_path / "bin", {})) == []


OP = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
int64_t bcos_baseline_answer();
int64_t answer(torch::stable::Tensor x) { return bcos_baseline_answer() + x.numel(); }
STABLE_TORCH_LIBRARY(bcos_install_test, m) { m.def("answer(Tensor x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(bcos_install_test, CPU, m) { m.impl("answer", TORCH_BOX(&answer)); }
"""
OP_KERNELS = """
#include <cstdint>
#define NAME_(isa) bcos_##isa##_answer
#define NAME(isa) NAME_(isa)
int64_t NAME(BCOS_ISA)() { return 40; }
"""


def with_other_ops(sources, target, files):
    """The sources with these files for csrc/cpu."""
    shutil.copytree(sources, target, ignore=shutil.ignore_patterns("build", "*.egg-info", "*.whl"))
    shutil.rmtree(target / "csrc" / "cpu")
    (target / "csrc" / "cpu").mkdir()
    for name, text in files.items():
        (target / "csrc" / "cpu" / name).write_text(text)
    # pybind11 takes seconds to compile, and is not what these builds are about.
    (target / "csrc" / "module.cpp").write_text('extern "C" void* PyInit__C() { return nullptr; }\n')
    return target


def test_builds_without_ninja(plain_sources, tmp_path, compiler_path):
    """Plain compiler calls in its place: the library loads and its op runs; kernels are there per instruction set."""
    sources = with_other_ops(plain_sources, tmp_path / "s", {"op.cpp": OP, "op_kernels.cpp": OP_KERNELS})
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "ninja.py").write_text("BIN_DIR = '/nowhere'\n")
    wheel = build_wheel(sources, tmp_path, PATH=compiler_path, CXX=None, PYTHONPATH=tmp_path / "hidden")
    assert not list(sources.rglob("build.ninja"))
    with zipfile.ZipFile(wheel) as file:
        library = file.extract("bcos_kernels/_lib/libbcos_kernels_cpu.so", tmp_path)
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); "
    code += "print(torch.ops.bcos_install_test.answer(torch.zeros(2)))"
    assert run([sys.executable, "-c", code, library]).stdout.strip() == "42"
    for name in ("baseline", "avx2", "avx512") if X86 else ("baseline",):
        assert list(sources.rglob(f"op_kernels.{name}.o"))


@pytest.mark.parametrize("with_ninja", [True, False])
def test_compile_error_fails_the_installation(plain_sources, tmp_path, compiler_path, with_ninja):
    sources = with_other_ops(plain_sources, tmp_path / "s", {"op.cpp": '#error "on purpose"\n'})
    (tmp_path / "hidden").mkdir()
    if not with_ninja:
        (tmp_path / "hidden" / "ninja.py").write_text("BIN_DIR = '/nowhere'\n")
    result = build_wheel(sources, tmp_path, check=False, PATH=compiler_path, CXX=None, PYTHONPATH=tmp_path / "hidden")
    assert result.returncode != 0
    assert "on purpose" in result.stdout + result.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_undefined_symbol_fails_the_installation(plain_sources, tmp_path, compiler_path):
    """At build time, not when a user loads the library."""
    if sys.platform == "darwin":
        pytest.skip("the macOS linker is told to look symbols up at run time")
    sources = with_other_ops(plain_sources, tmp_path / "s", {"op.cpp": OP})
    result = build_wheel(sources, tmp_path, check=False, PATH=compiler_path, CXX=None)
    assert result.returncode != 0
    assert "bcos_baseline_answer" in result.stdout + result.stderr


def test_installed_torch_is_kept(compiled, tmp_path):
    """pip, asked to install the wheel beside the torch that is here, finds nothing to fetch but the wheel."""
    report = tmp_path / "report.json"
    run([sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--report", report, wheel_of(compiled)])
    names = [entry["metadata"]["name"] for entry in json.loads(report.read_text())["install"]]
    assert set(names) <= {"bcos-kernels"}


def test_metadata(compiled):
    """The oldest supported torch satisfies the requirements; the extras and the command are there."""
    with zipfile.ZipFile(wheel_of(compiled)) as wheel:
        folder = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")).partition("/")[0]
        metadata, unparsed = parse_email(wheel.read(f"{folder}/METADATA"))
        entry_points = wheel.read(f"{folder}/entry_points.txt").decode()
        assert "Apache License" in wheel.read(f"{folder}/licenses/LICENSE").decode()
    assert not unparsed
    requirements = [Requirement(r) for r in metadata["requires_dist"]]
    runtime = {r.name: r for r in requirements if "extra" not in str(r.marker)}
    assert set(runtime) == {"torch", "triton", "numpy"}
    assert runtime["torch"].specifier.contains("2.11.0")
    assert not runtime["torch"].specifier.contains("2.10.1")
    assert set(metadata["provides_extra"]) == {"train", "explain", "app", "clip", "text", "dev"}
    assert metadata["license_expression"] == "Apache-2.0"
    assert "bcosify = bcosification.cli:main" in entry_points


# None in sys.modules is how Python itself marks a module that cannot be imported.
WITHOUT_EXTRAS = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n"


def test_import_needs_no_extra(plain):
    code = WITHOUT_EXTRAS + "import bcos_kernels, bcosification, bcosification.nn\n"
    code += "from bcosification.cli import main\nmain(['--version'])"
    assert "bcos-kernels   0.1.0" in python(code, site=plain / "site").stdout


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"], ["explain", "--help"]])
def test_help_needs_no_extra(plain, arguments):
    code = WITHOUT_EXTRAS + "from bcosification.cli import main\nsys.exit(main(sys.argv[1:]))"
    assert "usage: bcosify" in python(code, *arguments, site=plain / "site").stdout


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["finetune", "--model", "resnet18", "--data", "digits", "--no-pretrained"], "train"),
        (["evaluate", "resnet18", "--data", "digits", "--no-pretrained"], "train"),
        (["convert", "resnet18", "--no-pretrained"], "train"),
    ],
)
def test_command_without_its_extra_names_the_pip_line(plain, tmp_path, arguments, extra):
    out = ["--out", tmp_path / "out"] if arguments[0] != "evaluate" else []
    code = WITHOUT_EXTRAS + "from bcosification.cli import main\nsys.exit(main(sys.argv[1:]))"
    result = python(code, *map(str, [*arguments, *out]), site=plain / "site", check=False)
    assert result.returncode == 1
    assert f"pip install 'bcos-kernels[{extra}]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("which", ["compiled", "plain"])
def test_environment_report(which, request):
    told = facts_of(request.getfixturevalue(which))
    report, text = told["json"], told["text"]
    assert report["backends"] == told["backends"]
    assert report["versions"]["python"] == platform.python_version()
    assert report["devices"][0].startswith("cpu: ")
    assert report["versions"]["torch"] in text
    for name, reason in report["backends"].items():
        assert any(line.split()[:1] == [name] and (reason or "usable") in line for line in text.splitlines())
    if which == "compiled":
        assert report["build"]["compiler"] in text
    else:
        assert "no C++ compiler" in report["build"]["missing"]
        assert report["cpu_capability"] is None
        assert "native parts  not built: no C++ compiler" in text


def test_environment_report_as_a_command():
    result = run([sys.executable, "-m", "bcos_kernels", "--json"], PYTHONPATH=ROOT)
    assert set(json.loads(result.stdout)["backends"]) == {"reference", "cpu", "triton", "cuda"}
