"""Images to train and evaluate on: two embedded data sets of real images, and folders of images.

`digits` and `scenes` are made from what scikit-learn ships (1,797 handwritten digits and two photographs), so that
every command of this project runs on real input without a download. All images leave this module as float32 tensors
(3, H, W) in [0, 1]; B-cosified models encode and normalise them themselves.

Everything is reproducible: a data set depends on its seed alone; the order of an epoch and the augmentation of an image
depend on (seed, epoch, index), not on the number of workers, so that a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from bcosification.names import did_you_mean, meant, shortened
from bcosification.train.configuration import EMBEDDED
from bcosification.train.image_files import load_image
from bcosification.train.shards import ShardImages, is_shards, split_shards

__all__ = [
    "EMBEDDED",
    "FolderImages",
    "ImageDataModule",
    "ImageFiles",
    "ImageTensors",
    "build_datamodule",
    "digits",
    "scenes",
]

SPLITS = ("train", "val")
VALIDATION_SHARE = 0.2
HELD_OUT_SHARE = 0.05  # of the images of a folder without train/ and val/
BRIGHTNESS = np.array([0.299, 0.587, 0.114], np.float32)  # weights of red, green and blue (BT.601)
CONTRAST = 0.35
DIMMED = 0.5
FULL_CHECK_LIMIT = 20_000  # files; up to here each is decoded before training (about a minute), beyond only its header


class ImageTensors(Dataset):
    """Images held in memory as uint8, given out as float32 in [0, 1].

    Attributes:
        images: uint8 tensor (N, 3, H, W).
        labels: int64 tensor (N,).
        boxes: int64 tensor (N, 4) of pixels (x0, y0, x1, y1), upper ends excluded; None where objects are not located.
        source: int64 tensor (N,), the index of the handwritten digit in scikit-learn's data set.
        class_names: list of str.
        transform: called on the float image of one item, or None.
    """

    def __init__(self, images, labels, class_names, *, boxes=None, source=None, transform=None):
        self.images, self.labels, self.boxes, self.source = images, labels, boxes, source
        self.class_names = list(class_names)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index].float() / 255
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.labels[index])

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All images (N, 3, H, W), float32 in [0, 1] without transform, and all labels (N,)."""
        return self.images.float() / 255, self.labels


@functools.cache
def _handwritten(split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (N, 8, 8) in [0, 1], labels and indices of one part of scikit-learn's digits; the parts are disjoint.

    Every class is divided with the same share, in an order fixed by a seed of its own: the split is the same for all
    data sets and all seeds.
    """
    load_digits = _import_sklearn().load_digits
    data = load_digits()
    order = np.random.default_rng(1797).permutation(len(data.target))
    chosen = []
    for label in range(10):
        members = order[data.target[order] == label]
        count = round(len(members) * VALIDATION_SHARE)
        chosen.append(members[:count] if split == "val" else members[count:])
    index = np.sort(np.concatenate(chosen))
    images = torch.from_numpy(data.images[index]).float() / 16
    return images, torch.from_numpy(data.target[index]).long(), torch.from_numpy(index).long()


def _import_sklearn():
    try:
        import sklearn.datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            "the data sets 'digits' and 'scenes' are made from scikit-learn's images, which is not installed: "
            "pip install 'bcos-kernels[train]' (or pip install scikit-learn)"
        ) from error
    return sklearn.datasets


def _check_split(name: str, split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"{name}: expected split in {SPLITS}, got {split!r}")


def _upscale(patches: torch.Tensor, size: int) -> torch.Tensor:
    """(N, 8, 8) to (N, size, size), bicubic, in [0, 1]."""
    return F.interpolate(patches[:, None], size=(size, size), mode="bicubic", align_corners=False)[:, 0].clamp_(0, 1)


@functools.cache
def digits(split: str = "train", *, size: int = 32) -> ImageTensors:
    """scikit-learn's 1,797 real handwritten digits, enlarged to `size` × `size` RGB (white on black).

    Args:
        split: "train" (1,438 images) or "val" (359), the same for everyone.
        size: edge in pixels, default 32.

    Returns:
        ImageTensors with 10 classes, kept in memory: a second call returns the same object.
    """
    _check_split("digits", split)
    patches, labels, source = _handwritten(split)
    images = (_upscale(patches, size) * 255).round().to(torch.uint8)
    images = images[:, None].expand(-1, 3, -1, -1).contiguous()
    return ImageTensors(images, labels, [str(i) for i in range(10)], source=source)


@functools.cache
def _photographs() -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(image) for image in _import_sklearn().load_sample_images().images)


@functools.cache
def scenes(split: str = "train", *, count: int | None = None, size: int = 64, seed: int = 0) -> ImageTensors:
    """Handwritten digits, tinted, at random places and sizes on random crops of two photographs; `size` × `size`.

    The class is the digit; `boxes` tells where it is, so that one can measure whether an explanation looks at it. The
    digits of "train" and "val" are disjoint. Photographs are dimmed to 50 %, and a tint is a colour with one channel
    full and one at most 0.6, brighter than its background by at least 0.35: a small network then learns in minutes on
    a CPU, and the colours show in explanations.

    Args:
        split: "train" or "val".
        count: number of scenes; default 3,000 and 600.
        size: edge in pixels, default 64; a digit takes 0.4 to 0.65 of it.
        seed: the scenes are a function of (split, count, size, seed).

    Returns:
        ImageTensors with 10 classes and boxes, kept in memory.
    """
    _check_split("scenes", split)
    if count is None:
        count = 3000 if split == "train" else 600
    if count < 1 or size < 16:
        raise ValueError(f"scenes: expected count >= 1 and size >= 16, got {count} and {size}")
    patches, labels, source = _handwritten(split)
    photographs = _photographs()
    rng = np.random.default_rng([seed, SPLITS.index(split), size])
    # Every digit is used equally often before one is used again.
    rounds = -(-count // len(labels))
    picked = np.concatenate([rng.permutation(len(labels)) for _ in range(rounds)])[:count]
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    boxes = torch.empty(count, 4, dtype=torch.int64)
    for i, digit in enumerate(picked):
        scene = _background(photographs, size, rng)
        edge = int(rng.integers(round(0.40 * size), round(0.65 * size) + 1))
        x, y = (int(v) for v in rng.integers(0, size - edge + 1, size=2))
        opacity = _upscale(patches[digit][None], edge)[0].numpy()
        ink = opacity > 0.1
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        boxes[i] = torch.tensor([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1])
        under = scene[y : y + edge, x : x + edge]
        tint = _tint(under.mean((0, 1)), rng)
        scene[y : y + edge, x : x + edge] = under + opacity[..., None] * (tint - under)
        images[i] = torch.from_numpy((scene * 255).round().astype(np.uint8)).permute(2, 0, 1)
    return ImageTensors(
        images, labels[picked].clone(), [str(i) for i in range(10)], boxes=boxes, source=source[picked].clone()
    )


def _background(photographs: Sequence[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """A random crop of one to three times `size`, mirrored half the time, averaged down, dimmed: (size, size, 3)."""
    photograph = photographs[rng.integers(len(photographs))]
    factor = int(rng.integers(1, 4))
    while factor > 1 and factor * size > min(photograph.shape[:2]):
        factor -= 1
    edge = factor * size
    top = rng.integers(0, photograph.shape[0] - edge + 1)
    left = rng.integers(0, photograph.shape[1] - edge + 1)
    crop = photograph[top : top + edge, left : left + edge].astype(np.int32)
    # A sum of whole numbers over strided slices: exact on every machine, and ten times as fast as mean((1, 3)).
    total = sum(crop[i::factor, j::factor] for i in range(factor) for j in range(factor))
    crop = (DIMMED * total / (255 * factor * factor)).astype(np.float32)
    return crop[:, ::-1].copy() if rng.random() < 0.5 else crop


def _tint(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour with one channel at 1 and one at most 0.6, brighter than `background` (3,) by at least CONTRAST.

    There is always one: a dimmed background is at most 0.5 bright, and (1, 1, 0.6) is 0.95.
    """
    while True:
        tint = rng.random(3).astype(np.float32)
        tint /= tint.max()
        if tint.min() <= 0.6 and float((tint - background) @ BRIGHTNESS) >= CONTRAST:
            return tint


class FolderImages(Dataset):
    """Images of a folder with one sub-folder per class (torchvision's ImageFolder), unreadable files left out.

    Args:
        root: the folder; `root/CLASS/…/image.jpg`.
        transform: PIL image → tensor.
        class_to_idx: numbers of the classes; default: the sub-folders in alphabetical order. Given for the validation
            part, so that a class that is missing there does not shift the others.
        check: "full" (decode every file), "header" (open it only) or "auto" (full up to 20,000 files).

    Attributes:
        classes, class_to_idx, samples: as ImageFolder has them.
        unreadable: list of (path, reason) found by the check. What a header check lets through is left out of its
            batch with a warning when it turns up.

    Raises:
        FileNotFoundError: no folder, no class folders, or no image in them.
        ValueError: a class that `class_to_idx` does not know, or no readable image at all.
    """

    def __init__(self, root, transform: Callable, *, class_to_idx: dict[str, int] | None = None, check: str = "auto"):
        from torchvision.datasets import ImageFolder
        from torchvision.datasets.folder import IMG_EXTENSIONS

        if check not in ("auto", "full", "header"):
            raise ValueError(f"FolderImages: expected check in ('auto', 'full', 'header'), got {check!r}")
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"image folder {root}: expected a folder with one sub-folder per class, found none")
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not found:
            files = len(list(root.iterdir()))
            found_there = "an empty folder" if not files else f"{files} file{'s' * (files > 1)} and no sub-folder"
            raise FileNotFoundError(f"image folder {root}: expected one sub-folder per class, found {found_there}")
        if class_to_idx is not None and not set(found) <= set(class_to_idx):
            unknown = sorted(set(found) - set(class_to_idx))
            raise ValueError(
                f"image folder {root}: expected the classes of the training part ({len(class_to_idx)}), got also "
                + _shortened(unknown)
            )
        folder = ImageFolder(str(root), allow_empty=True)
        self.root, self.transform = root, transform
        self.class_to_idx = dict(class_to_idx) if class_to_idx is not None else folder.class_to_idx
        self.classes = sorted(self.class_to_idx, key=self.class_to_idx.get)
        samples = [(path, self.class_to_idx[folder.classes[label]]) for path, label in folder.samples]
        if not samples:
            raise FileNotFoundError(
                f"image folder {root}: expected images ({', '.join(sorted(IMG_EXTENSIONS))}) in its {len(found)} "
                "class folders, found none"
            )
        self._take_readable(samples, check)
        present = {label for _, label in self.samples}
        self.empty_classes = [name for name, label in self.class_to_idx.items() if label not in present]
        if class_to_idx is None and self.empty_classes:
            raise FileNotFoundError(
                f"image folder {root}: expected readable images in every class, found none in "
                + _shortened(self.empty_classes)
            )

    def _take_readable(self, samples: list[tuple[str, int]], check: str) -> None:
        full = check == "full" or (check == "auto" and len(samples) <= FULL_CHECK_LIMIT)
        if not full:
            print(f"{self.root}: opening {len(samples):,} image files to leave out what is none …", flush=True)
        with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) * 2)) as pool:
            reasons = list(pool.map(lambda sample: _unreadable(sample[0], full), samples))
        self.unreadable = [
            (path, reason) for (path, _), reason in zip(samples, reasons, strict=True) if reason is not None
        ]
        self.samples = [sample for sample, reason in zip(samples, reasons, strict=True) if reason is None]
        if not self.samples:
            path, reason = self.unreadable[0]
            raise ValueError(
                f"image folder {self.root}: expected readable images, but all {len(samples)} are unreadable (first: "
                f"{path}: {reason})"
            )

    def __len__(self) -> int:
        return len(self.samples)

    @functools.cached_property
    def contents(self) -> str:
        """A digest of the files below the folder and of their labels, wherever the folder lies."""
        digest, start = hashlib.sha256(), len(str(self.root))
        for path, label in self.samples:
            digest.update(f"{path[start:]}\t{label}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        try:
            image = load_image(path)
        except (OSError, ValueError, SyntaxError) as error:
            warnings.warn(f"image {path} cannot be read and is left out: {error}", stacklevel=2)
            return None
        return self.transform(image), label


class ImageFiles(FolderImages):
    """All images below a folder, whatever its sub-folders, without labels (0 everywhere); unreadable files left out.

    Args:
        root: the folder.
        transform, check: as FolderImages.
        part: None (default): all files; "train", "val": one of two disjoint parts, of which "val" holds a twentieth,
            at least one file, the same for everyone.

    Raises:
        FileNotFoundError: no folder, or no (two) images in it. ValueError: no readable image.
    """

    def __init__(self, root, transform: Callable, *, part: str | None = None, check: str = "auto"):
        from torchvision.datasets.folder import IMG_EXTENSIONS

        root = Path(root)
        paths = sorted(str(path) for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if len(paths) < (1 if part is None else 2):
            least = "images" if part is None else "at least two images"
            raise FileNotFoundError(
                f"image folder {root}: expected {least} ({', '.join(sorted(IMG_EXTENSIONS))}) in it, found {len(paths)}"
            )
        if part is not None:
            order = np.random.default_rng(1797).permutation(len(paths))
            held_out = set(order[: max(1, round(len(paths) * HELD_OUT_SHARE))].tolist())
            paths = [path for i, path in enumerate(paths) if (i in held_out) == (part == "val")]
        self.root, self.transform = root, transform
        self.classes, self.class_to_idx, self.empty_classes = ["image"], {"image": 0}, []
        self._take_readable([(path, 0) for path in paths], check)


def _unreadable(path: str, full: bool) -> str | None:
    from PIL import Image

    try:
        if full:
            load_image(path)
        else:
            with Image.open(path) as image:
                image.size  # noqa: B018  the header is parsed by open()
    except Exception as error:  # Pillow's decoders raise many types on broken files
        return f"{type(error).__name__}: {error}"
    return None


def _shortened(names: Sequence[str]) -> str:
    return shortened([repr(str(name)) for name in names], 5)


class _Epochs(Dataset):
    """Gives the items of a training set; the random numbers of an item depend on (seed, epoch, index) alone."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed
        # Shared memory: workers that live through several epochs see the new number.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        state = np.random.SeedSequence([self.seed, int(self.epoch), index]).generate_state(2)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: before CUDA's first use that records a stack trace, a millisecond each time.
            torch.default_generator.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
            return self.dataset[index]


class _EpochSampler(DistributedSampler):
    """torch's sampler whose order is a function of (seed, epoch); tells the data set the epoch, too."""

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.dataset.epoch.fill_(epoch)


class _ShardSampler(_EpochSampler):
    """The order of a data set that has one of its own (`ShardImages.order`); every process reads shards of its own."""

    def __iter__(self):
        order = self.dataset.dataset.order([self.seed, self.epoch])
        if len(order) < self.total_size:  # a few images twice, so that every process has as many
            order = np.resize(order, self.total_size)
        start = self.rank * self.num_samples
        return iter(order[start : start + self.num_samples].tolist())


def collate(items: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) and labels (N,), without the items that could not be read (None)."""
    read = [item for item in items if item is not None]
    if not read:
        raise ValueError(f"data loader: none of the {len(items)} images of a batch could be read")
    images, labels = zip(*read, strict=True)
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def _lightning_datamodule():
    try:
        from lightning.pytorch import LightningDataModule
    except ImportError as error:
        raise ModuleNotFoundError("training needs lightning: pip install 'bcos-kernels[train]'") from error
    return LightningDataModule


class ImageDataModule(_lightning_datamodule()):
    """Training and validation part of a data set, as Lightning wants them.

    Args:
        train, val: data sets giving (image (3, H, W) in [0, 1], label), or None for unreadable images; train may be
            None when only evaluation is wanted.
        class_names: list of str; their number is the number of classes.
        batch_size: images per step and device, default 128.
        num_workers: processes that load; default 0 for data in memory, else the number of CPUs, at most 8.
        seed: order and augmentation are functions of (seed, epoch, index).
        pin_memory: None for "if there is a GPU".
        labelled: False where labels mean nothing, default True.

    Attributes:
        num_classes, class_names, unreadable: list of (path, reason) of left-out files of both parts.
    """

    def __init__(
        self, train, val, class_names, *, batch_size: int = 128, num_workers: int | None = None, seed: int = 0,
        pin_memory: bool | None = None, name: str = "", labelled: bool = True,
    ):  # fmt: skip
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data: expected batch_size >= 1, got {batch_size}")
        self.train, self.val, self.name, self.labelled = train, val, name, labelled
        self.class_names = list(class_names)
        self.batch_size, self.seed = batch_size, seed
        if num_workers is None:
            num_workers = 0 if isinstance(val, ImageTensors) else min(os.cpu_count() or 1, 8)
        self.num_workers = num_workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def what(self) -> str:
        """The labels, in words."""
        return f"{self.num_classes} classes" if self.labelled else "labels not used"

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        return [entry for part in (self.train, self.val) for entry in getattr(part, "unreadable", [])]

    def state_dict(self) -> dict:
        """What a checkpoint keeps: which images these are, so that a resumed run can tell whether it has the same."""
        parts = {"train": self.train, "val": self.val}
        images = {name: 0 if part is None else len(part) for name, part in parts.items()}
        contents = {name: getattr(part, "contents", "") for name, part in parts.items()}
        return {"classes": self.class_names, "images": images, "contents": contents}

    def train_dataloader(self) -> DataLoader:
        if self.train is None:
            raise ValueError("data: there is no training part")
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        dataset = _Epochs(self.train, self.seed)
        # With fewer images than a batch holds there would be no step at all.
        drop_last = len(dataset) >= self.batch_size * replicas
        kind = _ShardSampler if isinstance(self.train, ShardImages) else _EpochSampler
        sampler = kind(dataset, replicas, rank, shuffle=True, seed=self.seed, drop_last=drop_last)
        return self._loader(dataset, sampler=sampler, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader:
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = DistributedSampler(self.val, replicas, rank, shuffle=False) if replicas > 1 else None
        return self._loader(self.val, sampler=sampler)

    def _loader(self, dataset, **options) -> DataLoader:
        return DataLoader(
            dataset, self.batch_size, num_workers=self.num_workers, pin_memory=self.pin_memory, collate_fn=collate,
            persistent_workers=self.num_workers > 0, **options,
        )  # fmt: skip


def training_transform(size: int) -> Callable:
    """The papers' ImageNet augmentation: random resized crop (bilinear) and horizontal flip; PIL → [0, 1] tensor."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def evaluation_transform(size: int, crop_share: float = 224 / 256) -> Callable:
    """Short side to size / crop_share (256 for 224), central crop; PIL → [0, 1] tensor."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.Resize(round(size / crop_share), antialias=True),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


class _Resized:
    """Enlarges an image tensor to size × size (bilinear) after an optional random shift of up to `shift` pixels."""

    def __init__(self, size: int | None, shift: int = 0):
        self.size, self.shift = size, shift

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if self.shift:
            height, width = image.shape[-2:]
            top, left = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
            padded = F.pad(image[None], [self.shift] * 4, mode="replicate")[0]
            image = padded[:, top : top + height, left : left + width]
        if self.size is not None and tuple(image.shape[-2:]) != (self.size, self.size):
            image = F.interpolate(image[None], size=(self.size, self.size), mode="bilinear", antialias=True)[0]
        return image.clamp(0, 1)


def check_source(data, *, evaluation_only: bool = False, labelled: bool = True) -> None:
    """Raises FileNotFoundError unless `data` is a name in EMBEDDED or a folder laid out as `build_datamodule` needs,
    or without labels also shards.

    Quick: nothing in folder or shards is looked at.
    """
    root = Path(data)
    if is_shards(data):
        if labelled:
            raise ValueError(
                f"data: expected a folder of images with one sub-folder per class, got shards ({data}), which are read "
                "without labels: distill takes them"
            )
        split_shards(data, HELD_OUT_SHARE)
        return
    if str(data) in EMBEDDED:  # a folder of that name is ./digits: a run in it would hide the data that it was made of
        _import_sklearn()
    elif root.is_dir():
        missing = [] if evaluation_only or not labelled else [name for name in SPLITS if not (root / name).is_dir()]
        if missing:
            raise FileNotFoundError(
                f"data: expected {root}/train and {root}/val, each with one sub-folder per class; missing: "
                + ", ".join(f"{name}/" for name in missing)
            )
    else:
        names = ", ".join(EMBEDDED)
        shards = "" if labelled else ", or shards (*.tar)"
        near = did_you_mean(meant(str(data), EMBEDDED))
        raise FileNotFoundError(
            f"data: expected one of {names}, or a folder of images{shards}, got {str(data)!r}{near}"
        )


def build_datamodule(
    data, *, image_size: int | None = None, batch_size: int = 128, num_workers: int | None = None, seed: int = 0,
    augment: bool = True, train_transform: Callable | None = None, eval_transform: Callable | None = None,
    evaluation_only: bool = False, class_names: Sequence[str] | None = None, labelled: bool = True,
) -> ImageDataModule:  # fmt: skip
    """The data module for a name ("digits", "scenes"), for a folder of images, or for tar shards of images.

    Args:
        data: a name in EMBEDDED, or a folder with train/ and val/ (with evaluation_only: val/, or class folders); with
            labelled=False also shards: "FILE.tar", a pattern of such ("{00000..00331}.tar", "*.tar"), a folder with
            some in it or in its train/ and val/.
        image_size: edge in pixels; default: the data set's own (32, 64), 224 for folders.
        batch_size, num_workers, seed: as ImageDataModule.
        augment: folders: random resized crop and flip; `digits` and `scenes`: a random shift of up to 2 and 4 pixels.
        train_transform, eval_transform: replace the transforms of folders (PIL image → [0, 1] tensor).
        evaluation_only: no training part.
        class_names: with evaluation_only: the classes in the model's order, when it knows them.
        labelled: False: all images below the folder, or below its train/ and val/ where both are there, whatever their
            sub-folders; without the two, a twentieth of the images (of several shards: of these) is held out to
            validate on. Default True.

    Raises:
        FileNotFoundError, ValueError: no such name or folder, no classes, no images; see FolderImages.
    """
    options = dict(batch_size=batch_size, num_workers=num_workers, seed=seed, name=str(data), labelled=labelled)
    if str(data) in EMBEDDED:
        maker, shift = (digits, 2) if str(data) == "digits" else (scenes, 4)
        parts = []
        for split in SPLITS:
            part = maker(split)
            transform = _Resized(image_size, shift if split == "train" and augment else 0)
            parts.append(
                ImageTensors(
                    part.images, part.labels, part.class_names, boxes=part.boxes, source=part.source,
                    transform=transform,
                )
            )  # fmt: skip
        train, val = parts
        return ImageDataModule(None if evaluation_only else train, val, val.class_names, **options)

    root = Path(data)
    check_source(data, evaluation_only=evaluation_only, labelled=labelled)
    size = image_size or 224
    eval_transform = eval_transform or evaluation_transform(size)
    if evaluation_only:
        part = root / "val" if (root / "val").is_dir() else root
        numbering = None if class_names is None else {name: i for i, name in enumerate(class_names)}
        val = FolderImages(part, eval_transform, class_to_idx=numbering)
        return ImageDataModule(None, val, val.classes, **options)
    if train_transform is None:
        train_transform = training_transform(size) if augment else eval_transform
    if not labelled and is_shards(root):
        parts = split_shards(data, HELD_OUT_SHARE)
        train, val = (
            ShardImages(paths, transform, part=part, share=HELD_OUT_SHARE)
            for (paths, part), transform in zip(parts, (train_transform, eval_transform), strict=True)
        )
        return ImageDataModule(train, val, val.classes, **options)
    if not labelled:
        split = all((root / name).is_dir() for name in SPLITS)
        train, val = (
            ImageFiles(root / name if split else root, transform, part=None if split else name)
            for name, transform in zip(SPLITS, (train_transform, eval_transform), strict=True)
        )
        return ImageDataModule(train, val, val.classes, **options)
    train = FolderImages(root / "train", train_transform)
    val = FolderImages(root / "val", eval_transform, class_to_idx=train.class_to_idx)
    if val.empty_classes:
        warnings.warn(
            f"image folder {root / 'val'}: no readable image of {_shortened(val.empty_classes)}", stacklevel=2
        )
    return ImageDataModule(train, val, train.classes, **options)
