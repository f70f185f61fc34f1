"""References: files of statistics and features, and ``scalelong-fast fid-stats``."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scalelong_fast.errors import UserError
from scalelong_fast.evaluation import (
    ExtractorIdentity,
    Reference,
    load_reference,
    measure_dataset,
    moments_of,
    save_reference,
)
from scalelong_fast.evaluation.reference import check_extractor

image_module = pytest.importorskip("PIL.Image")
IDENTITY = ExtractorIdentity("net", "0123456789abcdef", 5)


@pytest.fixture
def features():
    return torch.randn(30, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pictures(tmp_path):
    """A folder of 7 colour images of 8×8 in two classes."""
    generator = np.random.default_rng(0)
    for number in range(7):
        folder = tmp_path / "pictures" / ("a" if number < 3 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        image_module.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def means(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return "networks_for_extractor_tests:means"


class TestFiles:
    @pytest.mark.parametrize("keep", [True, False])
    def test_everything_comes_back(self, tmp_path, features, keep):
        stored = Reference("set", moments_of(features), IDENTITY, "f00d", (10, 20), features if keep else None)
        save_reference(tmp_path / "stats.npz", stored)
        loaded = load_reference(tmp_path / "stats.npz")
        assert (loaded.name, loaded.extractor, loaded.data_fingerprint) == ("set", IDENTITY, "f00d")
        assert loaded.label_counts == (10, 20)
        assert loaded.moments.count == 30
        assert torch.equal(loaded.moments.mean, stored.moments.mean)
        assert torch.equal(loaded.moments.covariance, stored.moments.covariance)
        assert (loaded.features is None) if not keep else torch.equal(loaded.features, features)
        assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]

    def test_the_files_of_pytorch_fid(self, tmp_path, features):
        moments = moments_of(features)
        np.savez(tmp_path / "fid.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
        loaded = load_reference(tmp_path / "fid.npz")
        assert loaded.extractor is None
        assert loaded.describe() == {"name": "fid.npz", "n": 0, "data_fingerprint": None}
        assert torch.equal(loaded.moments.covariance, moments.covariance)

    def test_features_alone(self, tmp_path, features):
        np.savez(tmp_path / "features.npz", features=features.numpy().astype(np.float16))
        loaded = load_reference(tmp_path / "features.npz")
        assert loaded.moments.count == 30
        torch.testing.assert_close(loaded.features, features, atol=1e-2, rtol=1e-2)

    @pytest.mark.parametrize(
        ("arrays", "text"),
        [
            ({"pictures": np.zeros(3)}, "It holds none of them"),
            ({"mean": np.zeros(3)}, "It holds mean"),
            ({"mean": np.zeros(3), "covariance": np.zeros((2, 3))}, "Their shapes are (3,) and (2, 3)"),
            ({"mu": np.array([np.nan]), "sigma": np.ones((1, 1))}, "finite numbers. mu holds others"),
            ({"features": np.zeros(8)}, "features (N, F)"),
            ({"features": np.zeros((1, 8))}, "at least 2 images"),
            ({"mean": np.zeros(1), "covariance": np.ones((1, 1)), "facts": np.array("{")}, "facts are damaged"),
            (
                {"mean": np.zeros(1), "covariance": np.ones((1, 1)), "facts": np.array(json.dumps({"format": 9}))},
                "expected format 1",
            ),
        ],
    )
    def test_others_are_refused(self, tmp_path, arrays, text):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(UserError) as error:
            load_reference(tmp_path / "x.npz")
        assert str(error.value).startswith("--reference: got")
        assert text in str(error.value)

    def test_a_single_array_under_the_name_of_several(self, tmp_path):
        with open(tmp_path / "x.npz", "wb") as file:
            np.save(file, np.zeros((3, 4)))
        with pytest.raises(UserError, match="It cannot be read"):
            load_reference(tmp_path / "x.npz")

    @pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04 torn"])
    def test_files_that_cannot_be_read(self, tmp_path, content):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(UserError, match="It cannot be read"):
            load_reference(tmp_path / "x.npz")
        with pytest.raises(UserError, match=r"--features: got .*It cannot be read"):
            load_reference(tmp_path / "nowhere.npz", "--features")


class TestExtractors:
    def test_the_same_one(self, features):
        assert check_extractor(Reference("set", moments_of(features), IDENTITY), IDENTITY) is None

    @pytest.mark.parametrize(
        "other", [ExtractorIdentity("inception", IDENTITY.fingerprint, 5), ExtractorIdentity("net", "f" * 16, 5)]
    )
    def test_another_is_refused_with_the_mend(self, features, other):
        with pytest.raises(UserError, match=r"features of two networks cannot be compared. Give --extractor net with"):
            check_extractor(Reference("set", moments_of(features), IDENTITY), other)

    def test_a_file_that_does_not_say_is_warned_about(self, features):
        unknown = Reference("fid.npz", moments_of(features))
        assert "does not say which extractor" in check_extractor(unknown, IDENTITY)
        with pytest.raises(UserError, match=r"fid\.npz has 5 features an image, but extractor 'net' gives 2048"):
            check_extractor(unknown, ExtractorIdentity("net", "f" * 16, 2048))


class TestDataSets:
    @pytest.mark.parametrize("batch_size", [7, 1000])
    def test_all_images_count(self, digits, extractor, batch_size):
        reference = measure_dataset(digits, extractor, batch_size=batch_size, keep=True)
        expected = moments_of(extractor(digits.images))
        assert reference.moments.count == 1797
        torch.testing.assert_close(reference.moments.covariance, expected.covariance, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(reference.features, extractor(digits.images))
        assert reference.data_fingerprint == digits.fingerprint()
        assert reference.label_counts == tuple(digits.labels.bincount().tolist())
        assert reference.extractor.name == "digits"


@pytest.mark.usefixtures("quick_classifier")
class TestCommand:
    def test_digits(self, cli, digits, extractor, tmp_path):
        result = cli("fid-stats", "digits", "--out", tmp_path / "new" / "digits.npz", "--device", "cpu")
        assert result.code == 0, result.err
        assert "64 features by digits of 1,797 images (digits)" in result.out
        reference = load_reference(tmp_path / "new" / "digits.npz")
        assert reference.extractor.fingerprint == extractor.fingerprint
        assert reference.features is None
        torch.testing.assert_close(reference.moments.mean, moments_of(extractor(digits.images)).mean, atol=1e-6, rtol=0)

    def test_a_folder(self, cli, pictures, means, tmp_path):
        out = tmp_path / "stats.npz"
        options = ("--extractor", means, "--device", "cpu", "--out", out)
        result = cli("fid-stats", pictures, "--keep-features", "--batch-size", "2", *options)
        assert result.code == 0, result.err
        reference = load_reference(out)
        assert reference.features.shape == (7, 12)
        assert reference.label_counts == (3, 4)
        assert cli("fid-stats", pictures, "--img-size", "4", *options).code == 0
        assert load_reference(out).features is None
        assert load_reference(out).data_fingerprint != reference.data_fingerprint

    def test_features_from_elsewhere(self, cli, features, tmp_path):
        np.savez(tmp_path / "features.npz", features=features.numpy())
        result = cli("fid-stats", tmp_path / "features.npz", "--out", tmp_path / "stats.npz")
        assert result.code == 0, result.err
        assert load_reference(tmp_path / "stats.npz").features is None
        assert torch.equal(load_reference(tmp_path / "stats.npz").moments.mean, moments_of(features).mean)

    def test_refusals(self, cli, assert_refused, tmp_path, pictures, means):
        out = ("--out", tmp_path / "x.npz")
        assert_refused(cli("fid-stats", "digit", *out), "NAME_OR_FOLDER: got 'digit'", "Did you mean 'digits'")
        assert_refused(cli("fid-stats", "digits", "--out", tmp_path / "x.txt"), "--out: got", "ends in .npz")
        assert_refused(cli("fid-stats", "digits", *out, "--batch-size", "0"), "--batch-size: got 0")
        assert_refused(cli("fid-stats", "digits", *out, "--img-size", "0"), "--img-size: got 0")
        assert_refused(cli("fid-stats", "--out", tmp_path / "x.npz"), "NAME_OR_FOLDER: got '--out'", "data first")
        assert_refused(cli("fid-stats", pictures, "--extractor", "digit", *out), "--extractor: got 'digit'")
        assert_refused(cli("fid-stats", pictures, "--img-size", "9", "--extractor", "digits", *out), "images of 8×8")
        assert_refused(cli("fid-stats", "digits", "--img-size", "9", *out), "--img-size: got 9", "files of a folder")
        assert_refused(cli("fid-stats", "digits", "--path", tmp_path, *out), "--path: got")
        (tmp_path / "file").write_text("x")
        assert_refused(cli("fid-stats", "digits", "--out", tmp_path / "file" / "x.npz"), "--out: cannot write")
        (tmp_path / "one").mkdir()
        next(pictures.rglob("*.png")).rename(tmp_path / "one" / "x.png")
        assert_refused(cli("fid-stats", tmp_path / "one", "--extractor", means, *out), "at least 2")
        assert not (tmp_path / "x.npz").exists()

    def test_help(self, cli):
        assert "--keep-features" in cli("fid-stats", "--help").out
