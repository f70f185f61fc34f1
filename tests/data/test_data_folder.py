"""Any folder of images: classes, sizes, grey and colour, transparency, and files that cannot be read."""

import numpy as np
import pytest
import torch

from scalelong_fast.data import folder as folder_module
from scalelong_fast.data import load_images
from scalelong_fast.errors import UserError

image_module = pytest.importorskip("PIL.Image")

RNG = np.random.default_rng(0)


def save(path, shape=(8, 8, 3), fill=None, **options):
    """Write an image of the shape (H, W) or (H, W, channels) and return its pixels."""
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    if fill is not None:
        pixels[...] = fill
    path.parent.mkdir(parents=True, exist_ok=True)
    image_module.fromarray(pixels).save(path, **options)
    return pixels


def chw(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


class TestLayout:
    def test_subfolders_are_classes_sorted_by_name(self, tmp_path):
        dog = save(tmp_path / "dog" / "1.png")
        cat_b = save(tmp_path / "cat" / "b.png")
        cat_a = save(tmp_path / "cat" / "a.PNG")
        loaded = load_images("folder", path=tmp_path)
        assert loaded.class_names == ("cat", "dog")
        assert loaded.num_classes == 2
        assert loaded.labels.tolist() == [0, 0, 1]
        assert torch.equal(loaded.images, torch.stack([chw(cat_a), chw(cat_b), chw(dog)]))

    def test_classes_are_searched_recursively(self, tmp_path):
        save(tmp_path / "cat" / "deep" / "deeper" / "a.png")
        save(tmp_path / "dog" / "b.png")
        assert load_images("folder", path=tmp_path).labels.tolist() == [0, 1]

    def test_a_flat_folder_is_unlabelled(self, tmp_path):
        pixels = [save(tmp_path / f"{index}.png") for index in range(3)]
        loaded = load_images("folder", path=str(tmp_path))
        assert loaded.labels is None
        assert loaded.num_classes == 0
        assert loaded.class_names == ()
        assert torch.equal(loaded.images, torch.stack([chw(one) for one in pixels]))

    @pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "bmp", "JPG", "Png"])
    def test_reads_the_usual_kinds(self, suffix, tmp_path):
        save(tmp_path / f"a.{suffix}", fill=100)
        pixels = load_images("folder", path=tmp_path).images
        assert pixels.shape == (1, 3, 8, 8)
        assert (pixels.int() - 100).abs().max() <= 2  # the lossy kinds may stray a little

    def test_other_and_hidden_files_are_passed_over(self, tmp_path):
        save(tmp_path / "a.png")
        save(tmp_path / ".thumbnails" / "a.png")
        (tmp_path / "._a.png").write_bytes(b"resource fork")
        (tmp_path / "notes.txt").write_text("hello")
        (tmp_path / "empty").mkdir()
        assert len(load_images("folder", path=tmp_path)) == 1

    def test_more_images_than_one_block_keep_their_order(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folder_module, "_BLOCK", 4)
        for index in range(11):
            save(tmp_path / f"{index:02}.png", fill=index)
        assert load_images("folder", path=tmp_path).images[:, 0, 0, 0].tolist() == list(range(11))

    def test_progress_shows_a_bar(self, tmp_path, capsys):
        save(tmp_path / "a.png")
        load_images("folder", path=tmp_path, progress=True)
        assert "Decoding images" in capsys.readouterr().out

    def test_no_progress_prints_nothing(self, tmp_path, capsys):
        save(tmp_path / "a.png")
        load_images("folder", path=tmp_path)
        assert capsys.readouterr().out == ""


class TestColour:
    def test_all_grey_stays_grey(self, tmp_path):
        pixels = save(tmp_path / "a.png", (8, 8))
        save(tmp_path / "b.png", (8, 8))
        loaded = load_images("folder", path=tmp_path)
        assert loaded.image_shape == (1, 8, 8)
        assert torch.equal(loaded.images[0, 0], torch.from_numpy(pixels))

    def test_one_colour_image_makes_all_colour(self, tmp_path):
        grey = save(tmp_path / "a.png", (8, 8))
        save(tmp_path / "b.png")
        loaded = load_images("folder", path=tmp_path)
        assert loaded.image_shape == (3, 8, 8)
        for channel in loaded.images[0]:
            assert torch.equal(channel, torch.from_numpy(grey))

    def test_transparency_lies_over_white(self, tmp_path):
        pixels = np.zeros((4, 4, 4), np.uint8)
        pixels[..., 0] = 200
        pixels[0, :, 3], pixels[1, :, 3], pixels[2:, :, 3] = 0, 51, 255
        image_module.fromarray(pixels).save(tmp_path / "a.png")
        red, green, _ = load_images("folder", path=tmp_path).images[0, :, :, 0]
        assert red.tolist() == [255, 244, 200, 200]  # 255 + (200 - 255) * 51 / 255 = 244
        assert green.tolist() == [255, 204, 0, 0]

    def test_transparent_grey_stays_grey(self, tmp_path):
        pixels = np.full((4, 4, 2), 100, np.uint8)
        pixels[0, :, 1], pixels[1:, :, 1] = 0, 255
        image_module.fromarray(pixels, "LA").save(tmp_path / "a.png")
        loaded = load_images("folder", path=tmp_path)
        assert loaded.images[0, 0, :, 0].tolist() == [255, 100, 100, 100]
        assert loaded.image_shape == (1, 4, 4)

    def test_a_transparent_palette_colour_lies_over_white(self, tmp_path):
        image = image_module.new("P", (4, 4), 0)
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((0, 0), 1)
        image.save(tmp_path / "a.png", transparency=0)
        loaded = load_images("folder", path=tmp_path).images[0]
        assert loaded[:, 0, 0].tolist() == [40, 50, 60]
        assert loaded[:, 1, 1].tolist() == [255, 255, 255]

    def test_sixteen_bit_grey_is_scaled(self, tmp_path):
        values = np.array([[0, 257], [32768, 65535]], np.uint16)
        image_module.fromarray(values).save(tmp_path / "a.png")
        assert load_images("folder", path=tmp_path).images.flatten().tolist() == [0, 1, 128, 255]

    def test_photographs_are_turned_upright(self, tmp_path):
        pixels = np.zeros((4, 4), np.uint8)
        pixels[0] = 255
        exif = image_module.Exif()
        exif[0x0112] = 3  # turned by 180 degrees
        image_module.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        assert load_images("folder", path=tmp_path).images[0, 0, :, 0].tolist() == [0, 0, 0, 255]


class TestSize:
    def test_mixed_sizes_are_brought_to_one(self, tmp_path):
        for name, shape in {"a": (9, 30, 3), "b": (64, 20, 3), "c": (5, 4, 3), "d": (8, 8, 3)}.items():
            save(tmp_path / f"{name}.png", shape, fill=77)
        loaded = load_images("folder", path=tmp_path, img_size=8)
        assert loaded.images.shape == (4, 3, 8, 8)
        assert (loaded.images == 77).all()

    def test_images_of_the_right_size_are_untouched(self, tmp_path):
        pixels = save(tmp_path / "a.png")
        assert torch.equal(load_images("folder", path=tmp_path, img_size=8).images[0], chw(pixels))

    def test_the_centre_is_kept(self, tmp_path):
        pixels = np.zeros((8, 24), np.uint8)
        pixels[:, 8:16] = RNG.integers(1, 256, (8, 8))
        image_module.fromarray(pixels).save(tmp_path / "a.png")
        loaded = load_images("folder", path=tmp_path, img_size=8)
        assert torch.equal(loaded.images[0, 0], torch.from_numpy(pixels[:, 8:16]))

    def test_powers_of_two_are_box_averages(self, tmp_path):
        expected = save(tmp_path / "a.png", (32, 32)).astype(int)
        for _ in range(2):
            # Pillow averages along rows, then along columns, rounding halves up each time.
            expected = (expected[:, ::2] + expected[:, 1::2] + 1) // 2
            expected = (expected[::2] + expected[1::2] + 1) // 2
        loaded = load_images("folder", path=tmp_path, img_size=8).images[0, 0]
        assert np.array_equal(loaded.numpy(), expected)

    def test_the_rest_is_bicubic(self, tmp_path):
        pixels = save(tmp_path / "a.png", (12, 12))
        expected = image_module.fromarray(pixels).resize((8, 8), image_module.Resampling.BICUBIC)
        loaded = load_images("folder", path=tmp_path, img_size=8).images[0, 0]
        assert np.array_equal(loaded.numpy(), np.asarray(expected))

    def test_without_a_size_the_first_other_size_is_named(self, tmp_path):
        save(tmp_path / "a.png")
        save(tmp_path / "b.png", (16, 16, 3))
        with pytest.raises(UserError, match=r"b\.png' has 16x16 pixels.*8x8 like the first.*--model\.img-size"):
            load_images("folder", path=tmp_path)

    def test_without_a_size_images_must_be_square(self, tmp_path):
        save(tmp_path / "a.png", (8, 10, 3))
        with pytest.raises(UserError, match=r"a\.png' has 10x8 pixels, expected a square.*--model\.img-size"):
            load_images("folder", path=tmp_path)


class TestErrors:
    def test_a_path_is_required(self):
        with pytest.raises(UserError, match=r"--data\.path: got None"):
            load_images("folder")

    def test_an_empty_folder_is_refused(self, tmp_path):
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(UserError, match="expected a folder that holds images"):
            load_images("folder", path=tmp_path)

    def test_an_empty_class_is_refused(self, tmp_path):
        save(tmp_path / "cat" / "a.png")
        (tmp_path / "dog").mkdir()
        with pytest.raises(UserError, match=r"class folder .*dog' holds no images"):
            load_images("folder", path=tmp_path)

    def test_loose_images_beside_classes_are_refused(self, tmp_path):
        save(tmp_path / "cat" / "a.png")
        save(tmp_path / "stray.png")
        with pytest.raises(UserError, match=r"both images of its own \(first: 'stray\.png'\)"):
            load_images("folder", path=tmp_path)

    def test_a_file_that_is_no_image_is_named(self, tmp_path):
        save(tmp_path / "a.png")
        (tmp_path / "b.jpg").write_bytes(b"not an image")
        with pytest.raises(UserError, match=r"b\.jpg' cannot be read as an image"):
            load_images("folder", path=tmp_path)

    def test_a_truncated_file_is_named(self, tmp_path):
        save(tmp_path / "a.png")
        save(tmp_path / "b.png")
        whole = (tmp_path / "b.png").read_bytes()
        (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=r"b\.png' cannot be read as an image"):
            load_images("folder", path=tmp_path)

    def test_too_many_for_the_memory_is_explained(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise MemoryError

        save(tmp_path / "a.png")
        monkeypatch.setattr(folder_module.np, "empty", refuse)
        with pytest.raises(UserError, match=r"1 images of 3x1024x1024 need 0\.0 GiB"):
            load_images("folder", path=tmp_path, img_size=1024)
