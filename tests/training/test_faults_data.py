"""Data that break before or during a training: named, nothing lost, and the mended run equals an uninterrupted one."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import scalelong_fast.training.batches as batches
from scalelong_fast.cli import main
from scalelong_fast.data.packed import PackedSet, verify
from scalelong_fast.errors import UserError
from scalelong_fast.training.step import TrainStep

#: Runs a command whose files may not grow beyond so many bytes: the system itself refuses, in the middle of a write.
LIMITED = """
import resource, sys
from scalelong_fast.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """40 grey images of 8×8 in two class folders."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(40):
        file = folder / ("even", "odd")[index % 2] / f"{index:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
    return folder


@pytest.fixture
def command(pictures):
    """``command(out)``: arguments that pack the pictures."""
    options = ["--source", str(pictures), "--size", "8", "--channels", "1", "--workers", "1", "--shard-mib", "1"]
    return lambda out, *more: ["prepare", "folder", str(out), *options, *more]


@pytest.fixture
def prepare(command, monkeypatch):
    """``prepare(out)``: run that command here, with 16 samples in a shard; gives the exit code."""

    def run(out, *more):
        with monkeypatch.context() as patch:
            patch.setattr("scalelong_fast.data.prepare.pixels.PixelPacker.sample_bytes", lambda _: (1 << 20) // 16)
            return main(command(out, *more))

    return run


@pytest.fixture
def packed(prepare, tmp_path, monkeypatch):
    """A packed set of three shards that counts as too large for the device."""
    monkeypatch.setattr(batches, "DEVICE_RESIDENT_BYTES", 0)
    assert prepare(tmp_path / "packed") == 0
    assert len(list((tmp_path / "packed").glob("*.images.bin"))) == 3
    return tmp_path / "packed"


@pytest.fixture
def config(tiny, packed):
    """A run on it."""
    return tiny({"data.name": "packed", "data.path": packed, "model.num_classes": 3, "diffusion.label_dropout": 0.1})


@pytest.fixture
def assert_equals_reference(config, train, tmp_path, last_state, assert_same):
    """Assert that a run ended as one that nothing happened to."""
    train(config, tmp_path / "reference")
    reference = last_state(tmp_path / "reference")
    return lambda out: assert_same(last_state(out), reference)


def test_shard_cut_off_during_a_training(
    config, packed, train, tmp_path, last_state, assert_equals_reference, monkeypatch
):
    victim = packed / "shard-00001.images.bin"
    whole, call = victim.read_bytes(), TrainStep.__call__

    def cutting(self, step, draw):
        if step == 4:  # the batches of the next two may have been read already
            with open(victim, "r+b") as file:
                file.truncate(10)
        return call(self, step, draw)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", cutting)
        with pytest.raises(UserError, match=rf"{victim} has 10 bytes.*prepare command with --verify"):
            train(config, tmp_path / "run")
    assert last_state(tmp_path / "run")[0] == 4
    victim.write_bytes(whole)
    reached, said = train(config, tmp_path / "run")
    assert reached == 10
    assert "Going on from step 4 of 10" in said
    assert_equals_reference(tmp_path / "run")


@pytest.mark.parametrize("fault", ["missing shard", "altered labels", "torn manifest", "no manifest"])
def test_damage_between_two_trainings(config, packed, prepare, train, tmp_path, tree, assert_equals_reference, fault):
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4)), tmp_path / "run")
    name = {"missing shard": "shard-00002.images.bin", "altered labels": "shard-00000.labels.bin"}
    victim = packed / name.get(fault, "manifest.json")
    content = victim.read_bytes()
    if fault == "altered labels":
        victim.write_bytes(b"\x07" * len(content))
    else:
        victim.unlink()
    if fault == "torn manifest":
        victim.write_bytes(content[: len(content) // 2])
    before = tree(tmp_path / "run")
    with pytest.raises(UserError, match=rf"--data\.path: .*{victim.name}.* same scalelong-fast prepare command"):
        train(config, tmp_path / "run")
    assert tree(tmp_path / "run") == before

    if fault == "torn manifest":
        victim.unlink()
    assert prepare(packed, "--verify") == 0
    assert verify(packed) == {}
    reached, _ = train(config, tmp_path / "run")
    assert reached == 10
    assert_equals_reference(tmp_path / "run")


def test_other_images_of_the_same_shape(config, packed, pictures, prepare, train, tmp_path, tree):
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4)), tmp_path / "run")
    assert prepare(tmp_path / "fewer", "--limit", "39") == 0
    before = tree(tmp_path / "run")
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, path=tmp_path / "fewer"))
    with pytest.raises(UserError, match="trained on other images"):
        train(other, tmp_path / "run")
    assert tree(tmp_path / "run") == before


def test_disk_full_while_preparing(command, prepare, python, tmp_path):
    """A file system that refuses a shard, then room again: the set is that of an uninterrupted preparation."""
    assert prepare(tmp_path / "whole") == 0
    done = python(LIMITED, 2000, *command(tmp_path / "set"))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"OUT: packing into '{tmp_path / 'set'}' stopped" in done.stderr
    assert "free some space" in done.stderr
    assert not [path for path in (tmp_path / "set").iterdir() if path.name.endswith(".tmp")]
    with pytest.raises(UserError, match="not finished"):
        PackedSet(tmp_path / "set")
    assert main(command(tmp_path / "set")) == 0
    assert verify(tmp_path / "set") == {}
    assert len(PackedSet(tmp_path / "set")) == 40


def test_picture_that_is_none(prepare, pictures, tmp_path, capsys):
    torn = pictures / "odd" / "99.png"
    torn.write_bytes((pictures / "odd" / "01.png").read_bytes()[:40])
    try:
        assert prepare(tmp_path / "set") == 2
        said = capsys.readouterr().err
        assert "'odd/99.png' cannot be read as an image" in said
        assert "so far is kept. Leave it out with --skip-unreadable, or mend or remove it" in said
    finally:
        torn.unlink()
    assert prepare(tmp_path / "set") == 0
    assert verify(tmp_path / "set") == {}
