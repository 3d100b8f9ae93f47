"""Reading image files; needs Pillow alone."""

from __future__ import annotations

__all__ = ["load_image"]


def load_image(path):
    """The file as a PIL image in RGB; transparent pixels are laid on white.

    Raises:
        OSError: no such file, or not an image that can be decoded.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
