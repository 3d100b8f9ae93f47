"""Reading image files; needs Pillow alone."""

from __future__ import annotations

from bcosification.convert.preprocessing import eight_bits

__all__ = ["load_image"]


def load_image(path):
    """The file as a PIL image in RGB, 8 bits a channel; transparent pixels are laid on white.

    Raises:
        OSError: no such file, or not an image that can be decoded. ValueError: one of 32 bits a channel.
    """
    from PIL import Image

    with Image.open(path) as image:
        image = eight_bits(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
