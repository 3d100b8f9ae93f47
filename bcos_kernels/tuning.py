"""Tables of what was measured on GPUs: which backends are right for a shape there, fastest first. `auto` goes by them.

A table is a JSON file, one a device. ``tuning_tables/`` holds those that come with the package; the user's own, which
`python -m bcos_kernels selftest` and `tune` write, lie in the folder that `folder` tells and have the last word.

    {"schema": 1, "device": "NVIDIA …", "architecture": "sm_90", "rows": [
     {"op": "conv2d", "direction": "forward", "dtype": "bfloat16", "shape_class": ["two", false, 3, 3, …],
      "backends": ["triton", "reference"], "median_ms": {"triton": …, "reference": …}, "example": "…", "date": "…",
      "torch": "2.11.0+cu130", "triton": "3.6.0", "kernels": {"triton": "0123456789ab"}}]}

``direction``: "forward", "backward", or "inference", a forward that keeps nothing for a backward; where there is no row
for inference, the forward's serves. ``backends``: those that computed the right numbers, fastest first; "reference" is
the library plus eager passes, "cuda:cutlass" a variant of the CUDA backend. A row holds for the torch and the Triton it
was measured with, and a backend of it for the code that was checked (`fingerprint`): what has changed since counts as
unverified. Rows of another device of the same architecture serve where there are none of the device itself. A backend
that was ``wrong`` anywhere serves no shape of that op and dtype.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SCHEMA = 1
SHIPPED = Path(__file__).with_name("tuning_tables")
KERNELS = ("triton", "cuda", "cuda:cutlass")
"""The backends, and variants of one, that need a verified row to be picked; "cuda" is its variant "library"."""
JOINT = ("conv2d_batch_norm", "linear_gelu")
"""Ops whose backward takes what its forward's backend has kept in its own way: one row, the forward's, is for both."""
KEEP = {"linear": 7, "linear_gelu": 8, "conv2d": 11, "conv2d_batch_norm": 19}
"""Op → place of the flag among its forward's arguments that says whether anything is kept; other ops always keep."""
WITHOUT_PRODUCTS = ("batch_norm_uncentered", "layer_norm")
"""Ops that tf32 says nothing about."""
_FIELDS = {
    "op": str, "direction": str, "dtype": str, "shape_class": list, "backends": list, "torch": str, "triton": str,
    "kernels": dict,
}  # fmt: skip
_PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

Table = dict[tuple, tuple[str, ...]]

_lock = threading.Lock()
_tables: dict[int | None, Table] = {}
_warned: set[str] = set()

# --- keys: what a row is about ----------------------------------------------------------------------------------------


def _rows(count: int) -> int:
    """0 to 6, in steps of a factor of eight: from 2^18 rows on, more of them change no comparison."""
    return min((max(count, 1) - 1).bit_length(), 18) // 3


def _width(channels: int) -> int:
    """The power of two that holds so many channels: 6 for 33 to 64."""
    return (channels - 1).bit_length()


def _exponent(b: float, b_tensor: Tensor | None) -> str:
    if b_tensor is not None:
        return "general"
    return "two" if b == 2 else "one" if b == 1 else "general"


def _linear(x, weight, b, b_tensor, max_out) -> tuple:
    units, features = weight.shape
    return _exponent(b, b_tensor), max_out > 1, _rows(x.shape[0]), _width(features), _width(units)


def _conv2d(x, weight, stride, dilation, groups, b, b_tensor, max_out) -> tuple:
    n, channels, height, width = x.shape
    units, of_group, r, s = weight.shape
    grouping = 0 if groups == 1 else 1 if groups == channels else 2  # one, depthwise, several
    return (
        _exponent(b, b_tensor), max_out > 1, r, s, max(stride), max(dilation), grouping, x.stride(1) == 1,
        _rows(n * height * width // (stride[0] * stride[1])), _width(of_group), _width(units // groups),
    )  # fmt: skip


def _batch_norm(x, training) -> tuple:
    channels = x.shape[1]
    return training, x.stride(1) == 1, _rows(x.numel() // max(channels, 1)), _width(channels)


def _layer_norm(x, dims) -> tuple:
    features = x.shape[x.dim() - dims :].numel()
    return _rows(x.numel() // max(features, 1)), _width(features)


# (op, direction) → the class of a launcher's arguments
_CLASSES = {
    ("linear", "forward"): lambda a: _linear(a[0], a[1], a[3], a[4], a[6]),
    ("linear", "backward"): lambda a: _linear(a[1], a[2], a[4], a[5], a[11]),
    ("linear_gelu", "forward"): lambda a: _linear(a[0], a[1], a[4], a[5], a[7]),
    ("linear_gelu", "backward"): lambda a: _linear(a[1], a[2], a[8], a[9], a[11]),
    ("conv2d", "forward"): lambda a: _conv2d(a[0], a[1], a[3], a[5], a[6], a[7], a[8], a[10]),
    ("conv2d", "backward"): lambda a: _conv2d(a[1], a[2], a[4], a[6], a[7], a[8], a[9], a[15]),
    ("batch_norm_uncentered", "forward"): lambda a: _batch_norm(a[0], a[5]),
    ("batch_norm_uncentered", "backward"): lambda a: _batch_norm(a[1], a[7]),
    ("conv2d_batch_norm", "forward"): lambda a: (
        *_conv2d(a[0], a[1], a[8], a[10], a[11], a[12], a[13], a[15]),
        a[16],
    ),
    ("conv2d_batch_norm", "backward"): lambda a: (
        *_conv2d(a[1], a[2], a[13], a[15], a[16], a[17], a[18], a[20]),
        a[21],
    ),
    ("layer_norm", "forward"): lambda a: _layer_norm(a[0], a[1]),
    ("layer_norm", "backward"): lambda a: _layer_norm(a[1], a[2]),
}


def _tf32(op: str) -> bool:
    """Whether torch lets an op's products of float32 run in tf32."""
    setting = torch.backends.cudnn if op.startswith("conv2d") else torch.backends.cuda.matmul
    try:
        return bool(setting.allow_tf32)
    except RuntimeError:  # the newer switch was used: torch no longer reads the older one
        return getattr(getattr(setting, "conv", setting), "fp32_precision", "ieee") == "tf32"


def precision(op: str, dtype: torch.dtype) -> str:
    """A dtype as rows name it: "tf32" for float32 where torch lets the op's products run so, "" for float64, which no
    kernels are built for."""
    if dtype is torch.float32 and op not in WITHOUT_PRODUCTS and _tf32(op):
        return "tf32"
    return _PRECISIONS.get(dtype, "")


def key(op: str, direction: str, arguments: tuple) -> tuple:
    """What a row has to be about to serve this call of launcher ``{op}_{direction}``: reads sizes and options only."""
    of = precision(op, arguments[direction == "backward"].dtype)
    shape_class = _CLASSES[op, direction](arguments)
    if direction == "forward":
        if op in KEEP and not arguments[KEEP[op]]:
            direction = "inference"
    elif op in JOINT:
        direction = "forward"
    return op, direction, of, shape_class


# --- reading ----------------------------------------------------------------------------------------------------------


def folder() -> Path | None:
    """Where the user's tables lie: $BCOS_TUNING_CACHE ("off": nowhere), or bcos_kernels/tuning in the cache folder."""
    named = os.environ.get("BCOS_TUNING_CACHE")
    if named:
        return None if named == "off" else Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "bcos_kernels" / "tuning"
    except RuntimeError:  # this user has no home
        return None


@cache
def versions() -> dict[str, str]:
    """Of torch and Triton, as rows name them."""
    triton = "none"
    for distribution in ("triton", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            triton = importlib.metadata.version(distribution)
            break
    return {"torch": torch.__version__, "triton": triton}


@cache
def fingerprint(backend: str) -> str:
    """Twelve digits that change with a backend's code."""
    package = Path(__file__).parent
    patterns = {"triton": ["triton_kernels/*.py"], "cuda": ["cuda.py", "_lib/*cuda*"]}
    patterns["cuda:cutlass"] = [*patterns["cuda"], "cutlass.py", "cutlass_build.py"]
    paths = [path for pattern in patterns[backend] for path in sorted(package.glob(pattern))]
    if backend == "cuda:cutlass":  # compiled on request, from a checkout
        csrc = package.parent / "csrc"
        paths += [path for path in [csrc / "math.h", *sorted(csrc.glob("cuda/cutlass/*"))] if path.is_file()]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def identity(device: torch.device) -> tuple[str, str]:
    """(name, architecture) of a CUDA device, as tables name them."""
    properties = torch.cuda.get_device_properties(device)
    return properties.name, f"sm_{properties.major}{properties.minor}"


def file_name(device_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


def _checked(content: object) -> dict:
    """A table that is one, or ValueError."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected schema {SCHEMA}, got {found!r}")
    for field, kind in (("device", str), ("architecture", str), ("rows", list)):
        if not isinstance(content.get(field), kind):
            raise ValueError(f"expected {field!r} to be a {kind.__name__}, got {content.get(field)!r}")
    for row in content["rows"]:
        for field, kind in _FIELDS.items():
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise ValueError(f"expected rows with {field!r}, a {kind.__name__}, got {row!r}"[:200])
        known = row["op"] in KEEP if row["direction"] == "inference" else (row["op"], row["direction"]) in _CLASSES
        if not known:
            raise ValueError(f"expected a known op and direction, got {row['op']!r} and {row['direction']!r}")
        if not all(isinstance(value, (str, int)) for value in row["shape_class"]):
            raise ValueError(f"expected a shape_class of words and whole numbers, got {row['shape_class']!r}")
        unknown = [name for name in row["backends"] if name not in (*KERNELS, "reference")]
        if unknown or not row["backends"]:
            raise ValueError(f"expected backends {', '.join(KERNELS)} or reference, got {row['backends']!r}")
    return content


def read(path: Path) -> dict | None:
    """A table; None, with one warning a process, for a file that is none or cannot be read."""
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        with _lock:
            known = str(path) in _warned
            _warned.add(str(path))
        if not known:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"tuning table {path} is ignored: {reason}", RuntimeWarning, stacklevel=2)
        return None


def _files() -> Iterator[tuple[bool, Path]]:
    """(whether it is the user's, path) of every table."""
    own = folder()
    for is_own, place in ((False, SHIPPED), (True, own)):
        try:
            paths = sorted(place.glob("*.json")) if place is not None else []
        except OSError:  # a folder that may not be read
            continue
        for path in paths:
            yield is_own, path


def _current(row: dict) -> list[str]:
    """The kernels that a row is about and that are still what was checked."""
    return [name for name in KERNELS if name in row["kernels"] and row["kernels"][name] == fingerprint(name)]


def _still_verified(row: dict) -> tuple[str, ...]:
    """The backends of a row, up to the reference, that are what was checked; () for a row that says nothing any more,
    also where the library was faster than kernels that have changed since."""
    current = _current(row)
    names = [*row["backends"], "reference"]
    before = names[: names.index("reference")]
    found = [name for name in before if name in current]
    if found:
        return (*found, "reference")
    return ("reference",) if not before and len(current) == len(row["kernels"]) else ()


def assembled(device_name: str, architecture: str) -> Table:
    """What all tables say for a device: key → backends, fastest first, the reference last.

    Inference without a row of its own goes by the forward's: kernels are checked without keeping anything whenever a
    row is made, and what is fastest when it keeps is a better guess than the library.
    """
    tables = []
    for is_own, path in _files():
        content = read(path)
        if content is not None and content["architecture"] == architecture:
            tables.append((is_own, content["device"] == device_name, content["rows"]))
    found: Table = {}
    wrong: set[tuple[str, str, str]] = set()
    for is_own, is_same, rows in sorted(
        tables, key=lambda table: table[:2]
    ):  # the last word: the user's, of this device
        for row in rows:
            if any(row[name] != version for name, version in versions().items()):
                continue
            backends = _still_verified(row)
            if backends:
                found[row["op"], row["direction"], row["dtype"], tuple(row["shape_class"])] = backends
            if is_own and is_same:
                wrong |= {(row["op"], row["dtype"], name) for name in row.get("wrong", ()) if name in _current(row)}
    for (op, direction, *rest), backends in list(found.items()):
        if direction == "forward" and op in KEEP:
            found.setdefault((op, "inference", *rest), backends)
    return {
        key: tuple(name for name in backends if (key[0], key[2], name) not in wrong) for key, backends in found.items()
    }


def table(device: torch.device) -> Table:
    """The table of a CUDA device, read at its first use. Never waits for the device."""
    found = _tables.get(device.index)
    if found is None:
        found = _tables.setdefault(device.index, assembled(*identity(device)))
    return found


def forget() -> None:
    """Read the tables again at their next use."""
    _tables.clear()


def drop(device: torch.device, what: tuple, backend: str) -> None:
    """In this process, ``backend`` no longer serves key ``what``."""
    found = table(device)
    if what in found:
        found[what] = tuple(name for name in found[what] if name != backend)


def summary(found: Table) -> list[dict]:
    """How many shape classes a backend serves, by op, direction and dtype."""
    counts = Counter((op, direction, dtype, backends[0]) for (op, direction, dtype, _), backends in found.items())
    names = ("op", "direction", "dtype", "backend")
    return [{**dict(zip(names, what, strict=True)), "shape_classes": n} for what, n in sorted(counts.items())]


# --- writing ----------------------------------------------------------------------------------------------------------


def row(what: tuple, median_ms: dict[str, float], example: str, wrong: Collection[str] = ()) -> dict:
    """A row for key ``what``.

    Args:
        median_ms: milliseconds of every backend that was verified for it.
        example: the shape that was measured, for readers.
        wrong: backends that computed wrong numbers.
    """
    wrong = sorted(set(wrong).intersection(KERNELS))
    op, direction, dtype, shape_class = what
    backends = sorted(median_ms, key=median_ms.__getitem__)
    return {
        "op": op,
        "direction": direction,
        "dtype": dtype,
        "shape_class": list(shape_class),
        "backends": backends,
        "median_ms": {name: float(f"{median_ms[name]:.4g}") for name in backends},
        **({"wrong": wrong} if wrong else {}),
        "example": example,
        **versions(),
        "kernels": {name: fingerprint(name) for name in KERNELS if name in backends or name in wrong},
        "date": datetime.date.today().isoformat(),
    }


def _about(row: dict) -> tuple:
    return (row["op"], row["direction"], row["dtype"], *row["shape_class"], row["torch"], row["triton"])


def save(rows: list[dict], device_name: str, architecture: str) -> Path:
    """Add rows to the user's table of a device, in place of those about the same; returns its path.

    The file is replaced as a whole: a reader finds the old table or the new one. Raises OSError where it cannot be.
    """
    place = folder()
    if place is None:
        raise OSError("BCOS_TUNING_CACHE=off, or no home: there is no folder for tuning tables")
    place.mkdir(parents=True, exist_ok=True)
    path = place / file_name(device_name)
    before = (read(path) or {"rows": []})["rows"]
    merged = {_about(row): row for row in [*before, *rows]}
    head = {"schema": SCHEMA, "device": device_name, "architecture": architecture}
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in merged.values())
    text = json.dumps(head, ensure_ascii=False)[:-1] + f',\n "rows": [\n  {lines}\n ]}}\n'
    descriptor, scratch = tempfile.mkstemp(dir=place, prefix=path.stem, suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
    forget()
    return path
