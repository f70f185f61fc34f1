"""Data sets by name: digits and CIFAR-10 (from tiny local copies), and the errors they explain."""

import sys

import numpy as np
import pytest
import torch

from scalelong_fast.data import list_datasets, load_images
from scalelong_fast.errors import UserError

datasets = pytest.importorskip("datasets")
image_module = pytest.importorskip("PIL.Image")

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
LABELS = [3, 0, 9, 3, 7]


def fake_cifar(column="img", pixels=PIXELS, labels=LABELS, names=NAMES):
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(
        {column: [None if one is None else image_module.fromarray(one) for one in pixels], "label": labels},
        features=datasets.Features({column: datasets.Image(), "label": label}),
    )


def assert_is_the_fake(loaded):
    assert torch.equal(loaded.images, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert loaded.labels.tolist() == LABELS
    assert loaded.num_classes == 10
    assert loaded.class_names == tuple(NAMES)
    assert loaded.name == "cifar10"


class TestNames:
    def test_lists_the_known_names(self):
        assert list_datasets() == ["cifar10", "digits", "folder"]

    def test_an_unknown_name_gets_a_suggestion(self):
        with pytest.raises(UserError, match=r"data\.name: got 'cifar'.*Did you mean 'cifar10'"):
            load_images("cifar")

    @pytest.mark.parametrize("size", [0, -8, 8.0])
    def test_a_size_must_be_a_positive_whole_number(self, size):
        with pytest.raises(UserError, match=r"--model\.img-size: got"):
            load_images("digits", img_size=size)

    @pytest.mark.parametrize("name", ["cifar10", "folder"])
    def test_a_path_must_be_an_existing_folder(self, name, tmp_path):
        file = tmp_path / "file"
        file.write_text("x")
        with pytest.raises(UserError, match=r"--data\.path: .*missing' does not exist"):
            load_images(name, path=tmp_path / "missing")
        with pytest.raises(UserError, match="expected a folder, not a file"):
            load_images(name, path=file)
        with pytest.raises(UserError, match=r"--data\.path: got ''"):
            load_images(name, path="")


class TestDigits:
    def test_matches_scikit_learn(self):
        raw = pytest.importorskip("sklearn.datasets").load_digits()
        loaded = load_images("digits")
        assert loaded.images.shape == (1797, 1, 8, 8)
        assert loaded.images.dtype == torch.uint8
        scaled = torch.from_numpy(raw.images) * 255 / 16
        assert (loaded.images[:, 0] - scaled).abs().max() <= 0.5
        assert loaded.images.min() == 0
        assert loaded.images.max() == 255
        assert loaded.labels.tolist() == raw.target.tolist()
        assert loaded.num_classes == 10
        assert loaded.class_names == tuple("0123456789")

    def test_accepts_its_own_size(self):
        assert load_images("digits", img_size=8).image_shape == (1, 8, 8)

    def test_refuses_any_other_size(self):
        with pytest.raises(UserError, match=r"--model\.img-size: got 16.*native 8x8"):
            load_images("digits", img_size=16)

    def test_takes_no_path(self, tmp_path):
        with pytest.raises(UserError, match=r"--data\.path: .*expected none for digits"):
            load_images("digits", path=tmp_path)

    def test_a_missing_package_is_explained(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(UserError, match=r'sklearn\.datasets .*pip install "scalelong_fast\[train\]"'):
            load_images("digits")


class TestCifar10:
    def test_from_save_to_disk(self, tmp_path):
        fake_cifar().save_to_disk(tmp_path / "saved")
        assert_is_the_fake(load_images("cifar10", path=str(tmp_path / "saved"), img_size=32))

    def test_from_a_saved_dictionary_reads_the_training_split(self, tmp_path):
        splits = {"test": fake_cifar(pixels=255 - PIXELS), "train": fake_cifar()}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        assert_is_the_fake(load_images("cifar10", path=tmp_path / "saved"))

    @pytest.mark.parametrize("column", ["img", "image"])
    def test_from_parquet_with_either_column(self, column, tmp_path):
        fake_cifar(column).to_parquet(tmp_path / "data.parquet")
        assert_is_the_fake(load_images("cifar10", path=tmp_path))

    def test_from_parquet_in_the_layout_of_the_hub(self, tmp_path):
        (tmp_path / "plain_text").mkdir()
        folder = tmp_path / "plain_text"
        fake_cifar().select([0, 1, 2]).to_parquet(folder / "train-00000-of-00002.parquet")
        fake_cifar().select([3, 4]).to_parquet(folder / "train-00001-of-00002.parquet")
        fake_cifar(pixels=255 - PIXELS).to_parquet(folder / "test-00000-of-00001.parquet")
        assert_is_the_fake(load_images("cifar10", path=tmp_path))

    def test_from_parquet_not_written_by_datasets(self, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        table = fake_cifar(names=None).data.table.replace_schema_metadata(None)
        parquet.write_table(table, tmp_path / "plain.parquet")
        assert_is_the_fake(load_images("cifar10", path=tmp_path))

    def test_without_a_path_asks_the_hub(self, monkeypatch):
        asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or fake_cifar())
        assert_is_the_fake(load_images("cifar10"))
        assert asked == [(("uoft-cs/cifar10",), {"split": "train"})]

    def test_progress_shows_a_bar(self, tmp_path, capsys):
        fake_cifar().to_parquet(tmp_path / "data.parquet")
        load_images("cifar10", path=tmp_path, progress=True)
        assert "Decoding CIFAR-10" in capsys.readouterr().out

    def test_a_failed_download_is_explained(self, monkeypatch):
        def fail(*args, **kwargs):
            raise ConnectionError("no route to host")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(UserError, match=r"uoft-cs/cifar10.*no route to host.*--data\.path"):
            load_images("cifar10")

    def test_refuses_any_other_size(self):
        with pytest.raises(UserError, match=r"--model\.img-size: got 64.*native 32x32"):
            load_images("cifar10", img_size=64)

    def test_refuses_a_folder_without_a_copy(self, tmp_path):
        with pytest.raises(UserError, match="save_to_disk or one of parquet files"):
            load_images("cifar10", path=tmp_path)

    def test_refuses_a_saved_dictionary_without_a_training_split(self, tmp_path):
        datasets.DatasetDict({"test": fake_cifar()}).save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match=r"a split called 'train' among \['test'\]"):
            load_images("cifar10", path=tmp_path / "saved")

    @pytest.mark.parametrize("name", ["data.parquet", "state.json"])
    def test_explains_a_damaged_copy(self, name, tmp_path):
        (tmp_path / name).write_bytes(b"not what it says")
        with pytest.raises(UserError, match="cannot be read"):
            load_images("cifar10", path=tmp_path)

    @pytest.mark.parametrize(
        ("fake", "message"),
        [
            ({"column": "picture"}, r"columns \['picture', 'label'\].*'img' or 'image', and 'label'"),
            ({"pixels": np.zeros((5, 16, 32, 3), np.uint8)}, "image 0 of 32x16 pixels"),
            ({"pixels": [*PIXELS[:4], None]}, "nothing in place of image 4"),
            ({"names": ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"]}, "not 11 classes"),
            ({"names": None, "labels": [1, 2, 10, 3, 4]}, "labels: got 'values from 1 to 10'"),
            ({"names": None, "labels": [1, 2, None, 3, 4]}, "label None of image 2"),
        ],
    )
    def test_refuses_what_is_not_cifar10(self, fake, message, tmp_path):
        fake_cifar(**fake).save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match=message):
            load_images("cifar10", path=tmp_path / "saved")

    def test_refuses_an_empty_copy(self, tmp_path):
        # Some versions of datasets refuse it themselves, others hand over an empty table.
        fake_cifar(pixels=[], labels=[]).to_parquet(tmp_path / "data.parquet")
        with pytest.raises(UserError, match=r"cannot be read.*no data|at least one image"):
            load_images("cifar10", path=tmp_path)

    def test_refuses_damaged_images(self, tmp_path):
        broken = datasets.Dataset.from_dict({"img": [{"bytes": b"junk", "path": None}], "label": [0]})
        broken.save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match=r"column 'img' .*cannot be decoded as images"):
            load_images("cifar10", path=tmp_path / "saved")
