"""Images become the tensors that the metadata asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdxd.errors import DataError, HostError, TdxdError, UsageError
from tdxd.user.image_options import ImageOptions
from tdxd.user.images import Images
from tdxd.user.signature import TensorSpec

FLOAT, INT32, UINT8, INT8, STRING = 1, 3, 4, 6, 7
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def spec(*shape, dtype=FLOAT):
    return TensorSpec(name="x", dtype=dtype, shape=shape)


def saved(path, pixels, mode=None):
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(path)
    return str(path)


def array(paths, want, **options):
    paths = (paths,) if isinstance(paths, str) else tuple(paths)
    return Images(paths=paths, options=ImageOptions(**options)).array(want)


@pytest.fixture
def flag(tmp_path):
    """Return an image of 2 rows and 3 columns: red, green, blue, and the same darker."""
    bright = np.array([RED, GREEN, BLUE], np.uint8)
    return saved(tmp_path / "flag.png", [bright, bright // 5])


def test_rows_of_a_batch_with_channels_last(flag):
    made = array([flag, flag], spec(None, 2, 3, 3))
    assert (made.shape, made.dtype) == ((2, 2, 3, 3), np.float32)
    assert made[1, 0].tolist() == [list(RED), list(GREEN), list(BLUE)]
    assert made[0, 1, 2].tolist() == [0, 0, 51]


def test_channels_first(flag):
    made = array(flag, spec(None, 3, 2, 5), fit="stretch")
    assert made.shape == (1, 3, 2, 5)
    assert made[0, :, 0, 0].tolist() == list(RED)
    with pytest.raises(DataError, match="has 1, 3 or 4 channels"):
        array(flag, spec(None, 2, 2, 2))


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((None, 2, 3), (1, 2, 3)),
        ((None, 2, 3, 1), (1, 2, 3, 1)),
        ((None, 1, 2, 9), (1, 1, 2, 9)),
        ((2, 3), (2, 3)),
        ((2, 3, 3), (2, 3, 3)),
        ((3, 2, 9), (3, 2, 9)),
        ((None, 2, 3, 4), (1, 2, 3, 4)),
        ((None, None, None, 3), (1, 2, 3, 3)),
    ],
)
def test_every_layout(flag, shape, want):
    assert array(flag, spec(*shape), fit="stretch").shape == want


def test_grey_is_luma(flag):
    made = array(flag, spec(None, 2, 3))
    assert made[0, 0].round().tolist() == [76, 150, 29]  # ITU-R 601-2


def test_unknown_rank_is_taken_as_colours(flag):
    want = TensorSpec(name="x", dtype=FLOAT, shape=None)
    assert array(flag, want).shape == (1, 2, 3, 3)


@pytest.mark.parametrize("shape", [(None,), (), (None, 7), (None, 1, 2, 3, 3)])
def test_a_shape_that_is_no_images(flag, shape):
    with pytest.raises(DataError, match="which is not an image's shape"):
        array(flag, spec(*shape))


def test_fits(tmp_path):
    wide = np.zeros((2, 6, 3), np.uint8)
    wide[:, :2], wide[:, 2:4], wide[:, 4:] = RED, GREEN, BLUE
    path = saved(tmp_path / "wide.png", wide)
    cropped = array(path, spec(None, 2, 2, 3))
    assert (cropped == GREEN).all()
    padded = array(path, spec(None, 6, 6, 3), fit="pad")
    assert not padded[0, :2].any()
    assert not padded[0, 4:].any()
    assert padded[0, 2, 0].tolist() == list(RED)
    stretched = array(path, spec(None, 2, 3, 3), fit="stretch")
    assert stretched[0, 0, 0, 0] > 200 < stretched[0, 0, 2, 2]


def test_scales_of_pixels(tmp_path):
    path = saved(tmp_path / "a.png", [[(0, 51, 255)]])
    want = spec(None, 1, 1, 3)
    assert array(path, want, pixels="unit").ravel() == pytest.approx([0, 0.2, 1])
    assert array(path, want, pixels="signed").ravel() == pytest.approx([-1, -0.6, 1])
    torch = array(path, want, pixels="torch").ravel()
    assert torch == pytest.approx([-0.485 / 0.229, -0.256 / 0.224, 0.594 / 0.225])
    caffe = array(path, want, pixels="caffe").ravel()
    assert caffe == pytest.approx([255 - 103.939, 51 - 116.779, -123.68])
    for name in ("raw", "unit", "signed", "torch", "caffe"):
        assert array(path, want, pixels=name).dtype == np.float32


def test_whole_numbers(flag):
    for dtype, want in ((UINT8, np.uint8), (INT32, np.int32)):
        made = array(flag, spec(None, 2, 3, 3, dtype=dtype))
        assert (made.dtype, made.max()) == (want, 255)
        with pytest.raises(UsageError, match="need numbers with fractions"):
            array(flag, spec(None, 2, 3, 3, dtype=dtype), pixels="unit")
    with pytest.raises(DataError, match="does not hold 0 to 255"):
        array(flag, spec(None, 2, 3, 3, dtype=INT8))


def test_colours_that_a_grey_model_has_not(flag):
    with pytest.raises(UsageError, match="are of three colours"):
        array(flag, spec(None, 2, 3, 1), pixels="torch")


def test_a_model_that_decodes_gets_the_file(flag):
    content = Path(flag).read_bytes()
    made = array([flag, flag], spec(None, dtype=STRING))
    assert made.tolist() == [content, content]
    assert array(flag, spec(dtype=STRING)).item() == content
    with pytest.raises(DataError, match="takes one image"):
        array([flag, flag], spec(dtype=STRING))


def test_a_model_of_one_image(flag):
    with pytest.raises(DataError, match="takes one image, 2 are given"):
        array([flag, flag], spec(2, 3, 3))


def test_images_of_several_sizes_need_one(tmp_path, flag):
    other = saved(tmp_path / "other.png", np.zeros((4, 4, 3)))
    want = spec(None, None, None, 3)
    with pytest.raises(UsageError, match="of several sizes"):
        array([flag, other], want)
    assert array([flag, other], want, size=(5, 7)).shape == (2, 7, 5, 3)


def test_turned_as_its_metadata_says(tmp_path):
    image = Image.fromarray(np.array([[RED, GREEN]], np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter to the right. Source: Exif 2.32, orientation
    image.save(tmp_path / "a.png", exif=exif)
    made = array(str(tmp_path / "a.png"), spec(None, None, None, 3))
    assert made.shape == (1, 2, 1, 3)
    assert made[0, 0, 0].tolist() == list(RED)


def test_what_is_clear_is_white(tmp_path):
    path = saved(tmp_path / "a.png", [[(255, 0, 0, 0), (255, 0, 0, 255)]])
    made = array(path, spec(None, 1, 2, 3))
    assert made[0, 0].tolist() == [[255, 255, 255], list(RED)]


def test_16_bits_are_not_clipped(tmp_path):
    deep = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    made = array(str(tmp_path / "a.png"), spec(None, 1, 3))
    assert made[0, 0].tolist() == [0, 100, 255]


def test_a_first_frame_and_a_palette(tmp_path):
    frames = [Image.new("P", (2, 2), colour) for colour in (0, 1)]
    for frame in frames:
        frame.putpalette([*RED, *BLUE])
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    made = array(str(tmp_path / "a.gif"), spec(None, 2, 2, 3))
    assert (made[0] == RED).all()


def test_files_that_are_no_images(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (50, 50, 3))
    whole = Path(saved(tmp_path / "whole.png", noise)).read_bytes()
    for content in (b"", b"hello", whole[:40], whole[:2000]):
        path = tmp_path / "bad.png"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.png: not an? (whole )?image"):
            array(str(path), spec(None, 2, 3, 3))
    with pytest.raises(HostError, match="No such file"):
        array(str(tmp_path / "none.png"), spec(None, 2, 3, 3))


def test_more_pixels_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (11, 20):  # Pillow only warns of the first
        path = saved(tmp_path / "big.png", np.zeros((side, side)))
        with pytest.raises(TdxdError, match="more than 100 pixels"):
            array(path, spec(None, 2, 2))
