"""CLIP in miniature: train a small CLIP on captioned scenes, B-cosify its image tower, distil, find digits by text.

    python examples/clip_digits.py [--out clip_digits] [--towers resnet vit] [--epochs N] [--distill-epochs N]

On `scenes` (tinted handwritten digits on photographs) with captions such as "a photo of the digit seven":

    teacher     an open_clip model with a small image tower: a ModifiedResNet, trained contrastively together with a
                small text tower, or a VisionTransformer, trained with the texts that this tower has learnt
    converted   its image tower B-cosified, not trained yet
    student     that tower after distillation from the teacher: images only, no captions (`bcosification.distill`)

Reported: zero-shot accuracy with captions, and how well explanations of a caption point at the digit that it names:
GridPG with text, the share of positive contributions in the digit's cell of a 2 x 2 grid, and EPG, in its box. Beside
GridPG stands how many of a grid's four digits are among the model's four best captions: what a model does not read
there, its explanation cannot point at. Training that was stopped is taken up where it stands by the same command.

Written to --out: table.md, results.json, and for each tower its runs and pictures (grid.png: one grid, four captions).
"""

import argparse
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
from bcosification.train.data import build_datamodule, scenes
from bcosification.train.distillation import DistillConfig, distill
from bcosification.train.lightning_module import TrainedModule
from bcosification.train.training import train

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = [
    "a photo of the digit {}.",
    "a photo of a {}.",
    "the number {} on a photo.",
    "a handwritten {}.",
    "a picture of the figure {}.",
]
SIZE = 64
RATES = {"resnet": 2e-3, "vit": 1e-3}
EPOCHS = {"resnet": (12, 12), "vit": (30, 12)}  # of teachers and students: a ViT has to learn that places are alike
SMOOTH = 3


def small_clip(tower: str, width: int):
    """An open_clip model with a small image tower for 64 x 64 pixels and a small text tower, random weights."""
    import open_clip

    vision = {
        "resnet": dict(layers=[1, 1, 1, 1], width=width, head_width=32, image_size=SIZE),
        "vit": dict(layers=3, width=6 * width, head_width=2 * width, image_size=SIZE, patch_size=8),
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
        state = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        save_file(state, Path(folder) / "clip.safetensors")


class Study:
    """One tower: its teacher and student, their accuracies, and what captions find."""

    def __init__(self, tower: str, options: argparse.Namespace, say=print):
        self.tower, self.options, self.say = tower, options, say
        self.out = Path(options.out) / tower
        self.val = scenes("val", size=SIZE)
        self.loader = torch.utils.data.DataLoader(self.val, batch_size=100)

    def teacher(self):
        """The CLIP model, trained; taken up where it stands."""
        options, output = self.options, self.out / "teacher"
        epochs, _ = epochs_of(self.tower, options)
        output.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(options.seed)
        model = small_clip(self.tower, options.width)
        if self.tower == "vit":  # from two random towers it does not get away: it learns the ResNet's texts (as in LiT)
            told = Study("resnet", options, self.say).teacher().state_dict()
            text = {name: value for name, value in told.items() if not name.startswith("visual.")}
            model.load_state_dict(text, strict=False)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith("visual."))
        module = ContrastiveModule(
            model, optimizer="adamw", lr=RATES[self.tower], weight_decay=0.05,
            warmup_epochs=min(1 if self.tower == "resnet" else 2, epochs / 4),
        )  # fmt: skip
        data = build_datamodule("scenes", image_size=SIZE, batch_size=options.batch_size, seed=options.seed)
        start = time.perf_counter()
        rows = train(
            module, data, epochs=epochs, seed=options.seed, output=output, resume=True, accelerator="cpu", devices=1,
            clip_norm=None if self.tower == "resnet" else 1.0, limit_batches=options.limit_batches, progress=None,
        )  # fmt: skip
        curve = " ".join(f"{100 * row['val_top1']:.1f}" for row in rows)
        self.say(f"{self.tower}: teacher, accuracy after each epoch (%): {curve}  [{elapsed(start)}]")
        return model.eval()

    def student(self, teacher):
        """The teacher's tower, B-cosified and distilled; taken up where it stands."""
        options, output = self.options, self.out / "student"
        _, epochs = epochs_of(self.tower, options)
        config = DistillConfig(
            model=f"clip_digits {self.tower}", data="scenes", output=str(output), epochs=epochs,
            batch_size=options.batch_size, lr=1e-3, warmup_epochs=min(0.5, epochs / 4),
            seed=options.seed, accelerator="cpu", devices="1", limit_batches=options.limit_batches, progress=None,
            with_text=True,
        )  # fmt: skip
        start = time.perf_counter()
        result = distill(config, model=teacher, resume=(output / "config.yaml").is_file())
        curve = " ".join(f"{row['val_cosine']:.3f}" for row in result.history)
        self.say(f"{self.tower}: student, cosine with its teacher after each epoch: {curve}  [{elapsed(start)}]")
        return bcosification.load(output / "best")

    def measure(self, name: str, model, attribute) -> dict:
        """Zero-shot accuracy; GridPG and EPG of the captions' explanations, None where too few grids can be made."""
        classifier = model.classifier(DIGITS, TEMPLATES, scale=100.0)
        images, labels = self.val.tensors()
        count = self.options.localisation_images
        result = evaluate_zero_shot(model, self.loader, DIGITS, TEMPLATES, progress=False)
        game = energy_pointing_game(classifier, images[:count], labels[:count], self.val.boxes[:count], attribute)
        result |= {"epg": game.mean, "epg_chance": game.chance, "gridpg": None, "read_in_grids": None}
        if isinstance(model, StandardCLIP) and self.tower == "resnet":
            return self.told(name, result)  # its positional embedding is that of one image: it takes no grid
        try:
            game = grid_pointing_game(
                classifier, images, labels, attribute, count=self.options.grids, confidence=0.0,
                probability="softmax", rescale=self.tower == "vit",
            )  # fmt: skip
            result["gridpg"] = game.mean
            result["read_in_grids"] = self.read(classifier, images[game.indices], labels[game.indices])
        except ValueError as error:
            if "expected confident images" not in str(error):
                raise
        return self.told(name, result)

    def grid(self, four) -> torch.Tensor:
        """A grid (1, 3, H, W) of four images, as the tower takes it: a ViT's of the size of one image."""
        grid = torch.cat([torch.cat(list(four[2 * row : 2 * row + 2]), dim=2) for row in range(2)], dim=1)[None]
        if self.tower == "vit":
            grid = F.interpolate(grid, size=(SIZE, SIZE), mode="bilinear", antialias=True).clamp(0, 1)
        return grid

    def read(self, classifier, images, labels) -> float:
        """Of the digits in grids of every four images, the share among the four best captions of their grid."""
        grids = torch.cat([self.grid(four) for four in images.split(4)])
        with torch.no_grad():
            best = classifier(grids).topk(4).indices
        return float((labels.view(-1, 4, 1) == best[:, None]).any(2).float().mean())

    def told(self, name: str, result: dict) -> dict:
        shares = ", ".join(f"{key} {value:.3f}" for key, value in result.items() if isinstance(value, float))
        self.say(f"{self.tower}: {name}: {shares}")
        return result

    def run(self) -> dict:
        teacher = self.teacher()
        converted = bcosification.bcosify(teacher)
        standard = StandardCLIP(teacher, converted.config["mean"], converted.config["std"])
        student = self.student(teacher)
        results = {
            "teacher, input x gradient": self.measure("teacher, input x gradient", standard, input_x_gradient),
            "converted": self.measure("converted", converted, bcos_contributions),
            "student": self.measure("student", student, bcos_contributions),
        }
        if student.attention_pool is not None:
            results["teacher, Grad-CAM"] = self.measure("teacher, Grad-CAM", standard, grad_cam)
            for power in (1, self.options.power):
                student.set_attention_pool("unpool", p=power)
                name = f"student, unpool, p = {power:g}"
                results[name] = self.measure(name, student, bcos_contributions)
        self.draw(student)
        return results

    def draw(self, student) -> None:
        """A grid of four digits and what the captions of five find in it: its four, and one that is not there."""
        images, labels = self.val.tensors()
        with torch.no_grad():
            cosines = student.classifier(DIGITS, TEMPLATES)(images)
        right = (cosines.argmax(1) == labels).nonzero()[:, 0]
        order = right[cosines[right, labels[right]].argsort(descending=True)]
        cells: dict[int, int] = {}
        for i in order.tolist() or range(4):
            if len(cells) < 4:
                cells.setdefault(int(labels[i]), i)
        chosen = [*cells.values(), *range(4)][:4]
        grid = self.grid(images[chosen])
        present = [int(labels[i]) for i in chosen]
        absent = next(digit for digit in range(10) if digit not in present)
        texts = [DIGITS[digit] for digit in [*dict.fromkeys(present), absent]]
        explanation = bcosification.explain(student, grid, text=texts, templates=TEMPLATES)
        explanation.save(self.out / "pictures", smooth=SMOOTH)
        title = "What captions find in a grid: W(x), and contributions to the cosine under it"
        save_figure(explanation.figure(smooth=SMOOTH, title=title), self.out / "grid.png")


def table(results: dict[str, dict], options) -> str:
    """The results as Markdown."""
    titles = ("tower", "", "zero-shot top-1 (%)", "top-5 (%)", "read in grids (%)", "GridPG with text", "EPG with text")
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for tower, rows in results.items():
        for name, row in rows.items():
            grid = "–" if row["gridpg"] is None else f"{row['gridpg']:.2f}"
            read = "–" if row["read_in_grids"] is None else f"{100 * row['read_in_grids']:.0f}"
            accuracies = f"{100 * row['top1']:.1f} | {100 * row['top5']:.1f} | {read}"
            lines.append(f"| {tower} | {name} | {accuracies} | {grid} | {row['epg']:.2f} |")
    chance = next(iter(next(iter(results.values())).values()))["epg_chance"]
    lines.append(f"| | chance | 10.0 | 50.0 | 40 | 0.25 | {chance:.2f} |")
    told = machine()
    trained = ", ".join("{} and {} epochs ({})".format(*epochs_of(tower, options), tower) for tower in results)
    lines += [
        "",
        f"Trained on 3000 scenes, teacher and student for {trained}; measured on {len(scenes('val', size=SIZE))}, "
        f"captions averaged over {len(TEMPLATES)} templates; GridPG: {options.grids} grids, EPG: "
        f"{options.localisation_images} images.",
        "",
        f"Measured on {told['device']}, {told['threads']} threads, torch {told['torch']}, {told['date']}.",
        "",
    ]
    return "# CLIP in miniature\n\n" + "\n".join(lines)


def epochs_of(tower: str, options) -> tuple[int, int]:
    return options.epochs or EPOCHS[tower][0], options.distill_epochs or EPOCHS[tower][1]


def elapsed(start: float) -> str:
    return f"{time.perf_counter() - start:.0f} s"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="clip_digits", help="output folder; parts that are there are taken up")
    parser.add_argument("--towers", nargs="+", choices=("resnet", "vit"), default=["resnet", "vit"], help="image")
    parser.add_argument("--epochs", type=int, help="of training the teachers (None: 12 for the ResNet, 30 for the ViT)")
    parser.add_argument("--distill-epochs", type=int, help="of distilling the students (None: 12)")
    parser.add_argument("--width", type=int, default=16, help="channels of the ResNet's stem; a sixth of the ViT's")
    parser.add_argument("--batch-size", type=int, default=50, help="images per step")
    parser.add_argument("--limit-batches", type=int, help="batches per epoch and part, for a trial")
    parser.add_argument("--grids", type=int, default=16, help="grids of the grid pointing game")
    parser.add_argument("--localisation-images", type=int, default=120, help="images of the energy pointing game")
    parser.add_argument("--power", type=float, default=3.0, help="p of the mean over positions with unpool")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    options = parser.parse_args(argv)
    results = {}
    start = time.perf_counter()
    for tower in options.towers:
        results[tower] = Study(tower, options, lambda text: print(text, flush=True)).run()
    text = table(results, options)
    out = Path(options.out)
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{text}\n{elapsed(start)}; table, numbers, runs and pictures are in {out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
