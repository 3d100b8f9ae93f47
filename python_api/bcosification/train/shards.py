"""Images in tar shards, as WebDataset lays them out and img2dataset writes them: read where they lie, never unpacked.

A sample is the files of a shard that have one name up to its first point (000017.jpg, 000017.txt, 000017.json); of
these the image is read and the rest passed over. An index of where every image begins makes the shards one data set of
known length, so that the order of an epoch depends on (seed, epoch) alone: a run that is resumed sees what an
uninterrupted one sees. The order goes through the shards a few at a time, so that each is read while it is in memory.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from bcosification.train.image_files import load_image

__all__ = ["ShardImages", "is_shards", "shard_paths", "split_shards"]

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp"})
AT_ONCE = 4  # shards that are mixed; img2dataset's have 10,000 images each
SPLITS = ("train", "val")


def is_shards(data: str | os.PathLike) -> bool:
    """Whether ``data`` names shards: FILE.tar, a pattern of such (* and {0..9}), or a folder of them.

    A folder of shards, or its train/ and val/, has neither images nor folders beside them: archives of a data set often
    lie next to what was unpacked from them.
    """
    root = Path(data)
    if root.is_dir():
        return _holds_shards(root) or all(_holds_shards(root / name) for name in SPLITS)
    return str(data).endswith(".tar")


def _holds_shards(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    kinds = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            kind = "folder" if entry.is_dir() else entry.name.rpartition(".")[2].lower()
            if kind == "folder" or kind in EXTENSIONS:
                return False
            kinds.add(kind)
    return "tar" in kinds


def shard_paths(data: str | os.PathLike) -> list[str]:
    """The shards of a pattern ("cc3m/{00000..00331}.tar", "cc3m/*.tar") or of a folder, in order.

    Raises:
        FileNotFoundError: nothing fits, or a shard of a {...} is not there. ValueError: a pattern that cannot be
            expanded, or an address (shards are read from the file system). ModuleNotFoundError: braceexpand, which
            comes with webdataset, is missing.
    """
    text = str(data)
    if Path(data).is_dir():
        return sorted(str(path) for path in Path(data).glob("*.tar"))
    if "://" in text or text.startswith("pipe:"):
        raise ValueError(f"data: expected shards on the file system (*.tar), got the address {text!r}")
    patterns = [text]
    if "{" in text:
        try:
            import braceexpand
        except ImportError as error:
            raise ModuleNotFoundError(
                "data: patterns with {...} need braceexpand, which comes with webdataset: pip install "
                "'bcos-kernels[train]'"
            ) from error
        try:
            patterns = list(braceexpand.braceexpand(text))
        except braceexpand.UnbalancedBracesError as error:
            raise ValueError(f"data: expected a pattern such as 00{{00..31}}.tar, got {text!r}: {error}") from None
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
        if not found:
            raise FileNotFoundError(f"data: expected shards (*.tar), found none at {pattern!r}")
        paths += found
    return paths


def split_shards(data: str | os.PathLike, share: float) -> tuple[tuple[list[str], str | None], ...]:
    """Shards to train on and shards to validate on, each with the part of their images that counts (None: all).

    A folder with shards in train/ and val/ has these parts. Else a ``share`` of the shards is held out, at least one,
    the same for everyone; of a single shard, that share of its images.
    """
    root = Path(data)
    if root.is_dir() and not _holds_shards(root):
        train, val = (shard_paths(root / name) for name in SPLITS)
        return (train, None), (val, None)
    paths = shard_paths(data)
    if len(paths) == 1:
        return (paths, "train"), (paths, "val")
    order = np.random.default_rng(1797).permutation(len(paths))
    held_out = set(order[: max(1, round(len(paths) * share))].tolist())
    parts = [[path for i, path in enumerate(paths) if (i in held_out) == val] for val in (False, True)]
    return (parts[0], None), (parts[1], None)


class ShardImages(Dataset):
    """The images of tar shards, without labels (0 everywhere).

    Args:
        shards: paths of tar files (not compressed ones).
        transform: PIL image -> tensor.
        part: None (default): all images; "train", "val": one of two disjoint parts, of which "val" holds ``share`` of
            the images, at least one, the same for everyone.
        share: see part.

    Attributes:
        places: (images, 3) int64, the number of its shard, offset and size in bytes of every image.
        unreadable: list of (path, reason) of shards that are broken; what comes before the break is used.
        shards, classes, class_to_idx: the paths; one class, as an image folder would have it.

    An image that cannot be decoded is left out of its batch with a warning when it turns up.

    Raises:
        FileNotFoundError: no image in any shard. ValueError: no shard can be read.
    """

    def __init__(
        self, shards: Sequence[str], transform: Callable, *, part: str | None = None, share: float = 0.05
    ) -> None:
        self.transform = transform
        self.classes, self.class_to_idx, self.empty_classes = ["image"], {"image": 0}, []
        self.unreadable: list[tuple[str, str]] = []
        self.shards = list(shards)
        if len(self.shards) > 10:
            print(f"looking through {len(self.shards):,} shards for images …", flush=True)
        # number of the shard, offset and size in bytes: (images, 3)
        self.places = np.concatenate([self._images_of(number) for number in range(len(self.shards))])
        if not len(self.places):
            if len(self.unreadable) == len(self.shards):
                path, reason = self.unreadable[0]
                raise ValueError(f"data: expected tar shards, but none of {len(self.shards)} can be read (first: "
                                 f"{path}: {reason})")  # fmt: skip
            raise FileNotFoundError(
                f"data: expected images ({', '.join(sorted(EXTENSIONS))}) in {self.shards[0]} and "
                f"{len(self.shards) - 1} other shards, found none"
            )
        if part is not None:
            order = np.random.default_rng(1797).permutation(len(self.places))
            held_out = np.zeros(len(self.places), bool)
            held_out[order[: max(1, round(len(order) * share))]] = True
            self.places = self.places[held_out if part == "val" else ~held_out]
            if not len(self.places):
                raise FileNotFoundError(f"data: expected at least two images in {self.shards[0]}, found one")
        self._open: tuple[int, int, io.BufferedReader] | None = None  # process, shard, file

    def _images_of(self, number: int) -> np.ndarray:
        """Number, offset and size of every image in a shard."""
        path, found = self.shards[number], []
        try:
            for name, offset, size in _members(path):
                if os.path.basename(name).partition(".")[2].lower() in EXTENSIONS:
                    found.append((number, offset, size))
        except (OSError, tarfile.TarError, EOFError) as error:
            self.unreadable.append((path, f"{type(error).__name__}: {error}"))
        places = np.array(found, np.int64).reshape(-1, 3)
        end = os.path.getsize(path) if len(places) else 0
        return places[places[:, 1] + places[:, 2] <= end]  # not the one that a break goes through

    def __len__(self) -> int:
        return len(self.places)

    @functools.cached_property
    def contents(self) -> str:
        """A digest of the shards' names and of where their images are, wherever the shards lie."""
        names = "\n".join(os.path.basename(path) for path in self.shards)
        return hashlib.sha256(names.encode("utf-8", "surrogateescape") + self.places.tobytes()).hexdigest()

    def order(self, seed: Sequence[int]) -> np.ndarray:
        """All indices in the order of an epoch: shards at random, the images of a few shards mixed."""
        generator = np.random.default_rng(list(seed))
        of_shard = np.split(np.arange(len(self)), np.flatnonzero(np.diff(self.places[:, 0])) + 1)
        shards = generator.permutation(len(of_shard))
        groups = [shards[i : i + AT_ONCE] for i in range(0, len(shards), AT_ONCE)]
        return np.concatenate(
            [generator.permutation(np.concatenate([of_shard[number] for number in group])) for group in groups]
        )

    def _read(self, index: int) -> bytes:
        number, offset, size = self.places[index].tolist()
        process = os.getpid()  # a file that was opened before a fork shares its position with the other process
        if self._open is None or self._open[:2] != (process, number):
            if self._open is not None and self._open[0] == process:
                self._open[2].close()
            self._open = (process, number, open(self.shards[number], "rb"))
        file = self._open[2]
        file.seek(offset)
        return file.read(size)

    def __getitem__(self, index: int):
        try:
            image = load_image(io.BytesIO(self._read(index)))
        except (OSError, ValueError, SyntaxError) as error:
            number, offset, _ = self.places[index].tolist()
            warnings.warn(
                f"image at byte {offset} of {self.shards[number]} cannot be read and is left out: {error}",
                stacklevel=2,
            )
            return None
        return self.transform(image), 0

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": None}


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file in a tar archive.

    Plain headers are read here, four times as fast as tarfile makes objects of them; from the first other one on (long
    names, sizes from 8 GiB) tarfile goes on.

    Raises:
        OSError, tarfile.ReadError: no archive, or a broken one. EOFError: one that ends before its end mark.
    """
    block = tarfile.BLOCKSIZE
    offset = 0
    with open(path, "rb") as archive:
        while True:
            archive.seek(offset)
            header = archive.read(block)
            if len(header) < block:
                raise EOFError("it ends before the end of its archive")
            if not any(header):
                return
            kind, octal = header[156:157], header[124:136].strip(b" \0")
            if kind not in (b"0", b"\0", b"5") or not octal.isdigit():
                break
            # The sum counts its own field as eight spaces.
            total = sum(header) - sum(header[148:156]) + 8 * 32
            if total != int(header[148:156].strip(b" \0") or b"0", 8):
                raise tarfile.ReadError(f"expected a tar header at byte {offset}, got something else")
            size = int(octal, 8)
            if kind != b"5":
                yield header[:100].rstrip(b"\0").decode("utf-8", "surrogateescape"), offset + block, size
            offset += block + -(-size // block) * block
        archive.seek(offset)
        with tarfile.open(fileobj=archive, mode="r:") as rest:
            while (member := rest.next()) is not None:
                rest.members.clear()  # it would keep every header
                if member.isreg():
                    yield member.name, member.offset_data, member.size
            if os.path.getsize(path) < rest.offset + block:
                raise EOFError("it ends before the end of its archive")
