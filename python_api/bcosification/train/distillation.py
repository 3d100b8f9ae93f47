"""Distillation of CLIP from a configuration: `distill(DistillConfig(...))`, behind `bcosify distill`.

The teacher is the standard image tower, the student the B-cosified one, which starts from its weights; images are all
that is needed. The run is one of finetuning.py's, and its folder holds the same files.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from bcosification.names import did_you_mean

from .finetuning import FinetuneConfig, FinetuneResult, _check_converted, _require, embedded, image_size, run

__all__ = ["DistillConfig", "distill"]


@dataclass
class DistillConfig(FinetuneConfig):
    """Everything that determines a distillation. See FinetuneConfig for what is not told here.

    Model: `model` is a CLIP model (open_clip:NAME/TAG, or transformers:NAME), whose image tower is the teacher and is
    B-cosified to be the student; or the folder of a student that is converted already. `teacher`: another teacher of
    the same embedding size (default: `model`, or what a converted one was made of). `with_text`: store the text tower
    with the student.

    Data: `data` (digits, scenes or a folder): all images below its train/ and val/, or below the folder itself, of
    which a twentieth is held out; labels are not used. Or tar shards in WebDataset's layout: a pattern
    ("cc3m/{00000..00331}.tar"), or a folder of them, or of train/ and val/ with shards in both.

    Optimisation: the papers' SigLIP loss between the embeddings of student and teacher, with `logit_scale` 10 and
    `logit_bias` −10, and adaptive gradient clipping (`agc`, 0.01).
    """

    loss: str = "siglip"
    agc: float | None = 0.01
    teacher: str | None = None
    logit_scale: float = 10.0
    logit_bias: float = -10.0
    with_text: bool = False

    COMMAND = "distill"

    def losses(self) -> tuple[str, ...]:
        return ("siglip",)

    def check(self) -> None:
        super().check()
        if not self.logit_scale > 0:
            raise ValueError(f"distill: expected logit_scale > 0, got {self.logit_scale!r}")

    def check_data(self) -> None:
        from .data import check_source

        check_source(self.data, labelled=False)


def distill(config: DistillConfig, *, model=None, resume: bool = False) -> FinetuneResult:
    """Takes a CLIP model, B-cosifies its image tower and trains that to give the original's embeddings.

    Args:
        config: see DistillConfig.
        model: an open_clip model (or image tower) of one's own, with its weights, instead of what config.model names
            (which then only labels the run); it is not changed. Resuming needs it again.
        resume: continue the run in config.output from its last complete epoch; see `finetune`.

    Returns:
        A FinetuneResult: .model is the student (a BcosifiedCLIP, with the text tower where there is one), .best the
        highest mean cosine with the teacher on the validation images (val_cosine).

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError: the configuration, the data, the model or the
            output folder is not usable; nothing has been written then.

    Source: B-cosification (Arya, Rao, Boehle, Schiele, 2024), section on CLIP.

    Example:
        >>> config = DistillConfig(model="open_clip:RN50/openai", data="/data/images", output="runs/clip", epochs=20)
        >>> distill(config).model.save_pretrained("clip-bcos", with_text=True)
    """
    _require("train", "open_clip")
    return run(config, _distillation, model=model, resume=resume)


def _distillation(config: DistillConfig, own, saved: Path | None):
    """Teacher, student and images of a distillation."""
    import bcosification
    from bcosification.convert.clip import BcosifiedCLIP, StandardCLIP
    from bcosification.convert.resolver import resolve, specs_of
    from bcosification.convert.wrapper import BcosifiedModel

    from .data import build_datamodule, evaluation_transform
    from .lightning_module import DistillationModule

    def resolved(spec: str):
        return resolve(spec, arch=config.arch, pretrained=config.pretrained, weights=config.weights)[0]

    library, named, _ = config.model.partition(":")
    if own is None and not Path(config.model).exists() and (not named or library in ("torchvision", "timm")):
        near = [spec for spec in specs_of(config.model) if spec.startswith("open_clip:")]
        raise ValueError(
            "distill: expected a CLIP model (open_clip:NAME/TAG, or transformers:NAME) or the folder of a converted "
            f"one, got {config.model}{did_you_mean(near)}"
        )
    found = own if own is not None else resolved(config.model)
    if isinstance(found, BcosifiedCLIP):
        student = found
        _check_converted(config, student)
        # Of a peer's checkpoint only the model is known that its texts are of, which it was made of.
        spec = config.teacher or student.config["source"] or (student.config["text"] or {}).get("model")
        if spec is None:
            raise ValueError(f"distill: expected teacher=, as {config.model} does not tell what it was made of")
        found = resolved(spec)
    elif isinstance(found, BcosifiedModel):
        raise ValueError(
            f"distill: expected a CLIP model or the folder of a converted one, got {config.model}, a conversion of "
            f"{found.config['class']}"
        )
    else:
        student = bcosification.bcosify(found, b=config.b, bias=config.bias, **config.conversion)
        if not isinstance(student, BcosifiedCLIP):
            raise ValueError(
                f"distill: expected a CLIP model or an image tower of one, got {config.model} ({type(found).__name__})"
            )
        if config.teacher is not None:
            found = resolved(config.teacher)
    if saved is not None:
        before = student
        student = bcosification.load(saved, model=found if config.teacher is None else own)
        if student.text is None:
            student.text, student.tokenizer = before.text, before.tokenizer
    statistics = student.config
    teacher = StandardCLIP(copy.deepcopy(found), statistics["mean"], statistics["std"])
    if config.teacher is not None:
        told = bcosification.bcosify(found).config  # another network may want other statistics
        teacher = StandardCLIP(copy.deepcopy(found), told["mean"], told["std"])

    size, as_expected = image_size(config, student, teacher)
    datamodule = build_datamodule(
        config.data, image_size=size, batch_size=config.batch_size, num_workers=config.num_workers, seed=config.seed,
        augment=config.augment, eval_transform=student.transform if as_expected else evaluation_transform(size),
        labelled=False,
    )  # fmt: skip
    if saved is None and not as_expected and size != min(student.config["input_size"] or [0]):
        resize = size if embedded(config) else round(size * 256 / 224)
        student.config.update(input_size=[size, size], resize=resize, crop="center")
    module = DistillationModule(
        student, teacher, logit_scale=config.logit_scale, logit_bias=config.logit_bias, with_text=config.with_text,
        optimizer=config.optimizer, lr=config.lr, weight_decay=config.weight_decay,
        warmup_epochs=config.warmup_epochs, agc=config.agc, channels_last=config.channels_last,
    )  # fmt: skip
    return module, datamodule
