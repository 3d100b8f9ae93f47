"""Images that the commands read, and the files and folders that they write."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path


def output_folder(name: str) -> Path:
    from bcosification.train.run_folder import check_writable

    folder = Path(name)
    check_writable(folder)
    return folder


def output_file(option: str, name: str | None) -> Path | None:
    file = None if name is None else Path(name)
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise FileNotFoundError(f"{option}: expected a file in a folder that is there, got {file}")
    return file


def random_images(count: int, original, converted):
    """Pictures of random pixels as the converted model takes them, and as the original's own preprocessing makes them.

    The latter are None where the two crop or normalise otherwise: after fine-tuning on images of another size, or where
    --mean or --std were given.
    """
    import numpy
    import torch
    from PIL import Image

    from bcosification.convert.preprocessing import Preprocessing, own_transform

    wanted = Preprocessing.from_dict(converted.config)
    height, width = wanted.input_size or (224, 224)
    random = numpy.random.default_rng(0)
    shape = (round(1.25 * height), round(1.5 * width), 3)  # not square, and larger: what is resized and cropped shows
    pictures = [Image.fromarray(random.integers(0, 256, shape, dtype=numpy.uint8)) for _ in range(count)]
    images = torch.stack([converted.transform(picture) for picture in pictures])
    known = (getattr(original, "bcosification_source", None) or {}).get("preprocessing")
    own = own_transform(original)
    if own is None or dataclasses.replace(Preprocessing.from_dict(known), origin=wanted.origin) != wanted:
        return images, None
    return images, torch.stack([own(picture) for picture in pictures])


def image_files(names: Sequence[str]) -> list[tuple[Path, bool]]:
    """Files, and whether each was named itself; a folder stands for the images directly in it."""
    suffixes = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
    files = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in suffixes)
            if not inside:
                raise FileNotFoundError(f"IMAGE: expected images in the folder {path}, found none")
            files += [(entry, False) for entry in inside]
        elif path.is_file():
            files.append((path, True))
        else:
            raise FileNotFoundError(f"IMAGE: expected an image file or a folder, found neither at {path}")
    return files


def read_images(paths: Sequence[Path], model):
    from bcosification.train.image_files import load_image

    tensors, read, unreadable = [], [], []
    for path in paths:
        try:
            image = load_image(path)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # Pillow's decoders raise many types on broken files
            unreadable.append((path, error))
            continue
        tensors.append(model.transform(image))
        read.append(path)
    if not read:
        path, reason = unreadable[0]
        raise ValueError(f"IMAGE: expected images, but none of {len(paths)} can be read (first: {path}: {reason})")
    shapes = sorted({tuple(tensor.shape[-2:]) for tensor in tensors})
    if len(shapes) > 1:  # of models that tell no input size
        listed = ", ".join(f"{height} x {width}" for height, width in shapes)
        raise ValueError(f"IMAGE: expected images of one size, as the model has none of its own, got {listed}")
    return tensors, read, unreadable


def list_unreadable(unreadable: Sequence[tuple], of: int) -> None:
    if unreadable:
        print(f"left out, as {len(unreadable)} of {counted(of, 'image')} could not be read:", file=sys.stderr)
        for path, reason in unreadable:
            print(f"  {path}: {reason}", file=sys.stderr)


def distinct_names(stems: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    result = []
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
        candidate = stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"
        while candidate in result:
            candidate += "_"
        result.append(candidate)
    return result


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
