"""A folder whose images are decoded when they are fetched: the same images as of the folder in memory."""

import numpy as np
import pytest
import torch

from scalelong_fast.data import folder_set, load_images
from scalelong_fast.data.folder_set import FolderSet
from scalelong_fast.errors import UserError

image_module = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


def save(path, shape):
    path.parent.mkdir(parents=True, exist_ok=True)
    image_module.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def classes(tmp_path):
    """Five images of several sizes in two classes, one of them grey and one with transparency."""
    for index, shape in enumerate([(9, 12, 3), (8, 8), (20, 8, 4), (8, 8, 3), (31, 33, 3)]):
        save(tmp_path / "set" / ("b" if index % 2 else "a") / f"{index}.png", shape)
    return tmp_path / "set"


@pytest.mark.parametrize("workers", [1, 4])
def test_it_is_the_folder_in_memory(classes, workers):
    memory = load_images("folder", path=classes, img_size=8)
    lazy = FolderSet(classes, 8, workers)
    assert (len(lazy), lazy.image_shape, lazy.num_classes) == (5, (3, 8, 8), 2)
    assert (lazy.class_names, lazy.latent, lazy.nbytes) == (("a", "b"), False, memory.nbytes)
    chosen = torch.tensor([4, 0, 0, 2])
    assert torch.equal(lazy.fetch(chosen).images, memory.fetch(chosen).images)
    assert torch.equal(lazy.fetch(chosen).labels, memory.fetch(chosen).labels)
    assert lazy.fetch(chosen[:0]).images.shape == (0, 3, 8, 8)
    with pytest.raises(IndexError):
        lazy.fetch(torch.tensor([5]))


def test_grey_images_come_in_colour(tmp_path):
    save(tmp_path / "0.png", (8, 8))
    lazy, memory = FolderSet(tmp_path), load_images("folder", path=tmp_path)
    assert lazy.fetch(torch.arange(1)).labels is None
    assert torch.equal(lazy.fetch(torch.arange(1)).images, memory.images.expand(-1, 3, -1, -1))


def test_only_what_is_fetched_is_decoded(classes, monkeypatch):
    decoded, real = [], folder_set.decode
    monkeypatch.setattr(folder_set, "decode", lambda file, *a, **o: decoded.append(file.name) or real(file, *a, **o))
    FolderSet(classes, 8, workers=1).fetch(torch.tensor([3, 1]))
    assert decoded == ["1.png", "2.png"]


def test_the_fingerprint_is_that_of_the_files_and_the_size(classes, tmp_path):
    first = FolderSet(classes, 8).fingerprint()
    assert FolderSet(classes.rename(tmp_path / "moved"), 8).fingerprint() == first
    moved = tmp_path / "moved"
    assert FolderSet(moved, 9).fingerprint() != first
    (moved / "a" / "0.png").rename(moved / "a" / "00.png")
    assert FolderSet(moved, 8).fingerprint() != first


def test_what_cannot_be_read_is_named(classes):
    with pytest.raises(UserError, match=r"--reference: '.*0\.png' has 12x9 pixels, expected a square.*--img-size"):
        FolderSet(classes, argument="--reference")
    (classes / "a" / "0.png").unlink()
    save(classes / "a" / "0.png", (9, 9, 3))
    with pytest.raises(UserError, match=r"--data\.path: '.*2\.png' has 8x20 pixels, expected .* 9x9 as the first"):
        FolderSet(classes).fetch(torch.tensor([1]))
    (classes / "b" / "3.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"--data\.path: '.*3\.png' cannot be read as an image"):
        FolderSet(classes, 8).fetch(torch.arange(5))
    save(classes / "loose.png", (8, 8, 3))
    with pytest.raises(UserError, match=r"NAME: .*loose\.png"):
        FolderSet(classes, 8, argument="NAME")
