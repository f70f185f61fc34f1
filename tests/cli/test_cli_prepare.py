"""``scalelong-fast prepare``, and a run on what it wrote."""

import shutil

import numpy as np
import pytest

from scalelong_fast.data.prepare import RECIPES

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(16):
        file = root / f"class_{index % 2}" / f"{index:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(file)
    return root


@pytest.fixture(scope="module")
def packed(cli, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "set"
    result = cli("prepare", "folder", out, "--source", images, "--size", 8)
    assert result.code == 0, result.err
    assert "16 images of 3×8×8, 2 classes" in result.out.replace("\n", " ")
    return out


def test_help_lists_the_data_sets(cli):
    result = cli("prepare", "--help")
    assert result.code == 0
    assert all(f"  {name} " in result.out for name in RECIPES)
    assert cli("prepare").code == 2
    options = cli("prepare", "coco256", "--help")
    assert options.code == 0
    assert "--text-encoder" in options.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagenet"], "Did you mean 'imagenet64'"),
        (["--source", "x"], "NAME: got '--source'"),
        (["folder"], "OUT: got None"),
        (["folder", "--size", "8"], "OUT: got '--size'"),
        (["folder", "OUT"], "--size: got None"),
        (["folder", "OUT", "--size", "8"], "--source: got None"),
        (["folder", "OUT", "--size", "8", "--source", "/nowhere"], "There is no such file"),
        (["folder", "OUT", "--size", "8", "--device", "cdua"], "--device"),
        (["folder", "OUT", "--size", "8", "--crop", "amd"], "Did you mean 'adm'"),
    ],
)
def test_wrong_arguments_are_explained(cli, tmp_path, arguments, message):
    result = cli("prepare", *(tmp_path / "out" if argument == "OUT" else argument for argument in arguments))
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_a_finished_set_is_verified_without_its_source(cli, packed):
    result = cli("prepare", "folder", packed, "--verify")
    assert result.code == 0, result.err
    assert "every file is as it was written" in result.out


def test_the_name_of_another_set_is_refused(cli, packed):
    result = cli("prepare", "imagenet64", packed, "--verify")
    assert result.code == 2
    assert "NAME: got 'imagenet64', expected folder" in result.err


def test_images_that_cannot_be_read(cli, images, tmp_path):
    root = shutil.copytree(images, tmp_path / "images")
    (root / "class_1" / "15.png").write_bytes(b"not an image")
    arguments = ("prepare", "folder", tmp_path / "set", "--source", root, "--size", 8)
    result = cli(*arguments)
    assert result.code == 2
    assert "'class_1/15.png' cannot be read as an image" in result.err
    result = cli(*arguments, "--skip-unreadable")
    assert result.code == 0, result.err
    printed = result.out.replace("\n", " ")
    assert "Left out, since they cannot be read: 1 images (class_1/15.png)" in printed
    assert "15 images of 3×8×8, 2 classes" in printed


def test_an_image_that_does_not_fit_into_memory(cli, images, tmp_path):
    result = cli("prepare", "folder", tmp_path / "set", "--source", images, "--size", 99_999_999)
    assert result.code == 2
    assert "does not fit into memory. Give a smaller --shard-mib or --size" in result.err


def test_a_set_that_is_not_complete(cli, images, tmp_path):
    result = cli("prepare", "imagenet64", tmp_path / "set", "--source", images)
    assert result.code == 2
    assert "has 16 images, imagenet64 1,281,167 (train)" in result.err
    assert not (tmp_path / "set").exists()


def test_damage_is_named_and_mended(cli, images, tmp_path):
    out = tmp_path / "set"
    arguments = ("prepare", "folder", out, "--source", images, "--size", 8)
    assert cli(*arguments).code == 0
    file = out / "shard-00000.images.bin"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    result = cli("prepare", "folder", out, "--verify")
    assert result.code == 2
    assert "shard-00000.images.bin has another content" in result.err
    assert cli(*arguments, "--verify").code == 0
    assert file.read_bytes() == good


def test_a_run_trains_on_a_packed_set_and_goes_on(cli, tiny, packed, tmp_path):
    options = [
        *("--data.name", "packed", "--data.path", packed, "--model.in-chans", 3, "--model.num-classes", 3),
        *("--out", tmp_path / "run"),
    ]
    result = cli("train", "digits-uvit", *tiny, *options)
    assert result.code == 0, result.err
    assert "16 images (folder)" in result.out.replace("\n", " ")
    result = cli("train", "digits-uvit", *tiny, *options, "--train.steps", 3)
    assert result.code == 0, result.err
    file = packed / "shard-00000.images.bin"
    moved = file.rename(packed / "moved")
    try:
        result = cli("train", "digits-uvit", *tiny, *options, "--train.steps", 4)
    finally:
        moved.rename(file)
    assert result.code == 2
    assert "shard-00000.images.bin is missing" in result.err


def test_a_run_trains_on_synthetic_images(cli, tiny, tmp_path):
    options = ["--data.name", "synthetic", "--data.size", 64, "--out", tmp_path / "run"]
    result = cli("train", "digits-uvit", *tiny, *options)
    assert result.code == 0, result.err
    assert "64 images (synthetic)" in result.out.replace("\n", " ")
