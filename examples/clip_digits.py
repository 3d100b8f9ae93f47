"""CLIP in miniature: train a small CLIP on captioned scenes, B-cosify its image tower, distil, find digits by text.

    python examples/clip_digits.py [--out clip_digits] [--towers resnet vit] [--epochs 10] [--distill-epochs 10]

On `scenes` (tinted handwritten digits on photographs) with captions such as "a photo of the digit seven":

    teacher     an open_clip model with a small image tower (a ModifiedResNet, a VisionTransformer), trained
                contrastively from random weights with a small text tower
    converted   its image tower B-cosified, not trained yet
    student     that tower after distillation from the teacher: images only, no captions (`bcosification.distill`)

Reported: zero-shot accuracy with captions, and how well explanations of a caption point at the digit that it names: GridPG
with text, the share of positive contributions in the digit's cell of a 2 x 2 grid, and EPG, in its box. Each part is left
where it stands when the script is stopped, and taken up there by the same command.

Written to --out: table.md, results.json, and for each tower its runs and pictures (grid.png: one grid, four captions).
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import bcosification
from bcosification.convert.clip import StandardCLIP
from bcosification.evaluation import energy_pointing_game, evaluate_zero_shot, grid_pointing_game
from bcosification.evaluation.measuring import machine
from bcosification.explanation import bcos_contributions, grad_cam, input_x_gradient, save_figure
from bcosification.train.data import ImageDataModule, ImageTensors, _Resized, scenes
from bcosification.train.distillation import DistillConfig, distill
from bcosification.train.finetuning import train
from bcosification.train.lightning_module import TrainedModule

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = [
    "a photo of the digit {}.",
    "a photo of a {}.",
    "the number {} on a photo.",
    "a handwritten {}.",
    "a picture of the figure {}.",
]
SIZE = 64
SMOOTH = 3


def small_clip(tower: str, width: int):
    """An open_clip model with a small image tower for 64 x 64 pixels and a small text tower, random weights."""
    import open_clip

    vision = {
        "resnet": dict(layers=[1, 1, 1, 1], width=width, head_width=32, image_size=SIZE),
        "vit": dict(layers=4, width=6 * width, head_width=2 * width, image_size=SIZE, patch_size=8),
    }[tower]
    text = dict(context_length=16, vocab_size=49408, width=64, heads=2, layers=2)
    model = open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)
    if tower == "vit":  # open_clip leaves torch's initialisation, in which positions are lost among the patches
        torch.nn.init.trunc_normal_(model.visual.positional_embedding, std=0.02)
    return model


class ContrastiveModule(TrainedModule):
    """Trains an open_clip model on images whose captions are made of their labels.

    Every step draws one template for each digit: images are told which of the 10 captions is theirs, and captions which
    of the images (CLIP's two losses, with several images of one caption).
    """

    def __init__(self, model, **options):
        super().__init__(model, **options)
        import open_clip

        config = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        self.images = StandardCLIP(model, **config)
        tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
        tokens = [tokenizer([template.format(digit) for digit in DIGITS]) for template in TEMPLATES]
        self.register_buffer("tokens", torch.stack(tokens), persistent=False)  # (templates, digits, length)

    def logits(self, images, tokens):
        images = F.normalize(self.images(self.laid_out(images)), dim=-1)
        texts = self.model.encode_text(tokens, normalize=True)
        return self.model.logit_scale.exp().clamp(max=100) * images @ texts.T

    def training_step(self, batch, batch_idx):
        images, labels = batch
        chosen = torch.randint(len(TEMPLATES), (len(DIGITS),), device=labels.device)
        logits = self.logits(images, self.tokens[chosen, torch.arange(len(DIGITS), device=labels.device)])
        own = F.one_hot(labels, len(DIGITS)).float()
        present = own.sum(0) > 0
        of_captions = own.T[present] / own.T[present].sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T[present], of_captions)) / 2
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.logits(images, self.tokens[0])
        options = dict(on_step=False, on_epoch=True, batch_size=len(labels))
        self.log("val_loss", F.cross_entropy(logits, labels), **options)
        self.log("val_top1", (logits.argmax(1) == labels).float().mean(), **options)

    def save(self, folder):
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.model.state_dict().items()}, folder / "clip.safetensors")


class Study:
    """One tower: teacher, student, their accuracies, what captions find."""

    def __init__(self, tower: str, options: argparse.Namespace, say=print):
        self.tower, self.options, self.say = tower, options, say
        self.out = Path(options.out) / tower
        self.train_part = scenes("train", count=options.train_images, size=SIZE)
        self.val = scenes("val", count=options.val_images, size=SIZE)

    def teacher(self):
        """The trained CLIP model; taken up where it stands."""
        torch.manual_seed(self.options.seed)
        model = small_clip(self.tower, self.options.width)
        part = self.train_part
        shifted = ImageTensors(part.images, part.labels, part.class_names, transform=_Resized(None, shift=4))
        data = ImageDataModule(
            shifted, self.val, part.class_names, batch_size=self.options.batch_size, seed=self.options.seed
        )
        rate = {"resnet": 2e-3, "vit": 1e-3}[self.tower]
        module = ContrastiveModule(model, optimizer="adamw", lr=rate, weight_decay=0.05, warmup_epochs=min(1, self.options.epochs / 4))
        folder = self.out / "teacher"
        start = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        rows = train(
            module, data, epochs=self.options.epochs, seed=self.options.seed, output=folder, resume=True,
            accelerator="cpu", devices=1, progress=None,
        )  # fmt: skip
        curve = " ".join(f"{100 * row['val_top1']:.1f}" for row in rows)
        self.say(f"{self.tower}: teacher, accuracy after each epoch (%): {curve}  [{time.perf_counter() - start:.0f} s]")
        return model.eval()

    def student(self, teacher):
        """The distilled B-cosified model; taken up where it stands."""
        output = self.out / "student"
        config = DistillConfig(
            model=f"clip_digits {self.tower}", data=str(self.images_folder()), output=str(output), epochs=self.options.distill_epochs,
            batch_size=self.options.batch_size, lr=1e-3, warmup_epochs=min(0.5, self.options.distill_epochs / 4), seed=self.options.seed,
            accelerator="cpu", devices="1", progress=None, with_text=True, augment=False, num_workers=0,
        )  # fmt: skip
        start = time.perf_counter()
        result = distill(config, model=teacher, resume=(output / "config.yaml").is_file())
        curve = " ".join(f"{row['val_cosine']:.3f}" for row in result.history)
        self.say(f"{self.tower}: student, cosine with the teacher: {curve}  [{time.perf_counter() - start:.0f} s]")
        return bcosification.load(output / "best")
