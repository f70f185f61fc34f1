"""ImageDataset holds together, and bytes survive the trip to [-1, 1] and back."""

import dataclasses

import pytest
import torch

from scalelong_fast.data import ImageDataset, to_uint8, to_unit_range
from scalelong_fast.data import images as images_module
from scalelong_fast.errors import UserError


def make(count: int = 6, **changes) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    parts = {
        "name": "made",
        "images": torch.randint(0, 256, (count, 3, 4, 5), dtype=torch.uint8, generator=generator),
        "labels": torch.arange(count) % 2,
        "num_classes": 2,
        "class_names": ("a", "b"),
    }
    return ImageDataset(**(parts | changes))


ALL_BYTES = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


class TestImageDataset:
    def test_tells_its_size(self):
        assert len(make()) == 6
        assert make().image_shape == (3, 4, 5)

    def test_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            make().name = "other"

    def test_may_be_unlabelled(self):
        assert make(labels=None, num_classes=0, class_names=()).labels is None

    def test_moves_images_and_labels(self):
        moved = make().to(torch.device("cpu"))
        assert moved.images.device.type == moved.labels.device.type == "cpu"
        assert moved.fingerprint() == make().fingerprint()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"images": torch.zeros(6, 3, 4, 5)}, "images: got 'float32 of shape"),
            ({"images": torch.zeros(6, 4, 5, dtype=torch.uint8)}, "images: .*expected uint8 of shape"),
            ({"images": torch.zeros(0, 3, 4, 5, dtype=torch.uint8)}, "at least one image"),
            ({"images": torch.zeros(6, 4, 5, 3, dtype=torch.uint8).permute(0, 3, 1, 2)}, "contiguous"),
            ({"labels": torch.zeros(6)}, "labels: got 'float32"),
            ({"labels": torch.zeros(5, dtype=torch.int64)}, r"int64 of shape \(6,\)"),
            ({"labels": torch.tensor([0, 1, 2, 0, 1, 2])}, r"values from 0 to 2.*\[0, 1\]"),
            ({"labels": torch.tensor([0, 1, -1, 0, 1, 0])}, "values from -1 to 1"),
            ({"labels": torch.zeros(6, dtype=torch.int64, device="meta")}, "labels: got 'meta'"),
            ({"labels": None}, "num_classes: got 2, expected 0"),
            ({"num_classes": 0, "class_names": ()}, "num_classes: got 0, expected at least 1"),
            ({"num_classes": -1}, "num_classes: got -1"),
            ({"class_names": ("a",)}, "class_names: .*each of 2 classes"),
        ],
    )
    def test_refuses_parts_that_do_not_fit(self, changes, message):
        with pytest.raises(UserError, match=message):
            make(**changes)


class TestFingerprint:
    def test_depends_on_content_only(self):
        assert make().fingerprint() == make(name="other").fingerprint()
        assert len(make().fingerprint()) == 16

    def test_notices_a_changed_pixel_label_shape_and_count(self):
        original = make()
        pixels = original.images.clone()
        pixels[-1, -1, -1, -1] ^= 1
        changed = [
            make(images=pixels),
            make(labels=1 - original.labels),
            make(labels=None, num_classes=0, class_names=()),
            make(images=original.images.reshape(6, 3, 5, 4)),
            make(count=7),
        ]
        prints = {original.fingerprint()} | {one.fingerprint() for one in changed}
        assert len(prints) == 1 + len(changed)

    def test_samples_every_image_of_a_large_set(self, monkeypatch):
        monkeypatch.setattr(images_module, "_FINGERPRINT_BYTES", 6 * 4)
        original = make()
        for index in range(6):
            pixels = original.images.clone()
            pixels[index] ^= 255
            assert make(images=pixels).fingerprint() != original.fingerprint()

    def test_reads_no_more_than_the_sample_of_a_large_set(self, monkeypatch):
        monkeypatch.setattr(images_module, "_FINGERPRINT_BYTES", 6 * 4)
        pixels = make().images.clone()
        pixels[0, 0, 0, 0] ^= 255  # outside the middle run
        assert make(images=pixels).fingerprint() == make().fingerprint()


class TestUnitRange:
    def test_maps_bytes_by_the_formula(self):
        unit = to_unit_range(ALL_BYTES)
        assert unit.dtype == torch.float32
        assert unit.min() == -1.0
        assert unit.max() == 1.0
        torch.testing.assert_close(unit.double(), ALL_BYTES.double() / 127.5 - 1, rtol=0, atol=1.2e-7)

    def test_round_trip_is_exact_for_all_256_values(self):
        assert torch.equal(to_uint8(to_unit_range(ALL_BYTES)), ALL_BYTES)

    def test_flips_the_chosen_images_only(self):
        images = make().images
        flip = torch.tensor([True, False, True, False, False, True])
        unit, plain = to_unit_range(images, flip), to_unit_range(images)
        for index, flipped in enumerate(flip.tolist()):
            assert torch.equal(unit[index], plain[index].flip(-1) if flipped else plain[index])

    def test_leaves_its_input_alone(self):
        images = make().images
        before = images.clone()
        to_unit_range(images, torch.ones(6, dtype=torch.bool))
        assert torch.equal(images, before)

    def test_never_reads_the_mask_on_the_host(self):
        # A meta tensor holds no values, so any read would raise.
        images = torch.empty(2, 3, 4, 4, dtype=torch.uint8, device="meta")
        assert to_unit_range(images, torch.empty(2, dtype=torch.bool, device="meta")).shape == images.shape

    @pytest.mark.parametrize(
        ("images", "flip", "message"),
        [
            (torch.zeros(2, 1, 4, 4), None, "images_uint8: got 'float32"),
            (torch.zeros(4, 4, dtype=torch.uint8), None, r"uint8 of shape \(N, C, H, W\)"),
            (ALL_BYTES, torch.ones(1), r"flip: got 'float32 .*expected bool of shape \(1,\)"),
            (ALL_BYTES, torch.ones(2, dtype=torch.bool), "flip: got 'bool of shape"),
            (ALL_BYTES, torch.ones(1, dtype=torch.bool, device="meta"), "flip: got 'meta'"),
        ],
    )
    def test_refuses_wrong_tensors(self, images, flip, message):
        with pytest.raises(UserError, match=message):
            to_unit_range(images, flip)


class TestToUint8:
    def test_rounds_and_clamps(self):
        values = torch.tensor([-9.0, -1.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1, 254.6 / 127.5 - 1, 1.0, 9.0])
        assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8])
    def test_takes_fp32_only(self, dtype):
        with pytest.raises(UserError, match="expected float32"):
            to_uint8(torch.zeros(2, dtype=dtype))
