"""The crop rules against references written out here, pixel by pixel where the rule has no resampling of its own."""

import io

import numpy as np
import pytest

from scalelong_fast.data.crop import CROPS
from scalelong_fast.errors import UserError

Image = pytest.importorskip("PIL.Image")

RNG = np.random.default_rng(0)


def picture(width, height):
    """Smooth colours and some noise."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / 9 + k) * np.cos(y / (7 + k)) for k in range(3)]
    return Image.fromarray((np.stack(waves, -1) + RNG.integers(0, 30, (height, width, 3))).astype(np.uint8))


def adm_reference(image, side):
    """Means over 2x2 blocks in NumPy, rounded as Pillow does, then Pillow's bicubic, then a slice."""
    pixels = np.asarray(image)
    while min(pixels.shape[:2]) >= 2 * side:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        if pixels.shape[0] % 2 or pixels.shape[1] % 2:  # the boxes then overlap pixels in part
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))
        else:
            blocks = pixels.reshape(height, 2, width, 2, 3).astype(np.float64)
            # Pillow averages along rows, rounds, then along columns.
            pixels = np.floor(np.floor(blocks.mean(3) + 0.5).mean(1) + 0.5).astype(np.uint8)
    scale = side / min(pixels.shape[:2])
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


@pytest.mark.parametrize(
    ("width", "height", "side"),
    [
        (500, 375, 64),
        (375, 500, 64),
        (64, 64, 64),
        (128, 128, 64),
        (127, 130, 64),
        (40, 90, 64),
        (257, 513, 32),
        (1, 1, 4),
    ],
)
def test_adm(width, height, side):
    image = picture(width, height)
    result = np.asarray(CROPS["adm"].apply(image, side))
    assert result.shape == (side, side, 3)
    assert np.array_equal(result, adm_reference(image, side))


def test_adm_leaves_an_image_of_the_size_as_it_is():
    image = picture(32, 32)
    assert np.array_equal(np.asarray(CROPS["adm"].apply(image, 32)), np.asarray(image))


def test_adm_is_close_to_the_mean_over_large_blocks():
    image = picture(512, 512)
    blocks = np.asarray(image).reshape(64, 8, 64, 8, 3).astype(float).mean((1, 3))
    assert abs(np.asarray(CROPS["adm"].apply(image, 64)) - blocks).max() <= 3  # six roundings by 1/2 at most


def test_celeba_cuts_the_box_of_the_authors():
    image = picture(178, 218)
    cx, cy = 89, 121
    box = np.asarray(image)[cy - 64 : cy + 64, cx - 64 : cx + 64]
    assert np.array_equal(np.asarray(CROPS["celeba"].apply(image, 128)), box)
    small = np.asarray(Image.fromarray(box).resize((64, 64), Image.Resampling.BILINEAR))
    assert np.array_equal(np.asarray(CROPS["celeba"].apply(image, 64)), small)


def test_celeba_refuses_other_sizes():
    with pytest.raises(UserError, match=r"--crop: got .*200x218 pixels.*aligned images of 178x218.*--crop adm"):
        CROPS["celeba"].apply(picture(200, 218), 64)


@pytest.mark.parametrize(("width", "height"), [(640, 427), (427, 640), (301, 300), (256, 256)])
def test_lanczos_takes_the_largest_centre_square(width, height):
    image = picture(width, height)
    pixels, square = np.asarray(image), min(width, height)
    rows = slice((height - square) // 2, (height + square) // 2)
    columns = slice((width - square) // 2, (width + square) // 2)
    reference = Image.fromarray(pixels[rows, columns]).resize((256, 256), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(CROPS["lanczos"].apply(image, 256)), np.asarray(reference))


def test_only_upright_turns_photographs():
    assert [rule.name for rule in CROPS.values() if rule.upright] == ["upright"]
    assert CROPS["upright"].apply is CROPS["adm"].apply


def test_a_turned_photograph_is_turned_by_its_mark(tmp_path):
    from scalelong_fast.data.prepare.pixels import PixelReader
    from scalelong_fast.data.prepare.source import Source

    image, file = picture(8, 8), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(file, "png", exif=exif)
    source = Source(["photo"], lambda index: file.getvalue(), None, (), None, {})
    for name, expected in (("adm", np.asarray(image)), ("upright", np.asarray(image)[::-1, ::-1])):
        reader = PixelReader(source, CROPS[name], 8, 3, workers=1)
        images, kept = reader.read(range(1), lambda count: None)
        assert kept == [0]
        assert np.array_equal(images[0], expected.transpose(2, 0, 1))
        reader.close()
