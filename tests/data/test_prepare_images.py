"""Whole preparations of images, from the source to the training set, interrupted and not."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from scalelong_fast.data.packed import PackedSet, verify
from scalelong_fast.data.prepare import RECIPES, PrepareOptions, Request, prepare
from scalelong_fast.data.prepare import run as run_module
from scalelong_fast.data.prepare.pixels import PixelPacker
from scalelong_fast.errors import UserError

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images of two classes, one of them grey, one with transparency."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(12):
        shape = {3: (30, 40), 5: (40, 40, 4)}.get(index, (30 + index, 40, 3))
        file = root / f"class_{index % 2}" / f"{index:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file)
    return root


def request(folder, out, name="imagenet64", **options):
    options = {"size": 16, "shard_mib": 1, "workers": 2, "allow_partial": True, **options}
    return Request(RECIPES[name], Path(out), torch.device("cpu"), PrepareOptions(source=str(folder), **options))


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of five images."""
    monkeypatch.setattr(PixelPacker, "sample_bytes", lambda self: (1 << 20) // 5)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_folder_becomes_a_training_set(folder, tmp_path, small_shards):
    manifest = prepare(request(folder, tmp_path / "out"))
    dataset = PackedSet(tmp_path / "out")
    assert [shard.count for shard in manifest.shards] == [5, 5, 2]
    assert (len(dataset), dataset.image_shape, dataset.class_names) == (12, (3, 16, 16), ("class_0", "class_1"))
    assert verify(tmp_path / "out") == {}
    batch = dataset.fetch(torch.arange(12))
    assert batch.labels.tolist() == [0] * 6 + [1] * 6
    files = sorted(folder.rglob("*.png"))
    for index in (0, 4, 6, 11):
        image = Image.open(files[index])
        if image.mode != "RGB":
            continue
        half = (
            image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
            if min(image.size) >= 32
            else image
        )
        scale = 16 / min(half.size)
        scaled = half.resize((round(half.width * scale), round(half.height * scale)), Image.Resampling.BICUBIC)
        pixels = np.asarray(scaled)
        top, left = (pixels.shape[0] - 16) // 2, (pixels.shape[1] - 16) // 2
        expected = pixels[top : top + 16, left : left + 16].transpose(2, 0, 1)
        assert np.array_equal(batch.images[index].numpy(), expected)


def test_the_manifest_says_what_was_packed_from_what(folder, tmp_path):
    prepare(request(folder, tmp_path / "out"))
    values = json.loads((tmp_path / "out" / "manifest.json").read_text())
    plan = values["plan"]
    assert plan["source"] == {
        "kind": "folder",
        "path": str(folder),
        "images": 12,
        "fingerprint": plan["source"]["fingerprint"],
    }
    assert plan["preparation"]["crop"]["name"] == "adm"
    assert plan["preparation"]["versions"]["pillow"]
    assert plan["class_names"] == ["class_0", "class_1"]
    assert len(values["shards"][0]["files"]["images"]["sha256"]) == 64


@pytest.mark.parametrize("fails_at", [0, 7, 11])
def test_an_interrupted_preparation_goes_on_at_the_first_missing_shard(
    folder, tmp_path, small_shards, monkeypatch, fails_at
):
    prepare(request(folder, tmp_path / "whole"))

    class Interrupted(Exception):
        pass

    packed = []
    real = PixelPacker.pack

    def pack(self, samples, tick):
        packed.append(samples.start)
        if fails_at in samples:
            raise Interrupted
        return real(self, samples, tick)

    with monkeypatch.context() as patch:
        patch.setattr(PixelPacker, "pack", pack)
        with pytest.raises(Interrupted):
            prepare(request(folder, tmp_path / "part"))
    with monkeypatch.context() as patch:
        fails_at = None
        packed.clear()
        patch.setattr(PixelPacker, "pack", lambda self, s, t: packed.append(s.start) or real(self, s, t))
        prepare(request(folder, tmp_path / "part"))
    assert packed[-1] == 10
    assert content(tmp_path / "part") == content(tmp_path / "whole")


def test_what_is_finished_is_not_packed_again(folder, tmp_path, monkeypatch):
    prepare(request(folder, tmp_path / "out"))
    before = content(tmp_path / "out")
    monkeypatch.setattr(PixelPacker, "pack", lambda *args: pytest.fail("packed again"))
    prepare(request(folder, tmp_path / "out"))
    prepare(request(folder, tmp_path / "out", verify=True))
    assert content(tmp_path / "out") == before


def test_a_damaged_shard_is_made_again_with_verify(folder, tmp_path, small_shards):
    prepare(request(folder, tmp_path / "out"))
    file = tmp_path / "out" / "shard-00001.images.bin"
    good = file.read_bytes()
    file.write_bytes(b"\0" * len(good))
    prepare(request(folder, tmp_path / "out", verify=True))
    assert file.read_bytes() == good


def test_a_changed_source_is_refused(folder, tmp_path):
    prepare(request(folder, tmp_path / "out"))
    with pytest.raises(UserError, match=r"begun with other settings \(count was 12, now 3"):
        prepare(request(folder, tmp_path / "out", limit=3))
    with pytest.raises(UserError, match=r"preparation\.crop\.name was 'adm', now 'lanczos'"):
        prepare(request(folder, tmp_path / "out", crop="lanczos"))


def test_grey_images_have_one_channel_if_asked(folder, tmp_path):
    prepare(request(folder, tmp_path / "out", "folder", channels=1, limit=4))
    assert PackedSet(tmp_path / "out").image_shape == (1, 16, 16)


def test_an_image_that_cannot_be_read_is_named(folder, tmp_path):
    root = tmp_path / "broken" / "class"
    root.mkdir(parents=True)
    (root / "1.jpg").write_bytes(b"not an image")
    with pytest.raises(
        UserError, match=r"'class/1\.jpg' cannot be read as an image.*kept\. Leave it out with --skip-un"
    ):
        prepare(request(tmp_path / "broken", tmp_path / "out"))


def test_all_images_of_a_shard_that_cannot_be_read_are_named(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "broken")
    files = sorted(file for file in root.rglob("*.*") if file.is_file())
    for file in (files[1], files[-1]):
        file.write_bytes(b"not an image")
    first, last = (file.relative_to(root).as_posix() for file in (files[1], files[-1]))
    with pytest.raises(
        UserError, match=f"{first}' cannot be read.*nor can 1 more .*{last}.*mend or remove them, and run the same"
    ):
        prepare(request(root, tmp_path / "out"))


@pytest.fixture
def broken(folder, tmp_path):
    """The folder with two images in the second of three shards, and one in the third, that cannot be read."""
    root = shutil.copytree(folder, tmp_path / "broken")
    names = [file.relative_to(root).as_posix() for file in sorted(root.rglob("*.png"))]
    for index in (6, 9, 11):
        (root / names[index]).write_bytes(b"not an image")
    return root, names


def test_images_that_cannot_be_read_are_left_out_and_named(broken, folder, tmp_path, small_shards):
    root, names = broken
    with pytest.raises(UserError, match=r"packed so far is kept\. Leave them out with --skip-unreadable"):
        prepare(request(root, tmp_path / "out"))
    first = (tmp_path / "out" / "shard-00000.images.bin").stat().st_mtime_ns
    manifest = prepare(request(root, tmp_path / "out", skip_unreadable=True))
    assert (tmp_path / "out" / "shard-00000.images.bin").stat().st_mtime_ns == first
    assert manifest.skipped == [names[6], names[9], names[11]]
    assert [shard.count for shard in manifest.shards] == [5, 3, 1]
    shards = json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"]
    assert [shard["skipped"] for shard in shards] == [[], [names[6], names[9]], [names[11]]]

    prepare(request(folder, tmp_path / "whole"))
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 7, 8, 10])
    dataset, whole = PackedSet(tmp_path / "out"), PackedSet(tmp_path / "whole").fetch(kept)
    assert len(dataset) == 9
    # Backwards, so that each image is looked for by its own number.
    found = dataset.fetch(torch.arange(8, -1, -1))
    assert torch.equal(found.images.flip(0), whole.images)
    assert torch.equal(found.labels.flip(0), whole.labels)
    before = content(tmp_path / "out")
    prepare(request(root, tmp_path / "out", verify=True))
    assert content(tmp_path / "out") == before


def test_a_shard_with_left_out_images_is_mended_like_any_other(broken, tmp_path, small_shards):
    prepare(request(broken[0], tmp_path / "out", skip_unreadable=True))
    file = tmp_path / "out" / "shard-00001.images.bin"
    good = file.read_bytes()
    file.write_bytes(bytes(len(good)))
    prepare(request(broken[0], tmp_path / "out", skip_unreadable=True, verify=True))
    assert file.read_bytes() == good
    assert verify(tmp_path / "out") == {}


def test_a_source_of_which_nothing_can_be_read_is_not_skipped(tmp_path):
    root = tmp_path / "broken" / "class"
    root.mkdir(parents=True)
    for index in range(3):
        (root / f"{index}.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"none of the 3 images from 'class/0\.jpg' to 'class/2\.jpg' can be read"):
        prepare(request(tmp_path / "broken", tmp_path / "out", skip_unreadable=True))


@pytest.mark.parametrize("mend", ["replace", "remove"])
def test_the_same_command_goes_on_after_the_source_was_mended(broken, folder, tmp_path, small_shards, mend):
    root, names = broken
    with pytest.raises(UserError, match="kept"):
        prepare(request(root, tmp_path / "out"))
    first = (tmp_path / "out" / "shard-00000.images.bin").stat().st_mtime_ns
    for index in (6, 9, 11):
        (root / names[index]).unlink()
        if mend == "replace":
            shutil.copy(folder / names[index], root / names[index])
    manifest = prepare(request(root, tmp_path / "out"))
    assert (tmp_path / "out" / "shard-00000.images.bin").stat().st_mtime_ns == first
    assert manifest == prepare(request(root, tmp_path / "fresh"))
    prepare(request(root, tmp_path / "out"))
    assert manifest.count == (12 if mend == "replace" else 9)


def test_an_image_of_a_finished_shard_must_not_change(broken, tmp_path, small_shards):
    root, names = broken
    with pytest.raises(UserError, match="kept"):
        prepare(request(root, tmp_path / "out"))
    (root / names[0]).write_bytes((root / names[0]).read_bytes() + b"x")
    with pytest.raises(UserError, match=r"begun with other settings \(source\.fingerprint was"):
        prepare(request(root, tmp_path / "out"))


def test_a_finished_set_does_not_grow(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "growing")
    prepare(request(root, tmp_path / "out"))
    shutil.copy(next(root.rglob("*.png")), root / "class_1" / "zz.png")
    with pytest.raises(UserError, match="count was 12, now 13"):
        prepare(request(root, tmp_path / "out"))


def test_a_source_that_fails_is_no_broken_image(folder, tmp_path, monkeypatch):
    def fail(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=r"Input/output error: 'class_0/00\.png'.*bring the source back.*same comm"):
        prepare(request(folder, tmp_path / "out"))


def test_a_truncated_image_is_named(tmp_path):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(data, "jpeg")
    root = tmp_path / "broken" / "class"
    root.mkdir(parents=True)
    (root / "1.jpg").write_bytes(data.getvalue()[:-400])
    with pytest.raises(UserError, match=r"'class/1\.jpg' cannot be read"):
        prepare(request(tmp_path / "broken", tmp_path / "out"))


def test_a_full_disk_says_that_it_goes_on(folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module.PackedWriter, "write_shard", full)
    with pytest.raises(UserError, match=r"No space left.*free some space .*run the same command again"):
        prepare(request(folder, tmp_path / "out"))


def test_cifar10_is_packed_pixel_by_pixel(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    datasets.Dataset.from_dict(
        {"img": [Image.fromarray(one) for one in pixels], "label": [3, 0, 9, 3, 7]},
        features=datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)}),
    ).save_to_disk(tmp_path / "saved")
    prepare(request(tmp_path / "saved", tmp_path / "out", "cifar10", size=None))
    dataset = PackedSet(tmp_path / "out")
    batch = dataset.fetch(torch.arange(5))
    assert torch.equal(batch.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert batch.labels.tolist() == [3, 0, 9, 3, 7]
    assert dataset.class_names == tuple(names)
    datasets.enable_progress_bars()
