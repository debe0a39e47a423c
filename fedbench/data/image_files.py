"""Images as files or cells hold them, decoded to what they show.

What an image says about itself is respected, or the image is refused: how it was held, its colour profile, its
transparency, its bit depth, how many pictures it holds.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedbench.data.sources import cure, read_bytes
from fedbench.errors import FedbenchError

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageCms import ImageCmsTransform

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
"""What a file may hold, whatever its name: Pillow would hand some of its other formats to programs outside."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""What files of images are called: the list of torchvision's ImageFolder."""
GREY = ("1", "L", "LA")
COLOUR = ("RGB", "RGBA", "P", "PA", "YCbCr")
SRGB_GAMMA = 0.45455
UNMOVED = 2
"""A colour profile that moves no colour by more than this, of 255, is sRGB under some name."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The content of an image file that lies within another file; `where` names the two in messages."""

    where: str
    content: bytes


@dataclass(frozen=True)
class ImageFiles:
    """Encoded images (PNG, JPEG and so on), decoded when needed: `rows` of `source`, which holds contents or paths."""

    source: Sequence[EncodedImage | Path]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: np.ndarray) -> ImageFiles:
        return ImageFiles(self.source, self.rows[rows])

    def content(self, i: int) -> bytes:
        """The bytes of image `i`, as they are on disk. Raises FedbenchError where its file cannot be read."""
        return self._item(i)[1]

    def decode(self, i: int) -> np.ndarray:
        """Image `i` as it is meant to be seen, in sRGB, uint8 [H, W, 3].

        Raises FedbenchError, which names the image, for a damaged file and for one that says what is not supported.
        """
        from PIL import Image, UnidentifiedImageError

        where, content = self._item(i)
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return _seen(image, content)
        except _Refused as error:
            raise FedbenchError(f"{where}: {error}") from None
        except UnidentifiedImageError:
            reason = "its content is none of " + ", ".join(FORMATS)
        except Exception as error:  # a damaged file makes Pillow raise almost anything
            reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise FedbenchError(f"{where}: cannot be decoded as an image: {reason}; {cure(content)}")

    def _item(self, i: int) -> tuple[str, bytes]:
        """What image `i` is called in messages, and its bytes."""
        item = self.source[int(self.rows[i])]
        return (str(item), read_bytes(item)) if isinstance(item, Path) else (item.where, item.content)


class _Refused(Exception):
    """What an image says that is not supported, and the fix."""


def _seen(image: Image.Image, content: bytes) -> np.ndarray:
    """An opened image as it is meant to be seen: upright, in 8 bits, in sRGB and over white, [H, W, 3]."""
    from PIL import Image, ImageOps

    # The further pictures of a JPEG (MPO) are previews and depth maps of its first.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise _Refused(f"holds {getattr(image, 'n_frames', 'several')} pictures; keep one of them")
    if image.format == "PNG":
        _check_png(image, content)
    deep = image.mode.startswith("I")
    if deep:
        _check_deep(image)
    # TIFF drops its tag of orientation as it is loaded and turned, which Pillow does by itself.
    ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get("icc_profile")
    transparent = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    if deep:
        # The upper of two bytes, as Pillow itself keeps of 16-bit colour: 257 * v becomes v.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.mode not in (*GREY, *COLOUR, "CMYK"):
        raise _Refused(f"has pixels of Pillow's mode {image.mode}; save it in 8-bit grey or RGB")
    grey, alpha = image.mode in GREY, None
    if transparent:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema() == (0, 0):
            raise _Refused("is wholly transparent; remove its alpha channel or the image")
    if profile:
        image = _in_srgb(image, profile, grey)
    elif image.mode == "CMYK":
        raise _Refused("is CMYK without a colour profile, so its colours are not defined; convert it to sRGB")
    image = image.convert("RGB")
    if alpha is not None and alpha.getextrema() != (255, 255):
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        image = white
    return np.array(image)


def _check_png(image: Image.Image, content: bytes) -> None:
    """Refuse what a PNG can say and Pillow would not do."""
    gamma = image.info.get("gamma")
    said = image.info.get("icc_profile") or "srgb" in image.info
    if gamma is not None and not said and abs(gamma / SRGB_GAMMA - 1) > 0.05:
        raise _Refused(f"has gamma {gamma}, which is not sRGB's {SRGB_GAMMA}; convert it to sRGB")
    depth = content[24]  # in the header, which comes first in every PNG
    if "transparency" in image.info and image.mode in ("L", "RGB", "I", "I;16") and depth != 8:
        raise _Refused(f"has a transparent colour in {depth} bits, which Pillow reads wrongly; save it with 8 bits")


def _check_deep(image: Image.Image) -> None:
    """Refuse whole numbers that do not fill 16 bits: no scale is known for them."""
    from PIL.TiffImagePlugin import TiffImageFile

    bits, white_is_zero = 16, False
    if isinstance(image, TiffImageFile):
        bits, white_is_zero = image.tag_v2.get(258, (1,))[0], image.tag_v2.get(262) == 0
        if image.mode == "I":  # signed, or of 32 bits
            bits = 32
    if bits != 16 or white_is_zero:
        raise _Refused("has grey values other than 16 bits from black to white; save it with 8 bits")


def _in_srgb(image: Image.Image, profile: bytes, grey: bool) -> Image.Image:
    """The image in sRGB, from the colours of its own profile."""
    space, transform = _transform(profile)
    fits = {"RGB": image.mode != "CMYK", "GRAY": grey, "CMYK": image.mode == "CMYK"}
    if not fits.get(space):
        raise _Refused(f"has a colour profile for {space}, which its pixels are not; convert it to sRGB")
    if transform is None:
        return image
    from PIL import ImageCms

    converted = ImageCms.applyTransform(image.convert({"GRAY": "L"}.get(space, space)), transform)
    assert converted is not None, "not in place"
    return converted


@lru_cache(maxsize=32)
def _transform(profile: bytes) -> tuple[str, ImageCmsTransform | None]:
    """The colour space of a profile, and what takes its colours to sRGB; None where they are there already."""
    from PIL import Image, ImageCms

    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = str(own.profile.xcolor_space).strip()
        mode = {"GRAY": "L"}.get(space, space)
        if mode not in ("L", "RGB", "CMYK"):
            return space, None
        transform = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception as error:  # also where Pillow was built without its colour management
        reason = " ".join(str(error).split())[:160]
        raise _Refused(f"has a colour profile that cannot be used ({reason}); convert it to sRGB") from None
    if mode == "CMYK":
        return space, transform
    steps = np.linspace(0, 255, 16).astype(np.uint8)
    probe = steps[:, None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(64, 64, 3)
    colours = Image.fromarray(probe)
    found = ImageCms.applyTransform(colours, transform)
    moved = np.abs(np.asarray(found).astype(int) - np.asarray(colours.convert("RGB")).astype(int)).max()
    return space, transform if moved > UNMOVED else None
