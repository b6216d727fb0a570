"""Encoded images: upright, in every mode, and one line for each that is broken."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headsteer_jax.config import DataConfig
from headsteer_jax.data.decode import decode_image, read_size, verify_image
from headsteer_jax.data.sources import load_dataset
from headsteer_jax.errors import HeadSteerError

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)  # not square, and no symmetry

# What a viewer does with each EXIF orientation, from the definition of row 0 and column 0 in the EXIF standard.
VIEWED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x[::-1].transpose(1, 0, 2),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x[:, ::-1].transpose(1, 0, 2),
}


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(kind: str, orientation: int, image: np.ndarray = PICTURE) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    return encode(Image.fromarray(image), kind, exif=exif, **options)


def move_exif_to_the_end(content: bytes) -> bytes:
    """Move a PNG's chunk eXIf behind its pixels, where exiftool writes it."""
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4])
    iend = content.index(b"IEND") - 4
    return content[:start] + content[end:iend] + content[start:end] + content[iend:]


@pytest.mark.parametrize("orientation", VIEWED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "late PNG", "TIFF", "WEBP"])
def test_images_are_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    content = oriented(kind.split()[-1], orientation)
    if kind == "late PNG":
        content = move_exif_to_the_end(content)
    path, expected = tmp_path / "x.img", VIEWED[orientation](PICTURE)
    path.write_bytes(content)
    assert read_size(path) == expected.shape[1::-1]
    for file in (path, content):
        found = decode_image(file, "x", expected.shape, fit=False)
        np.testing.assert_allclose(found, expected, atol=6 if kind == "JPEG" else 0)


def test_a_set_of_phone_pictures_has_one_size(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number, orientation in enumerate((1, 3, 6)):
                stored = VIEWED[{6: 8}.get(orientation, orientation)](PICTURE)  # 6 undoes 8
                (tmp_path / split / name / f"{number}.png").write_bytes(oriented("PNG", orientation, stored))
    dataset = load_dataset(DataConfig(source="folder", path=str(tmp_path), channels=3, mean=(0,) * 3, std=(1,) * 3), 0)
    np.testing.assert_array_equal(dataset.test.images, np.stack([PICTURE] * 6))


def test_damaged_metadata_do_not_matter(tmp_path: Path) -> None:
    content = encode(Image.fromarray(PICTURE), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    np.testing.assert_array_equal(decode_image(content, "x", PICTURE.shape, fit=False), PICTURE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "transparent P"])
def test_every_mode_of_eight_bits_is_decoded(mode: str) -> None:
    """A grey ramp, whose pixels are the same numbers in all modes; a 1-bit image keeps black and white."""
    ramp = np.repeat(np.arange(0, 256, 5, dtype=np.uint8)[None], 4, axis=0)
    grey = Image.fromarray(ramp if mode != "1" else np.where(ramp > 127, 255, 0).astype(np.uint8))
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    image = grey.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "RGBA") else grey
    if mode.endswith("P"):
        image = grey.convert("P")
        if mode == "transparent P":
            image.info["transparency"] = bytes(range(256))
    elif mode in ("LA", "1"):
        image = grey.convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for channels in (1, 3):
            found = decode_image(encode(image, kind), "x", (*ramp.shape, channels), fit=False)
            np.testing.assert_allclose(found, np.asarray(grey)[..., None].repeat(channels, 2), atol=1)


DEEP = {
    "png": encode(Image.fromarray(np.full((4, 4), 40000, np.uint16)), "PNG"),
    "tiff": encode(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"),
}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file, not an image"),
        (b"<html>not found</html>", "not an image that Pillow can read (22 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
        (DEEP["png"], "its pixels do not have 8 bits (mode I;16)"),
        (DEEP["tiff"], "its pixels do not have 8 bits (mode F)"),
        (encode(Image.fromarray(PICTURE), "PNG")[:100], "x.img"),
        (encode(Image.fromarray(PICTURE), "JPEG")[:-20], "truncated"),
        (encode(Image.fromarray(PICTURE), "BMP")[:-20], "truncated"),
    ],
)
def test_broken_images_are_named(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(content)
    for file in (path, content):
        for read in (
            lambda file=file: decode_image(file, str(path), (6, 9, 3), True),
            lambda file=file: verify_image(file, str(path)),
        ):
            with pytest.raises(HeadSteerError) as error:
                read()
            assert str(error.value).startswith(f"{path}: ")
            assert len(str(error.value).splitlines()) == 1
            assert says in str(error.value)


def test_a_decompression_bomb_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(HeadSteerError, match=r"^huge\.png: .*decompression bomb"):
        decode_image(encode(Image.fromarray(PICTURE), "PNG"), "huge.png", (6, 9, 3), fit=True)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_whole_images_are_verified(kind: str, tmp_path: Path) -> None:
    content = encode(Image.fromarray(PICTURE), kind)
    (tmp_path / "x").write_bytes(content)
    verify_image(tmp_path / "x", "x")
    verify_image(content, "x")
    verify_image(content + bytes(100), "x")  # what a camera appends


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_what_is_verified_is_not_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(Image.fromarray(PICTURE), kind)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    verify_image(content, "x")


def test_a_flipped_bit_of_a_png_is_found() -> None:
    content = bytearray(encode(Image.fromarray(PICTURE), "PNG"))
    content[content.index(b"IDAT") + 30] ^= 4
    with pytest.raises(HeadSteerError, match=r"^x: "):
        verify_image(bytes(content), "x")
