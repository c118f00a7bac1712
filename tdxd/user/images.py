"""Images as the tensors that a model takes, by what its metadata says of the input.

What no metadata says is how the model's author scaled pixels: `pixels` names the ways in use.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from tdxd.core.tensors import DT_STRING, numpy_dtype
from tdxd.errors import DataError, HostError, UsageError
from tdxd.user.image_options import PIXELS, ImageOptions
from tdxd.user.signature import Shape, TensorSpec, shape_text

__all__ = ["Images"]

Array = npt.NDArray[Any]

# Source: keras.applications.imagenet_utils.preprocess_input, modes "torch" and "caffe".
_TORCH_MEAN, _TORCH_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)
_MODES: Mapping[int, str] = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Image files for one input, each a row of the batch."""

    paths: tuple[str, ...]
    options: ImageOptions

    def array(self, spec: TensorSpec) -> Array:
        """Return the images as the input's type and shape; encoded files for text.

        Raises: HostError, DataError for what is no image or does not fit, UsageError.
        """
        if spec.dtype == DT_STRING:
            return self._encoded(spec)
        layout = _layout(spec)
        size = self.options.size or layout.size
        rows = [self._row(path, layout, size) for path in self.paths]
        shapes = {row.shape for row in rows}
        if len(shapes) > 1:
            text = f"input {spec.name}: images of several sizes"
            raise UsageError(text, hint="--size WIDTHxHEIGHT makes them equal")
        if layout.batched:
            return self._typed(np.stack(rows), spec)
        if len(rows) > 1:
            text = f"input {spec.name} ({spec}) takes one image, {len(rows)} are given"
            raise DataError(text)
        return self._typed(rows[0], spec)

    def _encoded(self, spec: TensorSpec) -> Array:
        """Return whole files: a model that takes text decodes them itself."""
        made = np.empty(len(self.paths), object)
        made[:] = [_read(path) for path in self.paths]
        if spec.shape == ():
            if len(made) > 1:
                text = f"input {spec.name} takes one image, {len(made)} are given"
                raise DataError(text)
            return made.reshape(())
        return made

    def _row(self, path: str, layout: _Layout, size: tuple[int, int] | None) -> Array:
        image = _fitted(_open(path, layout.channels), size, self.options.fit)
        pixels: Array = np.asarray(image)
        if layout.channels is None:
            return pixels
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if self.options.pixels in ("torch", "caffe"):
            pixels = _imagenet(pixels, path, self.options.pixels)
        return pixels.transpose(2, 0, 1) if layout.channels_first else pixels

    def _typed(self, pixels: Array, spec: TensorSpec) -> Array:
        want = numpy_dtype(spec.dtype)
        name = self.options.pixels
        if name == "raw":
            if not np.can_cast(pixels.dtype, want):
                text = f"input {spec.name} ({spec}) does not hold 0 to 255"
                raise DataError(text, hint="make the tensor: --input FILE.npy")
            return pixels.astype(want)
        if want.kind not in "fV":
            text = (
                f"input {spec.name} ({spec}): pixels {name} need numbers with fractions"
            )
            raise UsageError(text, hint="--pixels raw for whole numbers")
        if name == "unit":
            return (pixels / np.float32(255)).astype(want)
        if name == "signed":
            return (pixels / np.float32(127.5) - np.float32(1)).astype(want)
        return pixels.astype(want)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where the axes are: `channels` None is an axis less; `size` None is the image's own."""

    batched: bool
    channels: int | None
    channels_first: bool
    size: tuple[int, int] | None


def _layout(spec: TensorSpec) -> _Layout:
    """Find height, width and channels in a shape.

    Raises: DataError if that is not an image's.
    """
    shape = spec.shape
    if shape is None:  # what nearly every model with images takes
        shape = (None, None, None, 3)
    if len(shape) == 4:
        return _with_channels(shape[1:], spec, batched=True)
    if len(shape) == 3 and (shape[0] is None or not _is_channels(shape[2])):
        if shape[0] in _MODES and None not in shape[1:]:
            return _with_channels(shape, spec, batched=False)
        return _Layout(
            batched=True, channels=None, channels_first=False, size=_size(*shape[1:])
        )
    if len(shape) == 3:
        return _with_channels(shape, spec, batched=False)
    if len(shape) == 2 and shape[0] is not None:
        return _Layout(
            batched=False, channels=None, channels_first=False, size=_size(*shape)
        )
    text = f"input {spec.name} takes {spec}, which is not an image's shape"
    hint = "[?, height, width, 3] for one; make the tensor yourself: --input FILE.npy"
    raise DataError(text, hint=hint)


def _with_channels(shape: Shape, spec: TensorSpec, *, batched: bool) -> _Layout:
    first, last = shape[0], shape[2]
    channels_first = not _is_channels(last) and _is_channels(first)
    channels = first if channels_first else last
    height, width = shape[1:] if channels_first else shape[:2]
    if channels not in (None, *_MODES):
        text = f"input {spec.name}: an image has 1, 3 or 4 channels"
        raise DataError(text, hint=f"the model takes {shape_text(spec.shape)}")
    return _Layout(
        batched=batched,
        channels=channels or 3,
        channels_first=channels_first,
        size=_size(height, width),
    )


def _is_channels(size: int | None) -> bool:
    return size in _MODES


def _size(height: int | None, width: int | None) -> tuple[int, int] | None:
    return None if height is None or width is None else (width, height)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as exc:
        raise HostError.of("read", path, exc) from exc


def _open(path: str, channels: int | None) -> Image.Image:
    """Open an image as it is meant to be seen: turned as it says, on white where it is clear."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            # More pixels than a photograph has: a small file can take all memory.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)
            with Image.open(file) as opened:
                opened.load()
                image = ImageOps.exif_transpose(opened)
                return _in_mode(image, _MODES[channels or 1], path)
    except UnidentifiedImageError as exc:
        raise DataError(f"{path}: not an image", hint="PNG, JPEG, …") from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        text = f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels"
        raise DataError(text, hint="make it smaller before") from exc
    except (ValueError, SyntaxError, EOFError, MemoryError) as exc:
        raise DataError(f"{path}: not a whole image: {exc}") from exc
    except OSError as exc:
        if exc.errno:
            raise HostError.of("read", path, exc) from exc
        raise DataError(f"{path}: not a whole image: {exc}") from exc


def _in_mode(image: Image.Image, mode: str, path: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip to 8
        deep = np.asarray(image)
        if deep.size and (deep.min() < 0 or deep.max() > 0xFFFF):
            raise DataError(f"{path}: pixels outside 0 to 65535")
        image = Image.fromarray((deep // 257).astype(np.uint8))
    if image.mode == "F":
        text = f"{path}: pixels without a range"
        raise DataError(text, hint="make the tensor yourself: --input FILE.npy")
    if mode != "RGBA" and image.has_transparency_data:
        clear = image.convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        image = Image.alpha_composite(white, clear)
    return image if image.mode == mode else image.convert(mode)


def _fitted(image: Image.Image, size: tuple[int, int] | None, fit: str) -> Image.Image:
    if size is None or image.size == size:
        return image
    how = Image.Resampling.BILINEAR
    if fit == "crop":
        return ImageOps.fit(image, size, how)
    if fit == "pad":
        return ImageOps.pad(image, size, how)
    return image.resize(size, how)


def _imagenet(pixels: Array, path: str, name: str) -> Array:
    if pixels.shape[2] != 3:
        text = f"{path}: pixels as {name} has them are of three colours"
        raise UsageError(text, hint=f"--pixels {', '.join(PIXELS[:3])}")
    if name == "caffe":
        return pixels[:, :, ::-1] - np.array(_CAFFE_MEAN_BGR, np.float32)
    mean = np.array(_TORCH_MEAN, np.float32)
    deviation = np.array(_TORCH_DEVIATION, np.float32)
    made: Array = (pixels / np.float32(255) - mean) / deviation
    return made
