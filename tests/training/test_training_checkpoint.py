"""Checkpoints: complete or absent, verified when read, the last few kept."""

import errno
import os
import pickle

import pytest
import torch

import scalelong_fast.training.checkpoint as checkpoint
from scalelong_fast.errors import UserError
from scalelong_fast.training.checkpoint import CheckpointFolder, digest, write_atomically, write_json


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "train": {
            "model": {"w": torch.randn(16, 16, generator=generator), "scalar": torch.tensor(3.0)},
            "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]},
        },
        "window": {"total": torch.tensor(1.5, dtype=torch.float64), "count": 3},
    }


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints", keep=2)


@pytest.fixture
def reports():
    return []


class TestRoundTrip:
    def test_what_is_saved_comes_back(self, folder, assert_same):
        folder.save(7, state())
        assert folder.steps() == [7]
        assert_same(folder.load(7), state())
        assert_same(folder.load_latest(pytest.fail), (7, state()))

    def test_no_checkpoint_is_no_error(self, folder):
        assert folder.steps() == []
        assert folder.load_latest(pytest.fail) is None

    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_the_newest_few_are_kept(self, tmp_path, keep):
        folder = CheckpointFolder(tmp_path, keep)
        for step in (10, 20, 30, 40):
            folder.save(step, state(step))
        assert folder.steps() == [10, 20, 30, 40][-keep:]

    def test_saving_a_step_again_replaces_it(self, folder, assert_same):
        folder.save(5, state(0))
        folder.save(5, state(1))
        assert_same(folder.load(5), state(1))

    def test_names_are_step_and_nine_digits(self, folder):
        assert folder.save(42, state()).name == "step_000000042.pt"

    def test_other_files_are_left_alone(self, folder):
        folder.save(1, state())
        for name in ("notes.txt", "step_1.pt", "step_000000009.pt.bak"):
            (folder.path / name).write_text("mine")
        folder.save(2, state())
        folder.save(3, state())
        assert folder.steps() == [2, 3]
        assert {path.name for path in folder.path.iterdir()} >= {"notes.txt", "step_1.pt", "step_000000009.pt.bak"}


class TestAtomic:
    def test_what_a_crash_left_behind_is_ignored_and_cleaned_up(self, folder):
        folder.save(1, state())
        torn = folder.path / ".step_000000002.pt.tmp"
        torn.write_bytes(b"half a checkpoint")
        assert folder.steps() == [1]
        assert folder.load_latest(pytest.fail)[0] == 1
        folder.save(3, state())
        assert not torn.exists()

    def test_the_file_appears_only_when_complete(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(b"old")

        def write(file):
            file.write(b"new")
            file.flush()
            assert path.read_bytes() == b"old"

        write_atomically(path, write)
        assert path.read_bytes() == b"new"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_a_failed_write_leaves_the_old_file_alone(self, tmp_path, error):
        path = tmp_path / "file"
        path.write_bytes(b"old")

        def write(file):
            file.write(b"half")
            raise error

        with pytest.raises(type(error)):
            write_atomically(path, write)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_content_reaches_the_disk_before_its_name(self, tmp_path, monkeypatch):
        calls = []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(checkpoint.os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
        monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
        write_json(tmp_path / "x.json", {"a": 1})
        assert calls == ["fsync", "replace", "fsync"]


class TestDamage:
    @pytest.fixture
    def saved(self, folder):
        folder.save(1, state(1))
        folder.save(2, state(2))
        return folder

    def expect_previous(self, folder, reports, assert_same):
        with pytest.raises(ValueError):
            folder.load(2)
        assert_same(folder.load_latest(reports.append), (1, state(1)))
        (line,) = reports
        assert "step_000000002.pt is damaged" in line
        assert "previous" in line

    @pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.5, 0.9, 0.999])
    def test_a_truncated_file_is_passed_over(self, saved, reports, assert_same, share):
        content = saved.file(2).read_bytes()
        saved.file(2).write_bytes(content[: int(share * len(content))])
        self.expect_previous(saved, reports, assert_same)

    def test_one_byte_short_is_passed_over(self, saved, reports, assert_same):
        saved.file(2).write_bytes(saved.file(2).read_bytes()[:-1])
        self.expect_previous(saved, reports, assert_same)

    @pytest.mark.parametrize("bit", [0, 3, 7])
    @pytest.mark.parametrize("offset", [0, 511, 1023])
    def test_a_flipped_bit_in_a_tensor_is_passed_over(self, saved, reports, assert_same, offset, bit):
        content = bytearray(saved.file(2).read_bytes())
        start = content.index(state(2)["train"]["model"]["w"].numpy().tobytes())
        content[start + offset] ^= 1 << bit
        saved.file(2).write_bytes(content)
        self.expect_previous(saved, reports, assert_same)

    def test_a_file_of_noise_is_passed_over(self, saved, reports, assert_same):
        saved.file(2).write_bytes(os.urandom(5000))
        self.expect_previous(saved, reports, assert_same)

    def test_a_file_under_the_wrong_step_is_passed_over(self, saved, reports, assert_same):
        saved.file(2).write_bytes(saved.file(1).read_bytes())
        self.expect_previous(saved, reports, assert_same)

    @pytest.mark.parametrize("content", [{"a": 1}, [1, 2], 3, {"sha256": "0" * 64, "step": 2, "format": 1}])
    def test_a_torch_file_of_another_kind_is_passed_over(self, saved, reports, assert_same, content):
        torch.save(content, saved.file(2))
        self.expect_previous(saved, reports, assert_same)

    @pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
    def test_a_foreign_pickle_is_never_run(self, saved, reports, assert_same, tmp_path, save):
        touched = tmp_path / "code was run"
        save(Malicious(str(touched)), saved.file(2))
        self.expect_previous(saved, reports, assert_same)
        assert not touched.exists()

    def test_a_later_format_is_not_guessed_at(self, saved, monkeypatch):
        monkeypatch.setattr(checkpoint, "FORMAT", 2)
        saved.save(3, state(3))
        monkeypatch.undo()
        with pytest.raises(ValueError, match="format 2, this version reads 1"):
            saved.load(3)

    def test_all_damaged_is_an_error_that_says_what_to_do(self, saved, reports):
        for step in (1, 2):
            saved.file(step).write_bytes(b"")
        with pytest.raises(UserError, match=r"^out: all 2 checkpoints in .* are damaged\. Restore .* or move"):
            saved.load_latest(reports.append)
        assert len(reports) == 2


class Malicious:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestFullDisk:
    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        ],
    )
    def test_the_error_says_what_is_safe(self, folder, monkeypatch, assert_same, error):
        folder.save(1, state(1))

        def full(content, file):
            file.write(b"x" * 100)
            raise error

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"^out: could not write .*step 1 is untouched.*Free some space") as caught:
            folder.save(2, state(2))
        assert str(error) in str(caught.value)
        assert [path.name for path in folder.path.iterdir()] == ["step_000000001.pt"]
        assert_same(folder.load(1), state(1))

    def test_the_very_first_checkpoint(self, folder, monkeypatch):
        monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(UserError, match="No checkpoint had been written yet"):
            folder.save(1, state())

    def test_a_real_limit_on_the_size_of_files(self, folder, python, assert_same):
        folder.save(1, state(1))
        code = """
import resource, sys, torch
from pathlib import Path
from scalelong_fast.errors import UserError
from scalelong_fast.training.checkpoint import CheckpointFolder
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    CheckpointFolder(Path(sys.argv[1])).save(2, {"w": torch.zeros(100_000)})
except UserError as error:
    print(error)
"""
        done = python(code, folder.path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("out: could not write ")
        assert "The checkpoint of step 1 is untouched" in done.stdout
        assert [path.name for path in folder.path.iterdir()] == ["step_000000001.pt"]
        assert_same(folder.load_latest(pytest.fail), (1, state(1)))

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match="could not write"):
            CheckpointFolder(tmp_path / "file" / "checkpoints").save(1, state())


BASE = {"a": torch.tensor([1.0, 2.0]), "b": [1, 23], "c": {"d": (0.5, None, True)}}


class TestDigest:
    def test_equal_content_equal_digest(self):
        again = {"c": {"d": (0.5, None, True)}, "b": [1, 23], "a": torch.tensor([0.0, 1.0, 2.0])[1:]}
        assert digest(BASE) == digest(again)

    def test_layout_in_memory_does_not_count(self):
        square = torch.arange(6.0).view(2, 3)
        assert digest(square.t().contiguous().t()) == digest(square)

    @pytest.mark.parametrize(
        "change",
        [
            {"a": torch.tensor([1.0, 2.0000002])},
            {"a": torch.tensor([2.0, 1.0])},
            {"a": torch.tensor([[1.0, 2.0]])},
            {"a": torch.tensor([1.0, 2.0], dtype=torch.float64)},
            {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},
            {"a": torch.tensor([])},
            {"b": [23, 1]},
            {"b": [1, 2, 3]},
            {"b": [12, 3]},
            {"b": [123]},
            {"b": [[1], 23]},
            {"c": {"d": (0.5, None, 1)}},
            {"c": {"e": (0.5, None, True)}},
            {"c": {}},
            {"d": 0},
        ],
    )
    def test_any_change_shows(self, change):
        assert digest({**BASE, **change}) != digest(BASE)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
    def test_every_dtype_can_be_digested(self, dtype):
        assert digest(torch.zeros(3, dtype=dtype)) != digest(torch.ones(3, dtype=dtype))
        assert digest(torch.tensor(1, dtype=dtype)) != digest(torch.tensor(0, dtype=dtype))
