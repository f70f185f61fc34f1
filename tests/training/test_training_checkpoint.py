"""Checkpoints: complete or absent, verified when read, the last few kept."""

import errno
import importlib.util
import json
import os
import pickle
import shutil
import threading

import pytest
import torch

import scalelong_fast.training.checkpoint as checkpoint
import scalelong_fast.training.checkpoint_files as checkpoint_files
import scalelong_fast.training.files as files
from scalelong_fast.errors import UserError
from scalelong_fast.training.checkpoint import CheckpointFolder
from scalelong_fast.training.files import hash_file, write_atomically, write_json
from scalelong_fast.version import __version__


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "train": {
            "model": {"w": torch.randn(16, 16, generator=generator), "scalar": torch.tensor(3.0)},
            "optimizer": {"w": {"step": torch.tensor(5.0), "exp_avg": torch.randn(16, 16, generator=generator)}},
            "scaler": {},
        },
        "window": {"total": torch.tensor(1.5, dtype=torch.float64), "count": 3, "rest": [1, 2.5, None, True]},
    }


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints", keep=2)


@pytest.fixture
def reports():
    return []


def tensors_of(folder, step):
    """The file that holds the tensors of a checkpoint written by one process."""
    (path,) = folder.file(step).glob("*.distcp")
    return path


def sign_anew(folder, step, **changes):
    """Make the manifest fit what lies in the folder now, as somebody who means harm would."""
    path = folder.file(step)
    manifest = json.loads((path / "checksums.json").read_text()) | changes
    manifest["files"] = {name: hash_file(path / name) for name in manifest["files"]}
    write_json(path / "checksums.json", manifest | {"sha256": checkpoint_files._digest(manifest)})


class TestRoundTrip:
    @pytest.mark.parametrize("background", [False, True])
    def test_what_is_saved_comes_back(self, tmp_path, assert_same, background):
        folder = CheckpointFolder(tmp_path, background=background)
        folder.save(7, state())
        folder.wait()
        assert folder.steps() == [7]
        assert_same(folder.load(7), state())
        assert_same(folder.load_latest(pytest.fail), (7, state()))

    def test_into_tensors_that_are_there(self, folder, assert_same):
        folder.save(7, state(0))
        live = state(1)
        assert_same(folder.load(7, live), state(0))
        assert torch.equal(live["train"]["model"]["w"], state(0)["train"]["model"]["w"])

    def test_a_part_that_was_not_saved_is_missing(self, folder, assert_same):
        folder.save(7, state(0))
        wanted = state(1)
        wanted["train"]["posthoc"] = {"0.1": {"w": torch.zeros(3)}}
        assert_same(folder.load(7, wanted), state(0))

    def test_a_part_that_is_not_wanted_is_left_out(self, folder):
        folder.save(7, state(0))
        wanted = state(1)
        del wanted["train"]["optimizer"]
        assert folder.load(7, wanted)["train"]["optimizer"] == {"w": {}}

    def test_no_checkpoint_is_no_error(self, folder):
        assert folder.steps() == []
        assert folder.load_latest(pytest.fail) is None

    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_the_newest_few_are_kept(self, tmp_path, keep):
        folder = CheckpointFolder(tmp_path, keep)
        for step in (10, 20, 30, 40):
            folder.save(step, state(step))
        assert folder.steps() == [10, 20, 30, 40][-keep:]
        assert len(list(tmp_path.iterdir())) == keep

    def test_saving_a_step_again_replaces_it(self, folder, assert_same):
        folder.save(5, state(0))
        folder.save(5, state(1))
        assert_same(folder.load(5), state(1))
        assert [path.name for path in folder.path.iterdir()] == ["step_000000005"]

    def test_names_are_step_and_nine_digits(self, folder):
        assert folder.save(42, state()).name == "step_000000042"

    def test_other_files_are_left_alone(self, folder):
        folder.save(1, state())
        for name in ("notes.txt", "step_1", "step_000000009.bak"):
            (folder.path / name).write_text("mine")
        folder.save(2, state())
        folder.save(3, state())
        assert folder.steps() == [2, 3]
        assert {path.name for path in folder.path.iterdir()} >= {"notes.txt", "step_1", "step_000000009.bak"}

    def test_the_manifest_says_what_wrote_it(self, folder):
        manifest = json.loads((folder.save(3, state()) / "checksums.json").read_text())
        assert manifest["format"] == 2
        assert manifest["step"] == 3
        assert manifest["version"] == __version__
        assert set(manifest["files"]) == {".metadata", tensors_of(folder, 3).name}


class TestBackground:
    def test_the_copy_is_of_the_moment_of_saving(self, tmp_path, monkeypatch, assert_same):
        may_write = threading.Event()
        write = checkpoint.write_tensors
        monkeypatch.setattr(checkpoint, "write_tensors", lambda *args: may_write.wait() and write(*args))
        folder, live = CheckpointFolder(tmp_path, background=True), state(0)
        folder.save(1, live)
        live["train"]["model"]["w"].zero_()
        assert folder.steps() == []
        may_write.set()
        folder.wait()
        assert_same(folder.load(1), state(0))

    def test_an_error_comes_up_at_the_next_save(self, tmp_path, monkeypatch):
        folder = CheckpointFolder(tmp_path, background=True)
        monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
        folder.save(1, state())
        with pytest.raises(UserError, match=r"^out: could not write .*step_000000001"):
            folder.save(2, state())
        monkeypatch.undo()
        folder.save(3, state())
        folder.wait()
        assert folder.steps() == [3]


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


class TestAfterwards:
    """What rank 0 writes once a checkpoint is complete."""

    @pytest.mark.parametrize("background", [False, True])
    def test_comes_after_the_name_and_in_the_same_thread(self, tmp_path, background):
        folder, seen = CheckpointFolder(tmp_path, background=background), []
        folder.save(1, state(), then=lambda pulse: seen.append((folder.steps(), threading.current_thread().name)))
        folder.wait()
        assert seen == [([1], "checkpoint")]

    def test_an_error_is_not_one_of_the_checkpoint(self, tmp_path):
        folder = CheckpointFolder(tmp_path, background=True)
        folder.save(1, state(), then=full_disk)
        with pytest.raises(OSError, match="No space left on device"):
            folder.wait()
        assert folder.steps() == [1]
        folder.wait()  # it is not raised twice


class TestAtomic:
    @pytest.mark.parametrize("name", [".step_000000002.tmp", ".step_000000002.gone"])
    def test_what_a_crash_left_behind_is_ignored_and_cleaned_up(self, folder, name):
        folder.save(1, state())
        torn = shutil.copytree(folder.file(1), folder.path / name)
        assert folder.steps() == [1]
        assert folder.load_latest(pytest.fail)[0] == 1
        folder.save(3, state())
        assert not torn.exists()

    def test_a_crash_between_the_names_of_two_saves_of_one_step(self, folder, assert_same):
        folder.save(2, state(2))
        os.rename(folder.file(2), folder.path / ".step_000000002.old")
        folder.save(3, state(3))
        assert folder.steps() == [2, 3]
        assert_same(folder.load(2), state(2))

    def test_a_checkpoint_hidden_by_a_crash_is_found_again(self, folder, assert_same):
        folder.save(2, state(2))
        os.rename(folder.file(2), folder.path / ".step_000000002.old")
        assert folder.steps() == []
        folder.restore_names()
        assert_same(folder.load_latest(pytest.fail), (2, state(2)))

    def test_what_cannot_be_removed_does_not_fail_a_save(self, folder, monkeypatch):
        """On NFS a folder stays as long as somebody has a file of it open."""
        rmtree = shutil.rmtree

        def busy(path, ignore_errors=False):
            if not ignore_errors:
                raise OSError(errno.EBUSY, "Device or resource busy", str(path))
            if str(path).endswith(".tmp"):
                rmtree(path, ignore_errors=True)

        monkeypatch.setattr(shutil, "rmtree", busy)
        for step in (1, 2, 3, 4):
            folder.save(step, state(step))
        assert folder.steps() == [3, 4]
        monkeypatch.undo()
        folder.save(5, state(5))
        assert sorted(path.name for path in folder.path.iterdir()) == ["step_000000004", "step_000000005"]

    def test_what_keeps_its_name_does_not_fail_a_save(self, folder, monkeypatch):
        rename = os.rename

        def stale(a, b):
            if str(b).endswith(".gone"):
                raise OSError(errno.ESTALE, "Stale file handle")
            rename(a, b)

        monkeypatch.setattr(os, "rename", stale)
        for step in (1, 2, 3):
            folder.save(step, state(step))
        assert folder.steps() == [1, 2, 3]

    def test_the_name_appears_when_all_is_complete_and_on_disk(self, folder, monkeypatch):
        synced, rename = [], os.rename
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
        seen = []

        def look(a, b):
            if str(b) == str(folder.file(1)):
                seen.extend(os.listdir(a))
                seen_synced.extend(synced)
            return rename(a, b)

        seen_synced = []
        monkeypatch.setattr(os, "rename", look)
        folder.save(1, state())
        assert {".metadata", "checksums.json"} < set(seen)
        assert any(path.endswith(".distcp") for path in seen_synced)
        assert any(path.endswith(".step_000000001.tmp") for path in seen_synced)
        assert synced[-1] == str(folder.path)

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
        monkeypatch.setattr(files.os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
        monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
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
        assert "step_000000002 is damaged" in line
        assert "previous" in line

    @pytest.mark.parametrize("name", ["*.distcp", ".metadata", "checksums.json"])
    @pytest.mark.parametrize("share", [0, 0.5, 0.99])
    def test_a_truncated_file_is_passed_over(self, saved, reports, assert_same, name, share):
        (path,) = saved.file(2).glob(name)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        self.expect_previous(saved, reports, assert_same)

    @pytest.mark.parametrize("name", ["*.distcp", ".metadata", "checksums.json"])
    def test_a_missing_file_is_passed_over(self, saved, reports, assert_same, name):
        (path,) = saved.file(2).glob(name)
        path.unlink()
        self.expect_previous(saved, reports, assert_same)

    @pytest.mark.parametrize("bit", [0, 7])
    @pytest.mark.parametrize("offset", [0, 511, 1023])
    def test_a_flipped_bit_in_a_tensor_is_passed_over(self, saved, reports, assert_same, offset, bit):
        path = tensors_of(saved, 2)
        content = bytearray(path.read_bytes())
        start = content.index(state(2)["train"]["model"]["w"].numpy().tobytes())
        content[start + offset] ^= 1 << bit
        path.write_bytes(content)
        self.expect_previous(saved, reports, assert_same)

    def test_another_number_in_the_manifest_is_passed_over(self, saved, reports, assert_same):
        path = saved.file(2) / "checksums.json"
        path.write_text(path.read_text().replace('"count": 3', '"count": 4'))
        self.expect_previous(saved, reports, assert_same)

    def test_a_checkpoint_under_the_wrong_step_is_passed_over(self, saved, reports, assert_same):
        shutil.rmtree(saved.file(2))
        shutil.copytree(saved.file(1), saved.file(2))
        self.expect_previous(saved, reports, assert_same)

    @pytest.mark.parametrize("content", [b"", b"[]", b"3", b'{"format": 2}', b"\xff\xfe"])
    def test_a_manifest_of_another_kind_is_passed_over(self, saved, reports, assert_same, content):
        (saved.file(2) / "checksums.json").write_bytes(content)
        self.expect_previous(saved, reports, assert_same)

    def test_foreign_code_in_the_index_is_never_run(self, saved, reports, assert_same, tmp_path):
        touched = tmp_path / "code was run"
        (saved.file(2) / ".metadata").write_bytes(pickle.dumps(Malicious(str(touched))))
        sign_anew(saved, 2)
        self.expect_previous(saved, reports, assert_same)
        assert "has no place in a checkpoint" in reports[0]
        assert not touched.exists()

    def test_foreign_code_among_the_tensors_is_never_run(self, saved, reports, assert_same, tmp_path):
        touched, path = tmp_path / "code was run", tensors_of(saved, 2)
        torch.save(Malicious(str(touched)), path)
        sign_anew(saved, 2)
        self.expect_previous(saved, reports, assert_same)
        assert not touched.exists()

    def test_all_damaged_is_an_error_that_says_what_to_do(self, saved, reports):
        for step in (1, 2):
            tensors_of(saved, step).write_bytes(b"")
        with pytest.raises(UserError, match=r"^out: all 2 checkpoints in .* are damaged\. Restore .* or move"):
            saved.load_latest(reports.append)
        assert len(reports) == 2

    def test_an_index_that_one_process_cannot_read_is_damage_to_all(self, saved, monkeypatch):
        def stale(folder):
            raise ValueError("its index is unreadable (OSError: stale file handle)")

        told, gather = [], saved.ranks.gather
        monkeypatch.setattr(saved.ranks, "gather", lambda value: (told.append(value), gather(value))[1], raising=False)
        monkeypatch.setattr(checkpoint, "read_index", stale)
        with pytest.raises(ValueError, match="stale file handle"):
            saved.load(2)
        assert told == ["its index is unreadable (OSError: stale file handle)"]


def test_a_version_of_pytorch_that_lacks_a_class_of_its_index(monkeypatch):
    """The classes are private; training must be importable without one."""
    monkeypatch.delattr(checkpoint_files.metadata, "StorageMeta")
    spec = importlib.util.spec_from_file_location("another_copy", checkpoint_files.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert len(copy._HARMLESS) == len(checkpoint_files._HARMLESS) - 1


class Malicious:
    """Creates a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestOtherCode:
    def test_a_later_format_is_not_guessed_at(self, folder):
        folder.save(3, state(3))
        sign_anew(folder, 3, format=3, version="9.9.9")
        with pytest.raises(UserError, match=r"^out: .* of format 3, .* scalelong_fast 9\.9\.9; .* reads format 2"):
            folder.load_latest(pytest.fail)

    def test_the_earlier_format(self, folder):
        folder.path.mkdir()
        (folder.path / "step_000000007.pt").write_bytes(b"a file of format 1")
        with pytest.raises(UserError, match=r"^out: .*step_000000007\.pt is of format 1, .* new run in another --out"):
            folder.load_latest(pytest.fail)

    @pytest.mark.parametrize("change", [{"w": torch.zeros(16, 17)}, {"v": torch.zeros(2)}])
    def test_another_model(self, folder, change):
        folder.save(3, state(3))
        live = state(0)
        live["train"]["model"].update(change)
        with pytest.raises(UserError, match=rf"written by scalelong_fast {__version__}.* 1 tensors are missing or of"):
            folder.load_latest(pytest.fail, live)
        assert torch.equal(live["train"]["model"]["scalar"], state(0)["train"]["model"]["scalar"])


class TestFullDisk:
    def test_the_error_says_what_is_safe(self, folder, monkeypatch, assert_same):
        folder.save(1, state(1))
        monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
        with pytest.raises(UserError, match=r"^out: could not write .*step 1 is untouched.*Free some space") as caught:
            folder.save(2, state(2))
        assert "No space left on device" in str(caught.value)
        assert [path.name for path in folder.path.iterdir()] == ["step_000000001"]
        assert_same(folder.load(1), state(1))

    def test_the_very_first_checkpoint(self, folder, monkeypatch):
        monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
        with pytest.raises(UserError, match="No checkpoint had been written yet"):
            folder.save(1, state())

    def test_a_real_limit_on_the_size_of_files(self, folder, python, assert_same):
        folder.save(1, state(1))
        code = """
import resource, sys, torch
from pathlib import Path
from scalelong_fast.errors import UserError
from scalelong_fast.training.checkpoint import CheckpointFolder
for limit, numbers in ((100_000, 100_000), (1_000, 10)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        CheckpointFolder(Path(sys.argv[1])).save(2, {"w": torch.zeros(numbers)})
    except UserError as error:
        print(error)
"""
        done = python(code, folder.path)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 2
        for line in done.stdout.splitlines():
            assert line.startswith("out: could not write ")
            assert "The checkpoint of step 1 is untouched" in line
        assert [path.name for path in folder.path.iterdir()] == ["step_000000001"]
        assert_same(folder.load_latest(pytest.fail), (1, state(1)))

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match="could not write"):
            CheckpointFolder(tmp_path / "file" / "checkpoints").save(1, state())
