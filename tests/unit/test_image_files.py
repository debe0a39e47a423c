"""What an image says about itself: respected, or refused in one line that names the image."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from torchvision.datasets.folder import IMG_EXTENSIONS

from fedbench.data.image_files import SUFFIXES, EncodedImage, ImageFiles
from fedbench.errors import FedbenchError

RANDOM = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def decode(content: bytes) -> np.ndarray:
    return ImageFiles([EncodedImage("train.parquet: row 7", content)], np.array([0])).decode(0)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these header fields and raw rows, each row with its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def grey_as_rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def test_the_suffixes_are_those_of_torchvision() -> None:
    assert set(SUFFIXES) == set(IMG_EXTENSIONS)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM"])
def test_grey_of_16_bits_is_scaled_to_8(kind: str) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    expected = grey_as_rgb((values >> 8).astype(np.uint8))
    assert np.array_equal(expected[..., 0].ravel(), np.arange(256)), "257 * v is v"
    pgm = b"P5 16 16 65535\n" + values.astype(">u2").tobytes()
    assert np.array_equal(decode(pgm if kind == "PGM" else encoded(values, kind)), expected)


def test_grey_and_colour_of_16_bits_are_scaled_alike() -> None:
    values = np.random.default_rng(1).integers(0, 65536, (5, 5), dtype=np.uint16)
    grey = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    colour = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    assert np.array_equal(decode(png(5, 5, 16, 0, grey)), decode(png(5, 5, 16, 2, colour)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_seen_as_they_were_held(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255
    upright[8:, 16:] = 128
    # What the camera stores, from EXIF's definition of the position of row 0 and column 0.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(np.ascontiguousarray(stored), kind, exif=exif))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() < 40, "but for what JPEG loses"


def test_transparency_is_laid_over_white() -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = 255, 102, 0
    expected = grey_as_rgb(np.array([[0, 153, 255]], dtype=np.uint8))
    assert np.array_equal(decode(encoded(rgba)), expected)
    assert np.array_equal(decode(encoded(rgba[..., 2:])), expected), "grey with alpha"
    opaque = np.dstack([RANDOM, np.full(RANDOM.shape[:2], 255, dtype=np.uint8)])
    assert np.array_equal(decode(encoded(opaque)), RANDOM), "an alpha channel that hides nothing changes nothing"


def test_a_transparent_colour_is_laid_over_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    expected = [[[255, 255, 255], [40, 50, 60]]]
    assert decode(encoded(palette, transparency=0)).tolist() == expected
    assert decode(encoded(palette, "GIF", transparency=0)).tolist() == expected
    assert decode(encoded(palette)).tolist() == [[[10, 20, 30], [40, 50, 60]]], "a palette alone hides nothing"
    rgb = np.array(expected, dtype=np.uint8)
    rgb[0, 0] = 1, 2, 3
    assert decode(encoded(rgb, transparency=(1, 2, 3))).tolist() == expected


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def crossed() -> bytes:
    """sRGB with its red and green exchanged."""
    return srgb().replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A minimal ICC profile (version 2) of these tags."""
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    tags = {b"wtpt": white, **tags}
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", 132 + 12 * len(tags) + len(data), b"lcms", 0x02100000, b"scnr", space, connection)
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + data


def linear_grey() -> bytes:
    return profile(b"GRAY", b"XYZ ", {b"kTRC": b"curv\0\0\0\0\0\0\0\0"})


def inks() -> bytes:
    """CMYK in which no ink is white and all of any ink is black."""
    identity = bytes(range(256))
    lab = b"".join(bytes([255 if i == 0 else 0, 128, 128]) for i in range(16))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + lab + identity * 3
    return profile(b"CMYK", b"Lab ", {b"A2B0": table})


def test_colours_of_another_profile_become_srgb() -> None:
    image = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)
    found = decode(encoded(image, icc_profile=crossed())).astype(int)
    assert np.abs(found - [[[0, 255, 0], [255, 0, 0], [0, 0, 255]]]).max() <= 1
    half = np.dstack([image, np.array([[255, 255, 0]], dtype=np.uint8)])
    found = decode(encoded(half, icc_profile=crossed())).astype(int)
    assert np.abs(found - [[[0, 255, 0], [255, 0, 0], [255, 255, 255]]]).max() <= 1, "white is no colour of the image's"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_profile_of_srgb_changes_no_value(kind: str) -> None:
    assert np.array_equal(decode(encoded(RANDOM, kind, icc_profile=srgb(), lossless=True)), RANDOM)


def test_grey_has_profiles_too() -> None:
    values = np.array([[0, 55, 128, 255]], dtype=np.uint8)
    found = decode(encoded(values, icc_profile=linear_grey()))
    # The curve of sRGB at 55 / 255 and 128 / 255 of full light.
    assert np.abs(found[0, :, 0].astype(int) - [0, 128, 188, 255]).max() <= 1
    assert np.array_equal(decode(encoded(values, icc_profile=srgb())), grey_as_rgb(values)), "as a scanner writes it"


def test_cmyk_needs_its_profile() -> None:
    image = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8), "CMYK")
    found = decode(encoded(image, "TIFF", icc_profile=inks()))
    assert np.abs(found.astype(int) - [[[255] * 3, [0] * 3]]).max() <= 1
    for kind in ("JPEG", "TIFF"):
        with pytest.raises(FedbenchError, match="row 7: is CMYK without a colour profile.*; convert it to sRGB"):
            decode(encoded(image, kind))


def frames(kind: str) -> bytes:
    more = [Image.fromarray(255 - RANDOM)]
    return encoded(RANDOM, kind, save_all=True, append_images=more)


def test_a_preview_beside_a_photograph_is_left_alone() -> None:
    content = frames("MPO")
    assert Image.open(io.BytesIO(content)).n_frames == 2  # type: ignore[attr-defined]
    assert np.array_equal(decode(content), np.asarray(Image.open(io.BytesIO(content))))


SHORT = png(2, 2, 8, 0, b"\0\1\2\0\3\4")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (frames("GIF"), "holds 2 pictures; keep one of them"),
        (frames("TIFF"), "holds 2 pictures; keep one of them"),
        (frames("PNG"), "holds 2 pictures; keep one of them"),
        (encoded(np.zeros((2, 2), dtype=np.float32), "TIFF"), "mode F; save it in 8-bit grey or RGB"),
        (encoded(np.zeros((2, 2), dtype=np.int32), "TIFF"), "grey values other than 16 bits"),
        (encoded(np.zeros((2, 2, 4), dtype=np.uint8)), "is wholly transparent"),
        (encoded(RANDOM, icc_profile=b"no profile"), "has a colour profile that cannot be used"),
        (encoded(RANDOM, icc_profile=linear_grey()), "has a colour profile for GRAY, which its pixels are not"),
        (encoded(RANDOM, icc_profile=inks()), "has a colour profile for CMYK, which its pixels are not"),
        (png(1, 1, 16, 0, b"\0\0\1", (b"tRNS", b"\0\1")), "has a transparent colour in 16 bits"),
        (png(1, 1, 16, 2, b"\0\0\1\0\1\0\1", (b"tRNS", b"\0\1\0\1\0\1")), "has a transparent colour in 16 bits"),
        (png(1, 1, 4, 0, b"\0\xf0", (b"tRNS", b"\0\x0f")), "has a transparent colour in 4 bits"),
        (png(1, 1, 8, 0, b"\0\1", (b"gAMA", struct.pack(">I", 100000))), "has gamma 1.0, which is not sRGB's 0.45455"),
        (SHORT[:20], "cannot be decoded as an image: .*; fetch it again"),
        (SHORT[:45], "cannot be decoded as an image: .*; fetch it again"),
        (SHORT[:41] + b"\xff" * 8 + SHORT[49:], "cannot be decoded as an image: .*; fetch it again"),
        (encoded(RANDOM, "JPEG")[:400], "cannot be decoded as an image: .*; fetch it again"),
        (png(30000, 30000, 8, 2, b"0"), "cannot be decoded as an image: .*900000000 pixels"),
        (b"", "cannot be decoded as an image: its content is none of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "its content is none of PNG, JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a pointer of git-lfs; run git lfs pull"),
        (b"<!DOCTYPE html><html>", "it is a web page; fetch the file itself"),
        (zlib.compress(b"x", wbits=31), "it is packed with gzip; unpack it"),
    ],
)
def test_what_cannot_be_seen_is_refused_by_name(content: bytes, says: str) -> None:
    with pytest.raises(FedbenchError, match=f"^train.parquet: row 7: .*{says}") as caught:
        decode(content)
    assert "\n" not in str(caught.value)


def test_gamma_that_srgb_has_or_a_profile_overrules_is_no_matter() -> None:
    row = b"\0\1\2"
    plain = decode(png(2, 1, 8, 0, row))
    for chunks in (
        [(b"gAMA", struct.pack(">I", 45455))],
        [(b"gAMA", struct.pack(">I", 55556)), (b"sRGB", b"\0")],
        [(b"gAMA", struct.pack(">I", 55556)), (b"iCCP", b"p\0\0" + zlib.compress(srgb()))],
    ):
        assert np.array_equal(decode(png(2, 1, 8, 0, row, *chunks)), plain)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    files = ImageFiles([tmp_path / "gone.png"], np.array([0]))
    for read in (files.decode, files.content):
        with pytest.raises(FedbenchError, match=r"gone\.png: cannot be read: No such file"):
            read(0)
