"""Images of more than 8 bits, and the order in which pixels are read."""

import io
import re
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from starfire_prune.data import DataError
from starfire_prune.data.decode import decode_image

RAMP = np.linspace(0, 1, 24).reshape(4, 6)
BYTES = np.rint(255 * RAMP)


def encoded(pixels: Any, suffix: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix, **options)
    file.seek(0)
    return file


def tiff(
    pixels: bytes, bits: int, *, big: bool = False, photometric: int = 1, sample_format: int = 1
) -> io.BytesIO:
    """An uncompressed TIFF file of 4 x 6 pixels, written by hand, as Pillow writes few kinds."""
    order, start = (">", b"MM\0*") if big else ("<", b"II*\0")
    size = [(256, 6), (257, 4), (278, 4), (279, len(pixels)), (273, 10 + 12 * 10 + 4)]
    form = [(258, bits), (259, 1), (262, photometric), (277, 1), (339, sample_format)]
    entries = b"".join(
        struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in sorted(size + form)
    )
    header = start + struct.pack(f"{order}IH", 8, len(size + form))
    return io.BytesIO(header + entries + bytes(4) + pixels)


def packed_12_bit(values: Any) -> bytes:
    """Two pixels in three bytes, a row of six pixels in nine."""
    pairs = values.reshape(-1, 2)
    return b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in pairs)


def scaled(largest: int, dtype: Any) -> Any:
    return np.rint(largest * RAMP).astype(dtype)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(encoded(scaled(65535, np.uint16), "png"), id="png of 16 bits"),
        pytest.param(encoded(scaled(65535, np.uint16), "tiff"), id="tiff of 16 bits"),
        pytest.param(encoded(scaled(65535, np.uint16), "ppm"), id="pgm of 16 bits"),
        pytest.param(tiff(scaled(65535, ">u2").tobytes(), 16, big=True), id="big-endian tiff"),
        pytest.param(tiff(packed_12_bit(scaled(4095, int)), 12), id="tiff of 12 bits"),
        pytest.param(
            tiff(scaled(65535, "<u2")[::-1, ::-1].tobytes(), 16, photometric=0), id="white is zero"
        ),
        pytest.param(encoded(RAMP.astype(np.float32), "tiff"), id="float tiff"),
        pytest.param(
            tiff(RAMP.astype(">f4").tobytes(), 32, big=True, sample_format=3),
            id="big-endian float tiff",
        ),
    ],
)
def test_greyscale_of_more_than_8_bits_keeps_its_brightness(file):
    file.seek(0)
    pixels = np.asarray(decode_image(file, "it"))
    assert pixels.shape == (4, 6, 3)
    assert np.abs(pixels - BYTES[..., None]).max() <= 1


@pytest.mark.parametrize("form", ["png", "tiff"])
def test_16_bits_are_divided_by_257(form):
    exact = np.arange(0, 256, dtype=np.uint16).reshape(16, 16) * 257
    pixels = np.asarray(decode_image(encoded(exact, form), "it"))
    assert (pixels[..., 0] == np.arange(256).reshape(16, 16)).all()


def test_a_png_of_16_bits_in_the_mode_of_old_pillow_is_divided_too(monkeypatch):
    file = encoded(scaled(65535, np.uint16), "png")
    wide = Image.fromarray(scaled(65535, np.int32))
    assert wide.mode == "I"
    wide.format = "PNG"
    monkeypatch.setattr(Image, "open", lambda _: wide)
    assert np.abs(np.asarray(decode_image(file, "it")) - BYTES[..., None]).max() <= 1


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(encoded(scaled(65535, np.int32), "tiff"), id="signed of 32 bits"),
        pytest.param(tiff(scaled(2**32 - 1, "<u4").tobytes(), 32), id="unsigned of 32 bits"),
        pytest.param(tiff(scaled(3000, "<i2").tobytes(), 16, sample_format=2), id="signed of 16"),
    ],
)
def test_integers_of_unknown_range_are_refused(file):
    file.seek(0)
    message = (
        "cannot decode scan.tif: the range of its signed or 32-bit integer pixels is unknown; save "
        "it with 8 or 16 bits, unsigned"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        decode_image(file, "scan.tif")


@pytest.mark.parametrize(
    ("pixels", "shown"),
    [(255 * RAMP, "from 0 to 255"), (RAMP - 0.5, "from -0.5 to 0.5"), (RAMP * np.nan, "to nan")],
)
def test_floats_beyond_0_and_1_are_refused_with_their_range(pixels, shown):
    file = encoded(pixels.astype(np.float32), "tiff")
    with pytest.raises(DataError, match=f"cannot decode scan.tif: its float pixels .*{shown}"):
        decode_image(file, "scan.tif")


def test_an_orientation_in_exif_data_has_no_effect():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    assert decode_image(encoded(np.zeros((4, 6), np.uint8), "jpeg", exif=exif), "it").size == (6, 4)
