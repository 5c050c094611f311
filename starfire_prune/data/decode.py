"""Decoding of images to RGB with 8 bits per channel, also of those with more bits."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from starfire_prune.data.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL import Image

__all__ = ["decode_image", "rgb_image"]


_MAX_16_BIT: Final = 2**16 - 1
# Formats whose mode I holds 16 bits: Pillow has no other mode for them, or had none in the past
_INTEGERS_OF_16_BIT: Final = ("PNG", "PPM")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_WHITE_IS_ZERO: Final = 0


def decode_image(file: str | IO[bytes], name: str) -> Image.Image:
    """Decode an image to RGB.

    Pixels of 16 bits are divided by 257, and float pixels in [0, 1] are multiplied by 255. The
    pixels are returned in the order in which the file stores them: as in timm and torchvision, an
    orientation in EXIF data has no effect.

    Args:
        file: Path of the image, or a file that is open for reading.
        name: Name of the image in errors.

    Returns:
        Pillow's image, completely read.

    Raises:
        DataError: If the file can't be read, is not a complete image, or has pixels whose range is
            unknown.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            return rgb_image(image, name)
    except DataError:
        raise
    # The errors that Pillow raises for damaged files of the various formats
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # not from the decoder
            raise DataError(f"cannot read {name}: {error.strerror}") from error
        raise DataError(
            f"cannot decode {name}: the file is truncated or not an image; replace or delete it"
        ) from error


def rgb_image(image: Image.Image, name: str) -> Image.Image:
    """Convert an image that Pillow has opened to RGB; Pillow itself would clip values above 255.

    Args:
        image: The image, in any mode.
        name: Name of the image in errors.

    Raises:
        DataError: If the range of its pixels is unknown.
    """
    from PIL import Image

    image.load()
    if image.mode == "F":
        shares = _shares_of_floats(image, name)
    elif image.mode == "I" or image.mode.startswith("I;16"):
        shares = np.asarray(image) / _largest_integer(image, name)
    else:
        return image.convert("RGB")
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        shares = 1 - shares
    return Image.fromarray(np.rint(255 * shares).astype(np.uint8)).convert("RGB")


def _shares_of_floats(image: Image.Image, name: str) -> npt.NDArray[Any]:
    pixels = np.asarray(image, np.float64)
    if not ((pixels >= 0) & (pixels <= 1)).all():  # false for NaN, too
        raise DataError(
            f"cannot decode {name}: its float pixels range from {pixels.min():.4g} to "
            f"{pixels.max():.4g} instead of from 0 to 1; divide them by their largest possible "
            f"value, or save it with 8 or 16 bits"
        )
    return pixels


def _largest_integer(image: Image.Image, name: str) -> int:
    """The pixel value that means white."""
    if image.mode == "I" and image.format not in _INTEGERS_OF_16_BIT:
        raise DataError(
            f"cannot decode {name}: the range of its signed or 32-bit integer pixels is unknown; "
            f"save it with 8 or 16 bits, unsigned"
        )
    bits = _tag(image, _BITS_PER_SAMPLE)
    return 2 ** int(bits[0]) - 1 if bits else _MAX_16_BIT


def _tag(image: Image.Image, number: int) -> Any:
    """The value of a tag if the image is a TIFF file, which may hold 12 bits per pixel."""
    return getattr(image, "tag_v2", {}).get(number)
