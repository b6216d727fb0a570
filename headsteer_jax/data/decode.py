"""Encoded images: which files can be read, whether an image is intact, and its pixels in upright orientation.

Pillow reads everything. An error is one line that names the image.
"""

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from headsteer_jax.data.names import normalise_name
from headsteer_jax.errors import HeadSteerError, explain_errors

# Formats that Pillow registers but that hold no picture, or whose pixels need another program.
NO_PICTURES = frozenset(("BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"))

# What makes an image upright, by its EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Many published photographs have damaged metadata but intact pixels, so this warning is of no use.
warnings.filterwarnings("ignore", "(?i).*corrupt exif data", UserWarning)

END_OF_JPEG = b"\xff\xd9"
TAIL_BYTES = 1024  # at the end of a JPEG, searched for END_OF_JPEG: some cameras and sites append a few bytes

REMEDY = "replace or remove it"


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of the image files that the installed Pillow reads, in lower case."""
    extensions = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in extensions.items() if kind in Image.OPEN and kind not in NO_PICTURES)


@contextmanager
def open_image(file: str | Path | bytes, culprit: str) -> Iterator[Image.Image]:
    """Open an image without decoding it; errors in the body of the context are explained too.

    Args:
      file: a path, or a file's content.
      culprit: the image's name in errors.

    Raises:
      HeadSteerError: it is not an image, or its pixels do not have 8 bits.
    """
    with explain_errors(normalise_name(culprit), REMEDY):
        try:
            image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        except UnidentifiedImageError:
            raise HeadSteerError(f"{normalise_name(culprit)}: {_describe_content(file)}; {REMEDY}") from None
        with image:
            if image.mode[0] in "IF":  # Pillow would clip these to 8 bits, not scale them
                raise HeadSteerError(
                    f"{normalise_name(culprit)}: its pixels do not have 8 bits (mode {image.mode}); convert it"
                )
            yield image


def _describe_content(file: str | Path | bytes) -> str:
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    if not content:
        return "an empty file, not an image"
    if content.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not an image (git lfs pull fetches the images)"
    return f"not an image that Pillow can read ({len(content)} bytes)"


def decode_image(file: str | Path | bytes, culprit: str, shape: tuple[int, int, int], fit: bool) -> np.ndarray:
    """Decode an image -> [height, width, channels] uint8, upright.

    Only the first image of an animation or of a file with several pages is read. Transparency is dropped.

    Args:
      file: a path, or a file's content.
      culprit: the image's name in errors.
      shape: (height, width, channels). Grey images are repeated to 3 channels, colours become luma in 1 channel.
      fit: crop the centre and resize (bicubic) to this shape; otherwise an image of another size is an error.

    Raises:
      HeadSteerError: the image cannot be decoded, its pixels do not have 8 bits, or it has another size.
    """
    height, width, channels = shape
    with open_image(file, culprit) as image:
        image.load()
        method = UPRIGHT.get(read_orientation(image))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # otherwise Pillow warns on standard error
        pixels = image.convert("L" if channels == 1 else "RGB")
        if method is not None:
            pixels = pixels.transpose(method)
        if fit:
            pixels = ImageOps.fit(pixels, (width, height), Image.Resampling.BICUBIC)
        if pixels.size != (width, height):
            raise HeadSteerError(
                f"{normalise_name(culprit)}: {pixels.width}x{pixels.height} pixels, not {width}x{height}; correct it"
            )
        return np.asarray(pixels).reshape(shape)


def read_orientation(image: Image.Image) -> int:
    """Return an image's EXIF orientation, 1 to 8; 1 (upright) if there is none or the metadata are damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many kinds of errors for damaged metadata; the pixels may be intact
        return 1


def read_size(path: str | Path) -> tuple[int, int]:
    """Return the (width, height) of an upright image file, from its header if that is enough.

    Raises:
      HeadSteerError: it is not an image, or its pixels do not have 8 bits.
    """
    with open_image(path, str(path)) as image:
        if image.width == image.height:
            return image.size
        if image.format == "PNG" and not _has_metadata(path):
            return image.size  # Pillow would decode it to look for metadata
        if image.format in ("PNG", "TIFF"):
            image.load()
        size = image.size
        return size[::-1] if read_orientation(image) >= 5 else size


def _has_metadata(path: str | Path) -> bool:
    """Say whether a PNG has EXIF metadata, which may come after its pixels."""
    with open(path, "rb") as file:
        file.seek(8)  # the signature
        while len(header := file.read(8)) == 8:  # each chunk: length, type, content, checksum
            if header[4:] == b"eXIf":
                return True
            file.seek(int.from_bytes(header[:4]) + 4, io.SEEK_CUR)
    return False


def verify_image(file: str | Path | bytes, culprit: str) -> None:
    """Check that an image is intact, as cheaply as its format allows.

    A PNG's chunks must have the right checksums, and a JPEG its end marker. A JPEG without one, or an image of another
    format, is decoded.

    Raises:
      HeadSteerError: it is not an image, it is truncated or damaged, or its pixels do not have 8 bits.
    """
    with open_image(file, culprit) as image:
        if image.format in ("JPEG", "MPO") and END_OF_JPEG in _read_tail(file):
            return
        if image.format == "PNG":
            image.verify()
        else:
            image.load()


def _read_tail(file: str | Path | bytes) -> bytes:
    if isinstance(file, bytes):
        return file[-TAIL_BYTES:]
    with open(file, "rb") as opened:
        opened.seek(max(0, opened.seek(0, io.SEEK_END) - TAIL_BYTES))
        return opened.read()
