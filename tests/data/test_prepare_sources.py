"""Where images come from: folders, archives, tables; and what is refused."""

import dataclasses
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from scalelong_fast.data.prepare import RECIPES, PrepareOptions, Request
from scalelong_fast.data.prepare.captions import add_captions
from scalelong_fast.data.prepare.files import open_archive, open_folder
from scalelong_fast.data.prepare.run import open_source
from scalelong_fast.data.prepare.source import UnreadableError, classes_of, without_common_folder
from scalelong_fast.errors import UserError

Image = pytest.importorskip("PIL.Image")

RNG = np.random.default_rng(0)
FILES = ["b/1.png", "a/2.png", "a/deep/1.png", "c/x.JPEG"]


def encoded(suffix="png", size=8):
    file = io.BytesIO()
    pixels = RNG.integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "jpeg" if suffix.lower().startswith("j") else suffix)
    return file.getvalue()


@pytest.fixture(scope="module")
def images():
    return {name: encoded(name.rpartition(".")[2]) for name in FILES}


def write_folder(root, images):
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path, images, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in images.items():
            archive.writestr(prefix + name, data)
    return path


def write_tar(path, images, prefix="", mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in images.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def assert_is_the_source(source, images):
    assert list(source.class_names) == ["a", "b", "c"]
    assert source.labels.tolist() == [0, 0, 1, 2]
    assert [source.read(index) for index in range(4)] == [images[name] for name in sorted(images)]
    assert source.facts["images"] == len(source) == 4


def flat(images):
    return {f"train2014/{name.replace('/', '_')}": data for name, data in images.items()}


def request(name, source, **options):
    options = {"allow_partial": True, **options}
    return Request(RECIPES[name], Path("out"), torch.device("cpu"), PrepareOptions(source=str(source), **options))


class TestFilesAndArchives:
    def test_a_folder(self, tmp_path, images):
        root = write_folder(tmp_path / "root", images)
        (root / ".hidden").mkdir()
        (root / ".hidden" / "1.png").write_bytes(b"x")
        (root / "notes.txt").write_text("x")
        assert_is_the_source(open_folder(root), images)

    @pytest.mark.parametrize("prefix", ["", "train/", "data/train/", "./"])
    def test_a_zip_and_a_tar_with_or_without_a_top_folder(self, tmp_path, images, prefix):
        assert_is_the_source(open_archive(write_tar(tmp_path / "t.tar", images, prefix)), images)
        if prefix != "./":
            junk = {**images, "__MACOSX/a/._1.png": b"x"}
            assert_is_the_source(open_archive(write_zip(tmp_path / "z.zip", junk, prefix)), images)

    def test_a_tar_of_tars_has_a_class_for_each(self, tmp_path, images):
        inner = {}
        for letter in "abc":
            members = {name[2:]: data for name, data in images.items() if name.startswith(letter)}
            inner[f"{letter}.tar"] = write_tar(tmp_path / "inner", members).read_bytes()
        assert_is_the_source(open_archive(write_tar(tmp_path / "outer.tar", inner)), images)

    def test_images_in_one_folder_of_an_archive_are_unlabelled(self, tmp_path, images):
        flat = {f"img_align_celeba/{index}.png": data for index, data in enumerate(images.values())}
        source = open_archive(write_zip(tmp_path / "z.zip", flat))
        assert source.labels is None
        assert source.class_names == ()

    def test_one_class_folder_is_a_class(self, tmp_path, images):
        source = open_folder(write_folder(tmp_path, {"only/1.png": images["b/1.png"]}))
        assert source.class_names == ("only",)

    def test_the_fingerprint_is_that_of_the_files(self, tmp_path, images):
        one = open_folder(write_folder(tmp_path / "one", images)).facts["fingerprint"]
        assert open_folder(write_folder(tmp_path / "two", images)).facts["fingerprint"] == one
        changed = {**images, "a/2.png": images["a/2.png"] + b"x"}
        assert open_folder(write_folder(tmp_path / "three", changed)).facts["fingerprint"] != one
        zipped = open_archive(write_zip(tmp_path / "z.zip", images)).facts["fingerprint"]
        same_size = {**images, "a/2.png": images["a/2.png"][:-1] + b"x"}
        assert open_archive(write_zip(tmp_path / "y.zip", same_size)).facts["fingerprint"] != zipped

    def test_hidden_tars_in_a_tar_are_not_looked_at(self, tmp_path, images):
        inner = {"._a.tar": b"what macOS adds", "a.tar": write_tar(tmp_path / "inner", images).read_bytes()}
        assert len(open_archive(write_tar(tmp_path / "outer.tar", inner))) == 4

    def test_a_tar_that_ends_with_a_zip_is_a_tar(self, tmp_path, images):
        last = write_zip(tmp_path / "z.zip", {}).read_bytes()
        assert_is_the_source(open_archive(write_tar(tmp_path / "t.tar", {**images, "z.zip": last})), images)

    def test_a_folder_that_cannot_be_listed_is_named(self, tmp_path, images, monkeypatch):
        write_folder(tmp_path, images)
        scan = os.scandir

        def refuse(path):
            if str(path).endswith("b"):
                raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(UserError, match=r"--source: .*Permission denied.*/b"):
            open_folder(tmp_path)

    def test_a_broken_link_is_named(self, tmp_path, images):
        write_folder(tmp_path, images)
        (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
        with pytest.raises(UserError, match=r"--source: .*gone\.png"):
            open_folder(tmp_path)

    def test_a_compressed_tar_is_refused_with_the_mend(self, tmp_path, images):
        path = write_tar(tmp_path / "t.tar.gz", images, mode="w:gz")
        with pytest.raises(UserError, match=r"--source: got .*uncompressed \.tar.*Unpack it"):
            open_source(request("folder", path, size=8))

    @pytest.mark.parametrize("name", ["x.zip", "x.tar"])
    def test_a_damaged_archive_is_named(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"not an archive" * 100)
        with pytest.raises(UserError, match=rf"archive .*{name}' cannot be read"):
            open_archive(tmp_path / name)

    def test_an_empty_folder_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="expected a folder that holds images"):
            open_folder(tmp_path)

    def test_loose_images_beside_classes_are_refused(self, tmp_path, images):
        write_folder(tmp_path, {**images, "loose.png": images["a/2.png"]})
        with pytest.raises(UserError, match=r"loose\.png.*class folders \(first: 'a'"):
            open_folder(tmp_path)

    def test_splits_are_no_classes(self):
        with pytest.raises(UserError, match=r"are splits \(train, val\).*--source root/train"):
            classes_of(["train/a/1.png", "val/a/1.png"], "root")
        with pytest.raises(UserError, match=r"are splits \(train\).*--source root/train"):
            classes_of(["train/a/1.png", "train/b/1.png"], "root")

    @pytest.mark.parametrize(
        ("paths", "expected"),
        [
            (["a/1", "b/1"], ["a/1", "b/1"]),
            (["t/a/1", "t/b/1"], ["a/1", "b/1"]),
            (["t/a/1", "t/a/2"], ["1", "2"]),
            (["t/1", "t/a/2"], ["1", "a/2"]),
            (["1", "a/2"], ["1", "a/2"]),
        ],
    )
    def test_common_folders_are_left_out(self, paths, expected):
        assert without_common_folder(paths) == expected


@pytest.fixture(scope="module")
def datasets():
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    yield module
    module.enable_progress_bars()


class TestTables:
    @pytest.fixture
    def table(self, datasets, images):
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])}
        rows = [{"bytes": data, "path": None} for data in images.values()]
        return datasets.Dataset.from_dict({"image": rows, "label": [2, 0, 1, 1]}, features=datasets.Features(features))

    def assert_is_the_table(self, source, images):
        assert source.class_names == ("x", "y", "z")
        assert source.labels.tolist() == [2, 0, 1, 1]
        assert [source.read(index) for index in range(4)] == list(images.values())
        assert source.captions is None
        assert source.names[3].startswith("row 3 of ")

    def test_saved_to_disk(self, tmp_path, table, images):
        table.save_to_disk(tmp_path / "saved")
        self.assert_is_the_table(open_source(request("imagenet64", tmp_path / "saved")), images)

    def test_a_split_of_several(self, tmp_path, datasets, table, images):
        splits = datasets.DatasetDict({"train": table.select([0]), "valid": table})
        splits.save_to_disk(tmp_path / "saved")
        self.assert_is_the_table(open_source(request("imagenet64", tmp_path / "saved", split="valid")), images)
        with pytest.raises(UserError, match=r"--split: got 'test', expected one of train, valid"):
            open_source(request("imagenet64", tmp_path / "saved", split="test"))

    @pytest.mark.parametrize("layout", ["data/train-0.parquet", "train/0.parquet", "0.parquet"])
    def test_parquet(self, tmp_path, table, images, layout):
        path = tmp_path / "set" / layout
        path.parent.mkdir(parents=True)
        table.to_parquet(path)
        if layout != "0.parquet":
            table.select([0]).to_parquet(path.parent.parent / "test.parquet")
        self.assert_is_the_table(open_source(request("imagenet64", tmp_path / "set")), images)
        self.assert_is_the_table(open_source(request("imagenet64", path)), images)

    def test_parquet_without_the_split_asked_for_is_refused(self, tmp_path, table):
        (tmp_path / "data").mkdir()
        table.to_parquet(tmp_path / "data" / "validation-0.parquet")
        with pytest.raises(UserError, match=r"--split: got 'train', expected one of validation, the splits"):
            open_source(request("imagenet64", tmp_path))
        table.to_parquet(tmp_path / "plain" / "0.parquet")
        with pytest.raises(UserError, match=r"--split: got 'test', expected none"):
            open_source(request("imagenet64", tmp_path / "plain", split="test"))

    def test_a_column_of_images_with_another_name(self, tmp_path, table, images):
        table.rename_column("image", "photo").save_to_disk(tmp_path / "saved")
        self.assert_is_the_table(open_source(request("imagenet64", tmp_path / "saved")), images)

    def test_labels_that_are_names(self, tmp_path, table):
        named = table.remove_columns("label").add_column("label", ["b", "a", "c", "a"])
        named.save_to_disk(tmp_path / "saved")
        source = open_source(request("imagenet64", tmp_path / "saved"))
        assert source.class_names == ("a", "b", "c")
        assert source.labels.tolist() == [1, 0, 2, 0]
        assert source.labels.dtype == np.int64

    def test_labels_that_are_not_asked_for_may_be_anything(self, tmp_path, table):
        odd = table.remove_columns("label").add_column("label", [[1], [2], [], [3]])
        odd.add_column("caption", ["a", "b", "c", "d"]).save_to_disk(tmp_path / "saved")
        assert open_source(request("celeba64", tmp_path / "saved")).labels is None
        assert open_source(request("coco256", tmp_path / "saved")).captions == [["a"], ["b"], ["c"], ["d"]]

    def test_a_caption_column_of_something_else_is_passed_over(self, tmp_path, table):
        odd = table.add_column("caption", [{"id": 1}] * 4).add_column("text", ["a", "b", "c", "d"])
        odd.save_to_disk(tmp_path / "saved")
        assert open_source(request("coco256", tmp_path / "saved")).captions == [["a"], ["b"], ["c"], ["d"]]

    def test_captions_of_a_column(self, tmp_path, datasets, table):
        texts = [["a  cat", "b"], ["c"], ["d", "e", "f"], ["g"]]
        table.add_column("captions", texts).save_to_disk(tmp_path / "saved")
        source = open_source(request("coco256", tmp_path / "saved"))
        assert source.captions == [["a cat", "b"], ["c"], ["d", "e", "f"], ["g"]]
        assert source.labels is None
        assert open_source(request("celeba64", tmp_path / "saved")).captions is None

    def test_one_caption_a_row(self, tmp_path, table):
        table.add_column("text", ["a", "b", "c", "d"]).save_to_disk(tmp_path / "saved")
        assert open_source(request("coco256", tmp_path / "saved")).captions == [["a"], ["b"], ["c"], ["d"]]

    def test_a_row_without_captions_is_named(self, tmp_path, table):
        table.add_column("captions", [["a"], ["b"], [], ["d"]]).save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match=r"row 2 of .* has no caption"):
            open_source(request("coco256", tmp_path / "saved"))

    def test_a_table_without_images_is_refused(self, tmp_path, datasets):
        datasets.Dataset.from_dict({"x": [1]}).save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match=r"--source: got \"columns \['x'\]"):
            open_source(request("folder", tmp_path / "saved", size=8))

    def test_a_label_below_0_is_refused(self, tmp_path, table, datasets):
        odd = table.remove_columns("label").add_column("label", [0, -1, 1, 2])
        odd.save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match=r"label -1"):
            open_source(request("imagenet64", tmp_path / "saved"))

    def test_damaged_parquet_is_named(self, tmp_path, datasets):
        (tmp_path / "train.parquet").write_bytes(b"PAR1 nonsense")
        with pytest.raises(UserError, match="cannot be read"):
            open_source(request("imagenet64", tmp_path))

    def test_a_missing_image_is_named(self, tmp_path, datasets):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        rows = [{"bytes": encoded(), "path": None}, None]
        datasets.Dataset.from_dict({"image": rows, "label": [0, 1]}, features=features).save_to_disk(tmp_path / "saved")
        source = open_source(request("imagenet64", tmp_path / "saved"))
        assert source.class_names == ("0", "1")
        with pytest.raises(UnreadableError, match=r"row 1 of .* has no image"):
            source.read(1)

    def test_the_hub_is_asked_for_a_revision(self, monkeypatch, datasets, table, images):
        hub = pytest.importorskip("huggingface_hub")
        asked = []

        class Info:
            sha = "abc123"

        def info(self, name, revision=None):
            asked.append((name, revision))
            return Info()

        monkeypatch.setattr(hub.HfApi, "dataset_info", info)
        monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: asked.append((name, options)) or table)
        source = open_source(request("imagenet64", "owner/name", split="val", revision="v1"))
        self.assert_is_the_table(source, images)
        assert asked == [("owner/name", "v1"), ("owner/name", {"split": "val", "revision": "abc123"})]
        assert source.facts["revision"] == "abc123"

    def test_a_restart_asks_for_the_commit_that_it_was_begun_with(self, monkeypatch, datasets, table, images, tmp_path):
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub.HfApi, "dataset_info", lambda *args, **options: pytest.fail("asked for the newest"))
        asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: asked.append(options) or table)
        source = {"kind": "hub", "path": "owner/name", "revision": "abc123"}
        (tmp_path / "journal.jsonl").write_text(json.dumps({"plan": {"source": source}}) + "\n")
        for revision in (None, "abc123"):
            begun = request("imagenet64", "owner/name", revision=revision)
            self.assert_is_the_table(open_source(dataclasses.replace(begun, out=tmp_path)), images)
        assert asked == [{"split": "train", "revision": "abc123"}] * 2

    @pytest.mark.parametrize("cached", ["a" * 40, "b" * 40])
    def test_a_restart_without_a_network_reads_the_cache(self, monkeypatch, datasets, table, images, tmp_path, cached):
        """The cache is laid out as datasets does after a download; a copy of another commit is refused."""
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        table.to_parquet(tmp_path / "train.parquet")
        builder = datasets.load_dataset_builder("parquet", data_files={"train": str(tmp_path / "train.parquet")})
        builder.download_and_prepare()
        place = tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / cached
        shutil.copytree(builder.cache_dir, place)
        (place / "parquet-train.arrow").rename(place / "name-train.arrow")
        source = {"kind": "hub", "path": "owner/name", "revision": "a" * 40}
        (tmp_path / "journal.jsonl").write_text(json.dumps({"plan": {"source": source}}) + "\n")
        begun = dataclasses.replace(request("imagenet64", "owner/name"), out=tmp_path)
        if cached == "a" * 40:
            self.assert_is_the_table(open_source(begun), images)
        else:
            with pytest.raises(UserError, match=rf"is of revision {cached}, not of {'a' * 40}"):
                open_source(begun)

    def test_a_failed_download_says_what_to_do(self, monkeypatch, datasets):
        hub = pytest.importorskip("huggingface_hub")

        def fail(self, name, revision=None):
            raise ConnectionError("no network")

        monkeypatch.setattr(hub.HfApi, "dataset_info", fail)
        default = Request(RECIPES["imagenet64"], Path("out"), torch.device("cpu"), PrepareOptions())
        with pytest.raises(UserError, match=r"'ILSVRC/imagenet-1k'.*ConnectionError: no network.*hf auth login"):
            open_source(default)


class TestCaptions:
    @pytest.fixture
    def coco(self, tmp_path, images):
        """Images 7, 3 and 5 of four; captions in mixed order."""
        names = {7: "c_x.JPEG", 3: "a_2.png", 5: "b_1.png"}
        listed = [(5, "five"), (3, "three\nis here"), (7, "seven"), (3, " another "), (99, "of no image")]
        values = {
            "images": [{"id": key, "file_name": name} for key, name in names.items()],
            "annotations": [{"image_id": key, "caption": text} for key, text in listed],
        }
        root = write_folder(tmp_path / "root", flat(images))
        file = tmp_path / "captions.json"
        file.write_text(json.dumps(values))
        return root, file, values

    def test_they_are_joined_in_the_order_of_the_ids(self, coco, images):
        source = add_captions(open_folder(coco[0]), coco[1])
        assert source.captions == [["three is here", "another"], ["five"], ["seven"]]
        assert [source.read(index) for index in range(3)] == [images["a/2.png"], images["b/1.png"], images["c/x.JPEG"]]
        assert source.labels is None
        assert source.facts["captions"]["count"] == 4

    def test_they_work_for_an_archive_and_a_limit(self, tmp_path, coco, images):
        archive = write_zip(tmp_path / "z.zip", flat(images))
        source = open_source(request("coco256", archive, captions=coco[1], limit=2))
        assert source.captions == [["three is here", "another"], ["five"]]
        assert source.read(1) == images["b/1.png"]

    def test_a_missing_image_is_named(self, coco):
        (coco[0] / "train2014" / "c_x.JPEG").unlink()
        with pytest.raises(UserError, match=r"1 of the 3 images .*first: 'c_x\.JPEG'"):
            add_captions(open_folder(coco[0]), coco[1])

    def test_an_image_without_a_caption_is_named(self, coco):
        root, file, values = coco
        values["annotations"] = values["annotations"][1:]
        file.write_text(json.dumps(values))
        with pytest.raises(UserError, match=r"no caption of 'b_1\.png'"):
            add_captions(open_folder(root), file)

    @pytest.mark.parametrize("text", ["{", "[]", '{"images": []}', '{"images": [], "annotations": []}', "null"])
    def test_a_file_of_something_else_is_named(self, coco, text):
        coco[1].write_text(text)
        with pytest.raises(UserError, match=r"captions\.json' cannot be read as COCO captions"):
            add_captions(open_folder(coco[0]), coco[1])

    def test_coco_needs_captions(self, coco):
        with pytest.raises(UserError, match=r"--captions: got None.*captions_train2014\.json"):
            open_source(request("coco256", coco[0]))


class TestRequests:
    @pytest.mark.parametrize("source", ["missing", "./missing/x", "/no/such/folder", "owner/name.zip"])
    def test_a_source_that_is_not_there(self, source):
        with pytest.raises(UserError, match=r"--source: got .*There is no such file"):
            open_source(request("folder", source, size=8))

    def test_coco_has_no_place_of_its_own(self):
        with pytest.raises(UserError, match="--source: got None"):
            open_source(Request(RECIPES["coco256"], Path("out"), torch.device("cpu"), PrepareOptions()))

    def test_labels_are_demanded(self, tmp_path, images):
        write_folder(tmp_path, {"1.png": images["a/2.png"]})
        with pytest.raises(UserError, match=r"imagenet64 is labelled: give class folders"):
            open_source(request("imagenet64", tmp_path))

    def test_a_source_that_is_not_complete_is_refused(self, tmp_path, images, monkeypatch):
        write_folder(tmp_path, images)
        counts = {"train": 5, "validation": 3}
        monkeypatch.setitem(RECIPES, "imagenet64", dataclasses.replace(RECIPES["imagenet64"], counts=counts))
        partial = request("imagenet64", tmp_path, allow_partial=False)
        with pytest.raises(
            UserError, match=r"has 4 images, imagenet64 5 \(train\) or 3 \(validation\).*--allow-partial"
        ):
            open_source(partial)
        assert len(open_source(request("imagenet64", tmp_path))) == 4
        assert len(open_source(request("imagenet64", tmp_path, allow_partial=False, limit=2))) == 2
        counts["validation"] = 4
        assert len(open_source(partial)) == 4

    def test_the_split_of_a_table_has_its_own_count(self, tmp_path, images, monkeypatch, datasets):
        rows = [{"bytes": data, "path": None} for data in images.values()]
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict({"img": rows, "label": [0, 1, 2, 3]}, features=features)
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
        counts = {"train": 4, "test": 3}
        monkeypatch.setitem(RECIPES, "cifar10", dataclasses.replace(RECIPES["cifar10"], counts=counts))
        assert len(open_source(request("cifar10", tmp_path / "saved", allow_partial=False))) == 4
        with pytest.raises(UserError, match=r"has 4 images, cifar10 3 \(test\)\."):
            open_source(request("cifar10", tmp_path / "saved", allow_partial=False, split="test"))

    def test_a_limit_is_spread_over_the_classes(self, tmp_path, images):
        write_folder(tmp_path, images)
        source = open_source(request("imagenet64", tmp_path, limit=2))
        assert source.labels.tolist() == [0, 1]
        assert list(source.names) == ["a/2.png", "b/1.png"]

    def test_celeba_drops_labels(self, tmp_path, images):
        source = open_source(request("celeba64", write_folder(tmp_path, images)))
        assert source.labels is None
        assert source.class_names == ()

    @pytest.mark.parametrize(("split", "expected"), [(None, [0, 1]), ("valid", [2]), ("test", [3])])
    def test_a_folder_of_all_of_celeba_gives_a_split(self, tmp_path, images, monkeypatch, split, expected):
        flat_images = {f"{index}.png": data for index, data in enumerate(images.values())}
        write_folder(tmp_path, flat_images)
        assert len(open_source(request("celeba64", tmp_path, split=split))) == 4  # not the whole set
        parts = {"train": range(2), "valid": range(2, 3), "test": range(3, 4)}
        monkeypatch.setitem(RECIPES, "celeba64", dataclasses.replace(RECIPES["celeba64"], parts=parts))
        source = open_source(request("celeba64", tmp_path, split=split))
        assert list(source.names) == [f"{index}.png" for index in expected]
        assert source.facts["split"] == (split or "train")
        with pytest.raises(UserError, match="--split: got 'val', expected one of train, valid, test"):
            open_source(request("celeba64", tmp_path, split="val"))

    def test_the_parts_of_celeba_are_all_of_it(self):
        parts = RECIPES["celeba64"].parts
        assert [len(part) for part in parts.values()] == [162_770, 19_867, 19_962]

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("folder", {}, "--size: got None"),
            ("folder", {"size": 0}, "--size: got 0"),
            ("imagenet64", {"limit": 0}, "--limit: got 0"),
            ("imagenet64", {"workers": 0}, "--workers: got 0"),
            ("imagenet64", {"shard_mib": 0}, "--shard-mib: got 0"),
            ("imagenet64", {"channels": 2}, "--channels: got 2"),
            ("imagenet64", {"crop": "amd"}, "--crop: got 'amd'.*Did you mean 'adm'"),
            ("imagenet64", {"captions": Path("x")}, "--captions: got 'x', expected none for imagenet64"),
            ("coco256", {"channels": 1}, "--channels: got 1"),
            ("coco256", {"batch_size": 0}, "--batch-size: got 0"),
        ],
    )
    def test_bad_options_are_refused(self, name, options, message):
        with pytest.raises(UserError, match=message):
            request(name, "x", **options)

    def test_a_split_of_a_folder_is_refused(self, tmp_path, images):
        write_folder(tmp_path, images)
        with pytest.raises(UserError, match=r"--split: got 'val', expected none for .*folder of that split"):
            open_source(request("imagenet64", tmp_path, split="val"))

    def test_a_revision_of_a_local_source_is_refused(self, tmp_path, images):
        write_folder(tmp_path, images)
        with pytest.raises(UserError, match="--revision"):
            open_source(request("imagenet64", tmp_path, revision="v1"))
