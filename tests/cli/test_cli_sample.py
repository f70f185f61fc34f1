"""``scalelong-fast sample``: the files it writes, what an image depends on, and what it refuses."""

import shutil

import numpy as np
import pytest

import scalelong_fast.cli.sample as sample_command
from scalelong_fast.cli.sample import parse_labels
from scalelong_fast.errors import UserError

image_module = pytest.importorskip("PIL.Image")


@pytest.fixture
def sample(cli, trained, tmp_path):
    """``sample("--labels", "3")``: the (images, labels) written by a successful command."""

    def run(*options):
        out = tmp_path / "images.npz"
        result = cli("sample", trained, "--out", out, "--num-per-label", "2", "--device", "cpu", *options)
        assert result.code == 0, result.err
        with np.load(out) as arrays:
            assert set(arrays) == {"images", "labels"}
            return arrays["images"], arrays["labels"]

    return run


class TestFiles:
    def test_arrays(self, sample):
        images, labels = sample("--labels", "7,0,3")
        assert images.shape == (6, 8, 8, 1)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert labels.tolist() == [7, 7, 0, 0, 3, 3]

    def test_all_labels_by_default(self, sample):
        images, labels = sample()
        assert images.shape == (20, 8, 8, 1)
        assert labels.tolist() == [label for label in range(10) for _ in range(2)]

    def test_a_picture(self, cli, trained, tmp_path):
        out = tmp_path / "new" / "folder" / "grid.png"
        result = cli("sample", trained, "--labels", "3,7", "--num-per-label", "4", "--out", out)
        assert result.code == 0, result.err
        with image_module.open(out) as grid:
            assert grid.size == (4 * 50 - 2, 2 * 50 - 2)
        assert f"8 images of 8×8 in {out}" in result.out.replace("\n", "")

    def test_the_run_folder_by_default(self, cli, trained, tmp_path):
        run = tmp_path / "copy"
        shutil.copytree(trained, run)
        assert cli("sample", run, "--labels", "1", "--num-per-label", "1").code == 0
        assert (run / "generated.npz").is_file()

    def test_nothing_else_is_written(self, sample, trained, tmp_path):
        before = sorted(trained.rglob("*"))
        sample("--labels", "1")
        assert sorted(trained.rglob("*")) == before
        assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]


class TestWhatAnImageDependsOn:
    def test_not_on_chance(self, sample):
        assert np.array_equal(sample()[0], sample()[0])

    def test_not_on_the_batch_size(self, cli, trained, tmp_path):
        files = []
        for size in (3, 256):
            files.append(tmp_path / f"{size}.npz")
            result = cli("sample", trained, "--num-per-label", "2", "--batch-size", size, "--out", files[-1])
            assert result.code == 0, result.err
        with np.load(files[0]) as a, np.load(files[1]) as b:
            assert a["images"].tobytes() == b["images"].tobytes()
            assert a["labels"].tobytes() == b["labels"].tobytes()

    def test_not_on_the_other_classes_nor_their_order(self, sample):
        images, labels = sample()
        alone, _ = sample("--labels", "4")
        swapped, _ = sample("--labels", "9,4")
        assert np.array_equal(images[labels == 4], alone)
        assert np.array_equal(swapped[2:], alone)

    def test_not_on_how_many_are_drawn(self, sample):
        few, _ = sample("--labels", "4")
        many, _ = sample("--labels", "4", "--num-per-label", "5")
        assert np.array_equal(many[:2], few)

    def test_on_the_seed(self, sample):
        assert np.array_equal(sample("--labels", "4", "--seed", "0")[0], sample("--labels", "4")[0])
        assert not np.array_equal(sample("--labels", "4", "--seed", "1")[0], sample("--labels", "4")[0])

    def test_on_the_guidance(self, sample):
        assert np.array_equal(sample("--labels", "4", "--guidance", "2")[0], sample("--labels", "4")[0])
        for guidance in ("0", "1", "4"):
            assert not np.array_equal(sample("--labels", "4", "--guidance", guidance)[0], sample("--labels", "4")[0])

    @pytest.mark.parametrize(("name", "alias"), [("ddim", "DDIM"), ("dpm-solver++", "dpmpp"), ("euler-maruyama", "em")])
    def test_samplers_go_by_several_names(self, sample, name, alias):
        options = ("--labels", "4", "--steps", "3", "--sampler")
        assert np.array_equal(sample(*options, name)[0], sample(*options, alias)[0])

    def test_on_the_sampler_and_its_steps(self, sample):
        drawn = [
            sample("--labels", "4", "--steps", steps, "--sampler", sampler)[0].tobytes()
            for sampler in ("ddim", "dpm-solver++", "euler-maruyama")
            for steps in ("3", "4")
        ]
        assert len(set(drawn)) == 6


class TestRefusals:
    @pytest.mark.parametrize(
        "case",
        [
            (["--labels", "10"], ["--labels: got 10, expected 0 … 9", "null class"]),
            (["--labels", "3,11"], ["--labels: got 11, expected 0 … 9"]),
            (["--labels", "-1"], ["--labels: got -1, expected 0 … 9"]),
            (["--labels", "three"], ["--labels: got 'three'", "whole numbers with commas"]),
            (["--labels", "3 7"], ["--labels: got '3 7'"]),
            (["--labels", ""], ["--labels: got ''"]),
            (["--labels", "3,"], ["--labels: got '3,'"]),
            (["--steps", "0"], ["--steps: got 0"]),
            (["--steps", "1001"], ["--steps: got 1001"]),
            (["--num-per-label", "0"], ["--num-per-label: got 0"]),
            (["--batch-size", "0"], ["--batch-size: got 0"]),
            (["--seed", "-1"], ["--seed: got -1"]),
            (["--guidance", "-1"], ["--guidance: got -1"]),
            (["--guidance", "nan"], ["--guidance: got nan"]),
            (["--sampler", "dimm"], ["sampler: got 'dimm'", "Did you mean 'ddim'"]),
            (["--device", "gpu"], ["device: got 'gpu'"]),
        ],
        ids=lambda case: " ".join(case[0]),
    )
    def test_bad_values(self, cli, trained, tmp_path, assert_refused, case):
        options, texts = case
        assert_refused(cli("sample", trained, "--out", tmp_path / "x.npz", *options), *texts)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["images", "images.jpg", "images.npz.gz"])
    def test_an_unknown_kind_of_file(self, cli, trained, tmp_path, assert_refused, name):
        assert_refused(cli("sample", trained, "--out", tmp_path / name), "--out: got", "ends in .npz or .png")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["images.npz", "images.png"])
    @pytest.mark.parametrize("below", [".", "deeper"])
    def test_a_place_below_a_file(self, cli, trained, tmp_path, assert_refused, name, below):
        (tmp_path / "file").write_text("x")
        out = tmp_path / "file" / below / name
        assert_refused(cli("sample", trained, "--labels", "1", "--num-per-label", "1", "--out", out), "--out: cannot")

    def test_a_place_that_cannot_be_written_is_found_before_the_images_are_drawn(
        self, cli, trained, tmp_path, assert_refused, monkeypatch
    ):
        (tmp_path / "file").write_text("x")
        monkeypatch.setattr(sample_command, "generate", lambda *args, **options: pytest.fail("drew images first"))
        assert_refused(cli("sample", trained, "--out", tmp_path / "file" / "x.npz"), "--out: cannot")

    def test_a_folder_in_place_of_the_file(self, cli, trained, tmp_path, assert_refused):
        (tmp_path / "x.npz").mkdir()
        result = cli("sample", trained, "--labels", "1", "--num-per-label", "1", "--out", tmp_path / "x.npz")
        assert_refused(result, "--out: cannot write")
        assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]

    def test_no_run(self, cli, tmp_path, assert_refused):
        assert_refused(cli("sample", tmp_path / "nowhere"), "RUN: got", "the folder of a training run")

    @pytest.mark.parametrize("share", [0, 0.5, 0.99])
    def test_a_truncated_model(self, cli, trained, tmp_path, assert_refused, share):
        shutil.copytree(trained, tmp_path / "run")
        weights = tmp_path / "run" / "ema" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])
        assert_refused(cli("sample", tmp_path / "run"), "RUN: the model in", "cannot be read")

    def test_a_run_without_a_model_yet(self, cli, trained, tmp_path, assert_refused):
        shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("ema"))
        assert_refused(cli("sample", tmp_path / "run"), "has no trained model yet")

    def test_an_unknown_option(self, cli, trained):
        result = cli("sample", trained, "--label", "3")
        assert result.code == 2
        assert "--label" in result.err

    def test_a_word_for_a_number(self, cli, trained):
        result = cli("sample", trained, "--steps", "many")
        assert result.code == 2
        assert "many" in result.err


class TestUnconditional:
    def test_images_are_labelled_minus_one(self, cli, unconditional, tmp_path):
        result = cli("sample", unconditional, "--num-per-label", "3", "--out", tmp_path / "x.npz")
        assert result.code == 0, result.err
        with np.load(tmp_path / "x.npz") as arrays:
            assert arrays["images"].shape == (3, 8, 8, 1)
            assert arrays["labels"].tolist() == [-1, -1, -1]

    def test_the_grid_of_the_run_is_square(self, unconditional):
        with image_module.open(unconditional / "samples.png") as grid:
            assert grid.size == (2 * 50 - 2, 2 * 50 - 2)

    def test_labels_are_refused(self, cli, unconditional, assert_refused):
        assert_refused(cli("sample", unconditional, "--labels", "3"), "--labels: got [3], expected none")

    def test_guidance_is_refused(self, cli, unconditional, assert_refused):
        assert_refused(cli("sample", unconditional, "--guidance", "2"), "--guidance: got 2.0, expected 1")


class TestParseLabels:
    @pytest.mark.parametrize(
        ("text", "labels"), [(None, None), ("3", [3]), ("3,1,3", [3, 1, 3]), (" 3, 4 ", [3, 4]), ("-1", [-1])]
    )
    def test_whole_numbers(self, text, labels):
        assert parse_labels(text) == labels

    @pytest.mark.parametrize("text", ["", ",", "1,,2", "1.5", "a", "1;2"])
    def test_anything_else(self, text):
        with pytest.raises(UserError, match=r"^--labels: got"):
            parse_labels(text)
