"""What B-cos costs on this machine: a user's own model, plain, with the peers' layers and with ours, side by side.

`benchmark` measures training steps, inference and explanations in images per second, and the memory of a training
step. Numbers are checked before anything is timed. The steps themselves are also those of the repository's suites.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bcos_kernels
from bcosification.convert.clip import BcosifiedCLIP
from bcosification.convert.families import family_of
from bcosification.convert.peers import fuse
from bcosification.convert.wrapper import BcosifiedModel
from bcosification.evaluation.measuring import bytes_kept, fallback_share, interleaved, machine, peak_bytes, summarized
from bcosification.evaluation.peer_style import peer_style
from bcosification.explanation.explaining import encode, explain
from bcosification.nn import explanation_mode
from bcosification.nn.evaluation_mode import evaluation_mode

__all__ = [
    "CONTENDERS",
    "DEFAULT_CONTENDERS",
    "Benchmark",
    "Step",
    "benchmark",
    "explain_one_by_one",
    "fallback",
    "gradient_error",
    "inference",
    "input_gradient",
]

CONTENDERS = {
    "plain": "plain",
    "plain-compiled": "plain, compiled",
    "peer": "peer-style, eager",
    "peer-compiled": "peer-style, compiled",
    "ours": "ours",
    "ours-compiled": "ours, compiled",
    "ours-low": "ours, memory=low",
}
"""Contender → what the table calls it."""
DEFAULT_CONTENDERS = ("plain", "peer", "peer-compiled", "ours")
TASKS = ("training", "inference", "explanation")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEXTS = 1000  # that images are compared with in the benchmark of an image tower, as many as ImageNet has classes
MIB = 2**20

# --- what is timed ----------------------------------------------------------------------------------------------------


class Step:
    """A training step: zero_grad, forward, binary cross-entropy, backward, SGD.

    Args:
        model: gives logits (N, classes); put into training mode here.
        images: what it is called with.
        labels: classes (N,) int64, taken modulo the number of classes.
        autocast: dtype of autocast for forward and loss, or None (default).
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, *, autocast: torch.dtype | None = None):
        self.model, self.images, self.labels, self.autocast = model.train(), images, labels, autocast
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def loss(self) -> Tensor:
        with _autocast(self.images.device, self.autocast):
            logits = self.model(self.images)
            classes = logits.shape[1]
            targets = F.one_hot(self.labels % classes, classes).to(logits.dtype)
            return F.binary_cross_entropy_with_logits(logits, targets)

    def backward(self) -> None:
        self.loss().backward()

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by parameter, as the first thing after a seed of 0; dropout is off, and nothing is updated."""
        self.optimizer.zero_grad(set_to_none=True)
        with _without_dropout(self.model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.backward()
        # A compiled model's names begin with its wrapper's.
        named = {name.replace("_orig_mod.", ""): p.grad for name, p in self.model.named_parameters()}
        self.optimizer.zero_grad(set_to_none=True)
        return {name: gradient for name, gradient in named.items() if gradient is not None}

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.backward()
        self.optimizer.step()


def inference(model: nn.Module, images: Tensor, *, autocast: torch.dtype | None = None) -> Tensor:
    """Logits without gradients; the model has to be in eval mode."""
    with torch.no_grad(), _autocast(images.device, autocast):
        return model(images)


def input_gradient(model: nn.Module, images: Tensor, *, autocast: torch.dtype | None = None) -> Tensor:
    """∂(largest logit)/∂image, of images' shape: the least that any gradient explanation costs."""
    x = images.detach().requires_grad_()
    with _autocast(images.device, autocast):
        top = model(x).max(1).values
    return torch.autograd.grad(top.sum(), x)[0]


def explain_one_by_one(model: nn.Module, encoded: Tensor, *, autocast: torch.dtype | None = None) -> Tensor:
    """W(x) of the predicted classes as the package bcos computes it: image by image, in explanation mode.

    Its ``explain`` also draws the picture of every image, which is left out here.
    """
    with explanation_mode(model):
        weights = [input_gradient(model, x, autocast=autocast) for x in encoded.split(1)]
        _ = [(x * w).sum(1) for x, w in zip(encoded.split(1), weights, strict=True)]  # the contribution maps
    return torch.cat(weights)


def _autocast(device: torch.device, dtype: torch.dtype | None):
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextlib.contextmanager
def _without_dropout(model: nn.Module):
    dropouts = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ in ("StochasticDepth", "DropPath")
    ]
    modes = [module.training for module in dropouts]
    for module in dropouts:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(dropouts, modes, strict=True):
            module.train(mode)


# --- numbers before times ---------------------------------------------------------------------------------------------


def gradient_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """‖got − expected‖ / ‖expected‖ over all parameters together; infinite where other parameters have gradients."""
    if got.keys() != expected.keys():
        return float("inf")
    off = sum(float((got[name].double() - expected[name].double()).norm() ** 2) for name in expected)
    size = sum(float(expected[name].double().norm() ** 2) for name in expected)
    return (off / size) ** 0.5 if size else float(off > 0)


def _error(got: Tensor, expected: Tensor) -> float:
    return gradient_error({"": got}, {"": expected})


def _check_numbers(converted: BcosifiedModel, images: Tensor, labels: Tensor) -> None:
    """Ours against the eager formulas in float64, on a few images; no further off than they are in float32."""
    oracle = peer_style(converted).double()
    eager, ours = peer_style(converted), copy.deepcopy(converted)
    double = images.double()
    encoded = encode(ours, images)

    def w(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
        with evaluation_mode(model), explanation_mode(model):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(model(x).gather(1, classes[:, None]).sum(), x)[0]

    explanation = explain(ours, images, batch_size=len(images))
    targets = explanation.targets
    with evaluation_mode(oracle), evaluation_mode(eager), evaluation_mode(ours), torch.no_grad():
        expected, by_eager, by_ours = oracle(double), eager(images), ours(images)
    errors = {"logits": (_error(by_ours, expected), _error(by_eager, expected))}
    expected = w(oracle, encoded.double(), targets)
    errors["explanations"] = (_error(explanation.weights, expected), _error(w(eager, encoded, targets), expected))
    expected = Step(oracle, double, labels).gradients()
    gradients = [gradient_error(Step(model, images, labels).gradients(), expected) for model in (ours, eager)]
    errors["gradients of the parameters"] = tuple(gradients)
    for what, (ours_off, eager_off) in errors.items():
        if not ours_off <= max(3 * eager_off, 1e-3):
            raise RuntimeError(
                f"benchmark: expected our {what} to be as near to the eager formulas in float64 as those are in "
                f"float32 (error {eager_off:.1e}), got an error of {ours_off:.1e}; nothing was timed"
            )


def _check_same(name: str, what: str, error: float, dtype: torch.dtype | None) -> None:
    tolerance = 1e-2 if dtype is None else 0.3  # in 16 bits, other roundings add up over the layers of a network
    if not error <= tolerance:
        raise RuntimeError(
            f"benchmark: expected the {what} of {name!r} to be those of the same model in eager mode to {tolerance}, "
            f"got an error of {error:.1e}; nothing was timed"
        )


# --- the benchmark ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Benchmark:
    """What `benchmark` measured. Printing gives a table, `to_dict` JSON types.

    Attributes:
        rows: one per task ("training", "inference", "explanation") and contender: task, contender, images_per_s,
            median_ms, ratio (of times, to the baseline's), ratio_q1, ratio_q3; of training also kept_MiB (bytes that a
            forward keeps for the backward) and peak_MiB (the most alive during forward and backward, beyond
            parameters); of ours also fallback_share (of the time in B-cos layers and norms, of one call, that on the
            backend "reference": ops that no kernel runs) and fallback_ops (their names). Where a contender did not run:
            task, contender, failed (the reason).
        settings: contenders, baseline, batch, explained (images of the explanations), size (height, width), dtype,
            device, rounds; texts, the number of directions that the embeddings of an image tower are compared with,
            None for classifiers.
        machine: see `measuring.machine`.
    """

    rows: list[dict]
    settings: dict
    machine: dict

    def to_dict(self) -> dict:
        """Settings, machine and rows as JSON types."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        settings, machine = self.settings, self.machine
        threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
        threads = f", {threads}" if settings["device"] == "cpu" else ""
        found = {(row["task"], row["contender"]): row for row in self.rows}
        head = [""]
        for task in TASKS:
            head += [task, "time"]
        table = [[*head, "kept, MiB", "peak, MiB"]]
        for name in settings["contenders"]:
            cells = [CONTENDERS[name]]
            for task in TASKS:
                cells += _cells(found.get((task, name)))
            training = found.get(("training", name), {})
            cells += [_rounded(training[key]) if key in training else "–" for key in ("kept_MiB", "peak_MiB")]
            table.append(cells)
        lines = aligned(table, left=(0, 2, 4, 6))
        height, width = settings["size"]
        return "\n".join(
            [
                f"batch {settings['batch']} of {height} x {width} pixels, {settings['dtype']}, on {machine['device']}"
                f"{threads}, torch {machine['torch']}",
                "",
                *lines,
                "",
                f"Images per second, and the time relative to {CONTENDERS[settings['baseline']]}"
                f"{_spread_told(settings['rounds'])}.",
                "Explanations"
                + (f" of {settings['explained']} images" if settings["explained"] < settings["batch"] else "")
                + ": of plain the input gradient; peer-style one image after the other, as the peers do.",
                *([f"An image tower: its embeddings are compared with {settings['texts']:,} random directions, in "
                   "place of texts."] if settings.get("texts") else []),
                "Memory of a training step: kept for the backward, and the most at once, beyond parameters.",
                *self._fallbacks(),
                *(f"{CONTENDERS[row['contender']]}, {row['task']}: failed: {row['failed']}" for row in self.rows
                  if "failed" in row),
            ]
        )  # fmt: skip

    def _fallbacks(self) -> list[str]:
        """Which share of the time in our layers ran without a kernel, a line per contender that has any."""
        lines = []
        for name in self.settings["contenders"]:
            rows = [row for row in self.rows if row["contender"] == name and "fallback_share" in row]
            if rows:
                shares = ", ".join(f"{row['task']} {100 * row['fallback_share']:.0f} %" for row in rows)
                ops = sorted({op for row in rows for op in row["fallback_ops"]})
                told = f" ({', '.join(ops)})" if ops else ""
                lines.append(
                    f"{CONTENDERS[name]}: share of the time in B-cos layers and norms that ran on the fallback, plain "
                    f"PyTorch: {shares}{told}."
                )
        return lines


def fallback(run: Callable[[], object]) -> dict[str, object]:
    """What ran without a kernel while `run` is called once: see `measuring.fallback_share`."""
    with bcos_kernels.timed() as seconds:
        run()
    return fallback_share(seconds)


def _cells(row: dict | None) -> list[str]:
    """Rate, and time relative to the baseline's with its spread."""
    if row is None or "failed" in row:
        return ["–" if row is None else "failed", ""]
    same = row["ratio"] == row["ratio_q1"] == row["ratio_q3"]  # the baseline, or a single round
    return [
        _rounded(row["images_per_s"]),
        f"{row['ratio']:.2f}" + ("" if same else f" [{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]"),
    ]


def _spread_told(rounds: int) -> str:
    """What the brackets behind a ratio hold."""
    if rounds == 1:
        return ", of one round: --rounds 5 would tell how far it scatters"
    return f" [{'quartiles' if rounds > 3 else 'smallest and largest'} of {rounds} rounds]"


def _rounded(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def aligned(table: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Lines of a table whose columns are as wide as their widest cell; all but `left` are flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def benchmark(
    original: nn.Module,
    converted: BcosifiedModel,
    images: Tensor,
    *,
    contenders: Sequence[str] = DEFAULT_CONTENDERS,
    rounds: int = 5,
    dtype: str = "float32",
    explained: int | None = None,
    progress: bool = True,
) -> Benchmark:
    """Speed and memory of a model, plain and as a B-cos model with the peers' layers and with ours.

    Contenders run in turn, in one process, channels_last, after their numbers were checked: ours against the eager
    formulas in float64, everything compiled (or recomputing) against the same model in eager mode. "peer" is the
    converted model with layers computed by the eager formulas of the package bcos (`peer_style`); it explains one image
    after the other, as that package does. Compiled contenders (`torch.compile`) train and infer, they do not explain.

    Args:
        original: the standard model, logits (N, classes); or an image tower of CLIP's kind, embeddings (N, D), or the
            whole model that it belongs to: then the tower is measured as a classifier of 1,000 random directions in
            place of texts, and what is explained is the largest cosine.
        converted: what `bcosify` made of it.
        images: (N, 3, H, W) in [0, 1], on the device to measure on; the batch.
        contenders: names of `CONTENDERS`; ratios are to the first. Default plain, peer, peer-compiled, ours.
        rounds: timed calls of each contender and task, default 5.
        dtype: "float32" (default), or "bfloat16" or "float16": autocast, with parameters in float32.
        explained: how many of the images are explained, the first ones; default all. The peers explain one after the
            other, which takes long for a large batch.
        progress: tell on stderr what is being done (default).

    Returns:
        A `Benchmark`. Neither model is changed.

    Raises:
        ValueError: unknown or repeated contenders or dtypes, rounds < 1, more images explained than there are, or none;
            images that the model does not take.
        RuntimeError: a contender computes other numbers; nothing was timed then.

    Example:
        >>> network = torchvision.models.resnet18()
        >>> print(benchmark(network, bcosify(network), torch.rand(8, 3, 224, 224)))
    """
    check_options(contenders, rounds, dtype)
    explained = len(images) if explained is None else explained
    if not 1 <= explained <= len(images):
        there = len(images)
        raise ValueError(f"benchmark: explained: expected 1 to {there}, the images that there are, got {explained}")
    run = _Run(original, converted, images, tuple(contenders), rounds, dtype, explained, progress)
    return run()


def check_options(contenders: Sequence[str], rounds: int, dtype: str) -> None:
    """Raises ValueError for what `benchmark` does not take."""
    known = ", ".join(CONTENDERS)
    unknown = [name for name in contenders if name not in CONTENDERS]
    if unknown or not contenders or len(set(contenders)) < len(contenders):
        got = ", ".join(contenders) or "none"
        raise ValueError(f"benchmark: contenders: expected different ones of {known}, got {got}")
    if rounds < 1:
        raise ValueError(f"benchmark: expected rounds >= 1, got {rounds}")
    if dtype not in DTYPES:
        raise ValueError(f"benchmark: dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")


class _Cosines(nn.Module):
    """A standard image tower as a classifier: the cosines of its embeddings with fixed directions (T, D)."""

    def __init__(self, tower: nn.Module, directions: Tensor) -> None:
        super().__init__()
        self.tower, self.output = tower, family_of(tower).output
        self.register_buffer("directions", directions)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.output(self.tower(images)), dim=-1) @ self.directions.T


def _as_classifiers(original: nn.Module, converted: BcosifiedCLIP, images: Tensor) -> tuple[nn.Module, nn.Module]:
    """Two image towers as classifiers of the same random directions, which stand for the embeddings of texts."""
    tower = family_of(original).tower(original)
    tower = copy.deepcopy(tower).to(images.device)
    size = family_of(tower).output(_tried(tower, images)).shape[-1]
    directions = torch.randn(TEXTS, size, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(directions, dim=-1).to(images.device)
    return _Cosines(tower, directions), converted.without_text().to(images.device).classifier(directions)


def _tried(model: nn.Module, images: Tensor) -> object:
    """What a model gives for one image; ValueError for a size that it does not take."""
    try:
        with torch.no_grad(), evaluation_mode(model):
            return model(images[:1])
    except Exception as error:
        size = " x ".join(map(str, images.shape[-2:]))
        text = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"benchmark: expected a size that the model takes, got {size}: {text}") from error


class _Run:
    def __init__(self, original, converted, images, contenders, rounds, dtype, explained, progress):
        self.device = images.device
        self.texts = TEXTS if isinstance(converted, BcosifiedCLIP) else None
        if self.texts:
            original, converted = _as_classifiers(original, copy.deepcopy(converted), images)
        self.original = copy.deepcopy(original).to(self.device, memory_format=torch.channels_last)
        self.converted = copy.deepcopy(converted).to(self.device, memory_format=torch.channels_last)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.explained = self.images[:explained]
        self.labels = torch.arange(len(images), device=self.device)
        self.contenders, self.rounds, self.dtype, self.progress = contenders, rounds, dtype, progress
        self.autocast = None if dtype == "float32" else DTYPES[dtype]
        self.rows: list[dict] = []

    def say(self, text: str) -> None:
        if self.progress:
            print(text, file=sys.stderr, flush=True)

    def __call__(self) -> Benchmark:
        self._check_images()
        self.say("checking numbers: ours against the eager formulas in float64")
        few = min(4, len(self.images))
        _check_numbers(self.converted, self.images[:few], self.labels[:few])
        for task in TASKS:
            self._measure(task)
        settings = {
            "contenders": list(self.contenders),
            "baseline": self.contenders[0],
            "batch": len(self.images),
            "explained": len(self.explained),
            "size": list(self.images.shape[-2:]),
            "dtype": self.dtype,
            "device": self.device.type,
            "rounds": self.rounds,
            "texts": self.texts,
        }
        return Benchmark(self.rows, settings, machine(self.device))

    def _check_images(self) -> None:
        logits = _tried(self.original, self.images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"benchmark: expected a classifier with logits (N, classes), got {got}")

    def _model(self, name: str) -> nn.Module:
        """A fresh copy: every task starts from the same statistics."""
        kind, _, how = name.partition("-")
        if kind == "peer":
            model = peer_style(self.converted)
        else:
            model = copy.deepcopy(self.original if kind == "plain" else self.converted)
        if how == "low":
            fuse(model, memory="low")
        return torch.compile(model) if how == "compiled" else model

    def _takes_part(self, name: str, task: str) -> bool:
        _, _, how = name.partition("-")
        return task == "training" or (how == "compiled" and task == "inference") or not how

    def _measure(self, task: str) -> None:
        torch.compiler.reset()  # the compiler gives up on a forward that it has seen with many models
        runs: dict[str, Callable[[], object]] = {}
        failed: dict[str, str] = {}
        memory: dict[str, dict[str, float]] = {}
        for name in filter(lambda name: self._takes_part(name, task), self.contenders):
            try:
                runs[name] = self._prepared(name, task)
                if task == "training":
                    memory[name] = self._memory(runs[name])
            except Exception as error:
                # A compiler that is missing, or memory that does not suffice, ends one contender and not all.
                out_of_memory = isinstance(error, torch.OutOfMemoryError)
                wrong = isinstance(error, RuntimeError) and str(error).startswith("benchmark: ")
                if wrong or not (out_of_memory or name.endswith("-compiled")) or name == self.contenders[0]:
                    raise
                runs.pop(name, None)
                failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
                self.say(f"{task}: {CONTENDERS[name]}: {failed[name]}")
        warm = interleaved(runs, rounds=1, warmup=0, device=self.device)
        seconds = self.rounds * sum(time for times in warm.values() for time in times)
        self.say(f"{task}: {self.rounds} x ({'; '.join(CONTENDERS[n] for n in runs)}): about {seconds:.0f} s")
        times = interleaved(runs, rounds=self.rounds, warmup=0, device=self.device)
        summary = summarized(times, self.contenders[0])
        slow = {name: fallback(run) for name, run in runs.items() if name.partition("-")[0] == "ours"}
        for name in self.contenders:
            if name in failed:
                self.rows.append({"task": task, "contender": name, "failed": failed[name]})
            elif name in summary:
                images = self.explained if task == "explanation" else self.images
                rate = len(images) / summary[name]["median_ms"] * 1e3
                self.rows.append(
                    {"task": task, "contender": name, "images_per_s": rate, **summary[name], **memory.get(name, {}),
                     **slow.get(name, {})}
                )  # fmt: skip

    def _prepared(self, name: str, task: str) -> Callable[[], object]:
        """What is timed, already called (and compiled) once, with its numbers checked against the eager model's."""
        kind, _, how = name.partition("-")
        if how == "compiled":
            self.say(f"{task}: compiling {CONTENDERS[kind]} (minutes on a small machine)")
        model = self._model(name)
        options = {"autocast": self.autocast}
        if task == "training":
            step = Step(model, self.images, self.labels, **options)
            if how:
                expected = Step(self._model(kind), self.images, self.labels, **options).gradients()
                _check_same(name, "gradients", gradient_error(step.gradients(), expected), self.autocast)
            return step
        model.eval()
        if task == "inference":
            if how:
                expected = inference(self._model(kind).eval(), self.images, **options)
                _check_same(name, "logits", _error(inference(model, self.images, **options), expected), self.autocast)
            return lambda: inference(model, self.images, **options)
        if kind == "plain":
            return lambda: input_gradient(model, self.explained, **options)
        if kind == "peer":
            encoded = encode(model, self.explained)
            return lambda: explain_one_by_one(model, encoded, **options)

        def ours():
            with warnings.catch_warnings(), _autocast(self.device, self.autocast):
                if self.autocast is not None:
                    warnings.simplefilter("ignore")  # in 16 bits the sum of the contributions is the logit roughly
                return explain(model, self.explained, batch_size=len(self.explained))

        return ours

    def _memory(self, step: Step) -> dict[str, float]:
        step()  # what is allocated once is not the step's
        step.optimizer.zero_grad(set_to_none=True)
        kept = bytes_kept(step.loss, self.device)
        peak = peak_bytes(step.backward, self.device)
        return {"kept_MiB": kept / MIB, "peak_MiB": peak / MIB}
