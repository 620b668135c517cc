"""From the bytes of one image file to pixels; an image that cannot be read names the row that it came from."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from esper.leyline.errors import DataError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 2**26
"""Pixels of the largest image that is decoded (8,192 x 8,192); a small file can claim to hold far more."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""What is read; Pillow knows formats that start other programs."""

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Deeper images would be clipped in silence."""


def decode_image(data: bytes, where: str, resolution: int, *, resize: bool) -> tuple[Pixels, str]:
    """Return an image as RGB, uint8 [resolution, resolution, 3], and the name of its file format.

    The size that the file claims is checked before anything is decoded.

    Args:
        data: The bytes of the file.
        where: Names the image in errors.
        resolution: Height and width of the result, pixels.
        resize: Resize images of other sizes (bilinear, turned upright as the camera noted), instead of refusing them.

    Raises:
        DataError: The bytes are no image of a known format, are damaged, too large, deeper than 8 bits, or of
            another size where that is not allowed.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image, where, None if resize else resolution)
            file_format = str(image.format)
            upright = ImageOps.exif_transpose(image) if resize else image
            rgb = upright.convert("RGB")
        if resize:
            rgb = rgb.resize((resolution, resolution), Image.Resampling.BILINEAR)
        return np.asarray(rgb), file_format
    except DataError:
        raise
    except UnidentifiedImageError:  # its own message holds an address, another one in every run
        raise DataError(
            f"{where}: cannot be read as an image\n  expected: {', '.join(FORMATS)}; replace or remove it"
        ) from None
    except Image.DecompressionBombError:
        raise DataError(
            f"{where}: the image is too large\n  expected: at most {MAX_PIXELS:,} pixels in all; scale it down"
        ) from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise DataError(
            f"{where}: cannot be read as an image ({type(error).__name__}: {error})\n"
            f"  expected: {', '.join(FORMATS)}; replace or remove it"
        ) from None


def _check(image: Image.Image, where: str, exact: int | None) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{where}: the image has {width:,} x {height:,} pixels\n"
            f"  expected: at most {MAX_PIXELS:,} in all; scale it down"
        )
    if exact is not None and (width, height) != (exact, exact):
        raise DataError(f"{where}: the image has {width} x {height} pixels\n  expected: {exact} x {exact}")
    if image.mode not in EIGHT_BIT_MODES:
        raise DataError(f"{where}: image mode {image.mode!r}\n  expected: 8 bits a channel; convert it")
