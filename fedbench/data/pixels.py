"""Images made into what a model takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def resize(images: Tensor, processor: ImageProcessor) -> Tensor:
    """Images [B, C, H, W], uint8 or float -> [B, C, size, size] of the same type, with antialiasing."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    mode = InterpolationMode(processor.resample)
    return functional.resize(images, [processor.size, processor.size], interpolation=mode, antialias=True)


def to_pixels(images: Tensor, processor: ImageProcessor) -> Tensor:
    """Images [B, 1 or 3, H, W], uint8 or float in 0..1 -> what the model takes: float32 [B, C, size, size].

    Resized, scaled to 0..1 and normalised as the checkpoint's processor says; grey is repeated over the channels of a
    colour model, colour made grey for a model of one channel.
    """
    from torchvision.transforms.v2 import functional

    pixels = functional.to_dtype(resize(images, processor), torch.float32, scale=True)
    if pixels.shape[1] != processor.channels:
        if processor.channels == 1:
            pixels = functional.rgb_to_grayscale(pixels, num_output_channels=1)
        else:
            pixels = pixels.expand(-1, processor.channels, -1, -1)
    return functional.normalize(pixels, list(processor.mean), list(processor.std)).contiguous()


@dataclass(frozen=True)
class ImageProcessor:
    """What an image model expects: square images of `size` pixels, [channels, size, size], (x - mean) / std.

    resample: how images are brought to that size, as torchvision calls it.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int
    resample: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
