"""The configuration of a run, and recipes: configurations as YAML files. Nothing but the standard library at import."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from bcosification.names import did_you_mean, meant

__all__ = ["EMBEDDED", "FinetuneConfig", "load_recipe", "recipes", "with_absolute_paths"]

EMBEDDED = ("digits", "scenes")
"""Data sets that are made here, by name."""


@dataclass
class FinetuneConfig:
    """Everything that determines a run. Recipes are YAML files with these keys.

    Model: `model` (a spec such as resnet18, torchvision:NAME, timm:NAME, a folder written by us, a weights file with
    `arch`), `arch`, `pretrained` (False: random weights), `weights` (a local file with the standard network's weights).
    `conversion` holds further options of `bcosify` (pool, head, activation, normalize_weight, logit_bias, mean, …).

    B: `b` reached, raised linearly from 1 over `b_epochs` (0: at once). Biases: `bias` is "remove", "keep" or "decay"
    (over `bias_epochs`).

    Data: `data` (digits, scenes or a folder), `image_size` (None: the data set's or the model's), `augment`,
    `num_workers` (None: chosen).

    Optimisation: `epochs`, `batch_size` (per device), `lr`, `optimizer` (adam, adamw), `weight_decay`, `warmup_epochs`,
    `loss` (bce_uniform, bce, cross_entropy), `agc` (clip factor or None), `clip_norm` (norm or None), `seed`.

    Machine: `precision` (one of PRECISIONS, Lightning's names), `compile`, `channels_last`, `accelerator` (auto, cpu,
    gpu, …), `devices` (a number, auto, or indices such as "0,2"), `limit_batches` (per epoch and part, for trials;
    None: all), `progress` (True: a bar on a terminal, elsewhere a line per epoch; False: a line per epoch; None:
    nothing is printed).
    """

    model: str = ""
    data: str = ""
    output: str = ""
    arch: str | None = None
    pretrained: bool = True
    weights: str | None = None
    conversion: dict = field(default_factory=dict)
    b: float = 2.0
    b_epochs: float = 0.0
    bias: str = "remove"
    bias_epochs: float = 0.0
    image_size: int | None = None
    augment: bool = True
    num_workers: int | None = None
    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-4
    optimizer: str = "adam"
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    loss: str = "bce_uniform"
    agc: float | None = None
    clip_norm: float | None = None
    seed: int = 0
    precision: str = "32-true"
    compile: bool = False
    channels_last: bool = True
    accelerator: str = "auto"
    devices: str = "auto"
    limit_batches: int | None = None
    progress: bool | None = True

    PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")

    COMMAND = "finetune"
    """Who speaks in errors."""

    # A resumed run may differ in these, and in the number of epochs; all others decide what comes out.
    MACHINE = frozenset(
        {"output", "num_workers", "accelerator", "devices", "progress", "compile", "channels_last", "precision"}
    )

    def check(self) -> None:
        """Raises ValueError naming the first option whose value makes no sense."""

        def expect(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"{self.COMMAND}: expected {name} {expected}, got {getattr(self, name)!r}")

        for name in ("model", "data", "output"):
            expect(bool(getattr(self, name)), name, "to be given")
        for name in ("epochs", "batch_size"):
            expect(getattr(self, name) >= 1, name, ">= 1")
        expect(self.lr > 0, "lr", "> 0")
        expect(self.b >= 1, "b", ">= 1")
        expect(0 <= self.b_epochs <= self.epochs, "b_epochs", f"between 0 and the number of epochs, {self.epochs}")
        expect(self.bias in ("remove", "keep", "decay"), "bias", "in ('remove', 'keep', 'decay')")
        most = f"between 0 and the number of epochs, {self.epochs}"
        expect(0 <= self.bias_epochs <= self.epochs, "bias_epochs", most)
        expect(self.bias != "decay" or self.bias_epochs > 0, "bias_epochs", "> 0 with bias='decay'")
        expect(self.bias == "decay" or self.bias_epochs == 0, "bias_epochs", "to be 0 without bias='decay'")
        expect(0 <= self.warmup_epochs < self.epochs, "warmup_epochs", f">= 0 and < {self.epochs} (epochs in all)")
        expect(self.optimizer in ("adam", "adamw"), "optimizer", "in ('adam', 'adamw')")
        expect(self.loss in self.losses(), "loss", f"in {tuple(self.losses())}")
        expect(self.weight_decay >= 0, "weight_decay", ">= 0")
        expect(self.agc is None or self.agc > 0, "agc", "> 0")
        expect(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "> 0")
        if self.agc is not None and self.clip_norm is not None:
            raise ValueError(
                f"{self.COMMAND}: expected agc= or clip_norm=, got both: {self.agc!r} and {self.clip_norm!r}"
            )
        expect(self.image_size is None or self.image_size >= 8, "image_size", ">= 8")
        expect(self.num_workers is None or self.num_workers >= 0, "num_workers", ">= 0")
        expect(self.limit_batches is None or self.limit_batches >= 1, "limit_batches", ">= 1")
        expect(self.precision in self.PRECISIONS, "precision", f"to be one of {', '.join(self.PRECISIONS)}")
        expect(isinstance(self.conversion, dict), "conversion", "to be a mapping of bcosify's options")
        for name in ("b", "bias"):
            if name in self.conversion:
                raise ValueError(f"{self.COMMAND}: expected {name} outside of conversion, got {self.conversion!r}")

    def losses(self) -> tuple[str, ...]:
        """The names that `loss` may have."""
        from .losses import LOSSES

        return tuple(LOSSES)

    def check_data(self) -> None:
        """Raises FileNotFoundError unless `data` is there, laid out as it has to be."""
        from .data import check_source

        check_source(self.data)

    @classmethod
    def from_mapping(cls, values: dict, source: str) -> FinetuneConfig:
        return cls(**typed(values, source, cls))

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def with_absolute_paths(options: dict) -> dict:
    """Options of a run with its data, model, weights and teacher as absolute paths, where they are paths: a run is
    resumed from anywhere. What is no path stays, and so do files that are not there, which errors name as given."""
    located = dict(options)
    for name in ("data", "model", "weights", "teacher"):
        value = str(options.get(name) or "")
        prefix, rest = "", value
        if name != "data" and value.startswith("transformers:"):  # of folders, too
            prefix, rest = "transformers:", value.removeprefix("transformers:")
        if rest and _names_a_path(name, rest, bool(prefix)):
            path = Path(rest).absolute()
            located[name] = f"{prefix}{path.resolve() if '..' in path.parts else path}"
    return located


def _names_a_path(option: str, value: str, prefixed: bool) -> bool:
    path = Path(value)
    if option == "data":
        return value not in EMBEDDED and (path.exists() or (value.endswith(".tar") and "://" not in value))
    if prefixed or option == "weights":
        return path.exists()
    # A folder named as a library's model does not hide that.
    ours = any((path / name).is_file() for name in ("config.json", "config.yaml"))
    return path.is_file() or ours or ("/" in value and path.exists())


def typed(values: dict, source: str, config: type[FinetuneConfig] = FinetuneConfig) -> dict:
    """`values` with known keys only and the fields' types (YAML reads 1e-4 as a string)."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a mapping of options, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(config)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        near = did_you_mean(name for one in unknown for name in meant(str(one), fields, most=2))
        raise ValueError(
            f"{source}: expected options of {config.__name__} (bcosify {config.COMMAND} --help tells them), got "
            f"{', '.join(map(repr, unknown))}{near}"
        )
    result = {}
    for name, value in values.items():
        kind = str(fields[name].type)
        try:
            if value is None and "None" not in kind:
                raise ValueError
            if value is not None:
                if kind.startswith("bool"):
                    if not isinstance(value, bool):
                        raise ValueError
                elif kind.startswith("float"):
                    value = float(value)
                elif kind.startswith("int"):
                    if int(value) != float(value):
                        raise ValueError
                    value = int(value)
                elif kind.startswith("str"):
                    value = str(value)
        except (TypeError, ValueError):
            raise ValueError(f"{source}: expected {name} to be {kind}, got {value!r}") from None
        result[name] = value
    return result


def recipes() -> dict[str, str]:
    """Name → first comment line of every recipe that comes with the package."""
    found = {}
    for entry in sorted(resources.files(__package__).joinpath("recipes").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            found[entry.name[: -len(".yaml")]] = entry.read_text().splitlines()[0].lstrip("# ")
    return found


def load_recipe(name_or_file: str) -> dict:
    """Options of a recipe that comes with the package, or of a YAML file of one's own.

    Raises:
        FileNotFoundError: neither. ValueError: not YAML, unknown options, wrong types.
    """
    import yaml

    text = None
    if name_or_file in recipes():
        text = resources.files(__package__).joinpath("recipes", f"{name_or_file}.yaml").read_text()
    elif Path(name_or_file).is_file():
        text = Path(name_or_file).read_text()
    if text is None:
        raise FileNotFoundError(
            f"recipe: expected a YAML file or one of {', '.join(recipes())}; got {name_or_file!r}"
            + did_you_mean(meant(name_or_file, recipes()))
        )
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name_or_file}: not valid YAML: {error}") from None
    return typed(values, f"recipe {name_or_file}")
