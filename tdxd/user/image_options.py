"""How an image becomes numbers; apart from the code that does it, so that `--help` is quick."""

from __future__ import annotations

import dataclasses

__all__ = ["FITS", "PIXELS", "SUFFIXES", "ImageOptions"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
FITS = ("crop", "pad", "stretch")
PIXELS = ("raw", "unit", "signed", "torch", "caffe")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """Which part of an image, which size, which scale.

    `fit`: `crop` cuts what sticks out around the middle, `pad` adds black, `stretch` distorts.
    `size` is (width, height); None: what the model says. `pixels`: `raw` 0 to 255, `unit` 0 to 1,
    `signed` -1 to 1; `torch` and `caffe` are ImageNet's means and deviations, the latter for blue,
    green, red.
    """

    fit: str = "crop"
    pixels: str = "raw"
    size: tuple[int, int] | None = None
