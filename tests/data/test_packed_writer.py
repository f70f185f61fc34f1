"""Packing that is interrupted, repeated, or pointed at the wrong folder."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch

from scalelong_fast.data.packed import PackedSet, PackedWriter, verify
from scalelong_fast.data.packed.writer import JOURNAL
from scalelong_fast.errors import UserError


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def rows(packed, shard):
    chosen = packed.plan.samples(shard)
    images, labels = (x.numpy()[chosen.start : chosen.stop] for x in (packed.images, packed.labels))
    return {"images": images, "labels": labels}


def test_packing_twice_gives_the_same_bytes(pack_images):
    assert content(pack_images(name="one").path) == content(pack_images(name="two").path)


def test_an_interrupted_packing_goes_on_and_gives_the_same_bytes(pack_images):
    whole = pack_images(name="whole")
    part = pack_images(name="part", todo=[0])
    with PackedWriter(part.path, part.plan) as writer:
        assert writer.todo == [1, 2]
    again = pack_images(name="part")
    assert content(again.path) == content(whole.path)


def test_a_finished_set_has_nothing_to_do(pack_images):
    packed = pack_images()
    before = {file: file.stat().st_mtime_ns for file in packed.path.glob("*.bin")}
    with PackedWriter(packed.path, packed.plan) as writer:
        assert writer.todo == []
    assert {file: file.stat().st_mtime_ns for file in packed.path.glob("*.bin")} == before


def test_a_manifest_that_was_deleted_is_written_again(pack_images):
    packed = pack_images()
    before = content(packed.path)
    (packed.path / "manifest.json").unlink()
    with PackedWriter(packed.path, packed.plan) as writer:
        writer.finish()
    assert content(packed.path) == before


@pytest.mark.parametrize("torn", [b'{"shard": 1, "cou', b"{"])
def test_a_torn_line_of_the_journal_is_dropped(pack_images, torn):
    packed = pack_images(todo=[0])
    with open(packed.path / JOURNAL, "ab") as journal:
        journal.write(torn)
    whole = pack_images(name="whole")
    assert content(pack_images().path) == content(whole.path)


def test_an_empty_journal_is_begun_anew(pack_images):
    packed = pack_images(todo=[])
    (packed.path / JOURNAL).write_bytes(b"")
    assert content(pack_images().path) == content(pack_images(name="whole").path)


@pytest.mark.parametrize("line", [b"nonsense\n", b'{"shard": 0}\n', b"[]\n"])
def test_a_damaged_journal_is_named(pack_images, line):
    packed = pack_images(todo=[0])
    with open(packed.path / JOURNAL, "ab") as journal:
        journal.write(line)
    with pytest.raises(UserError, match=r"journal\.jsonl is damaged"):
        pack_images()


def test_missing_and_cut_shards_are_made_again(pack_images):
    packed = pack_images()
    before = content(packed.path)
    (packed.path / "shard-00000.labels.bin").unlink()
    (packed.path / "shard-00002.images.bin").write_bytes(b"")
    with PackedWriter(packed.path, packed.plan) as writer:
        assert writer.todo == [0, 2]
        for shard in (0, 2):
            writer.write_shard(shard, rows(packed, shard))
        writer.finish()
    after = content(packed.path)
    assert after.pop(JOURNAL).startswith(before.pop(JOURNAL))
    assert after == before


def test_damaged_content_is_found_and_made_again_with_verify(pack_images):
    packed = pack_images()
    file = packed.path / "shard-00001.images.bin"
    file.write_bytes(bytes(len(file.read_bytes())))
    with PackedWriter(packed.path, packed.plan) as writer:
        assert writer.todo == []
    with PackedWriter(packed.path, packed.plan, verify=True) as writer:
        assert writer.todo == [1]
        writer.write_shard(1, rows(packed, 1))
        writer.finish()
    assert verify(packed.path) == {}
    assert torch.equal(PackedSet(packed.path).fetch(torch.arange(10)).images, packed.images)


def test_a_source_that_changed_cannot_mend_a_shard(pack_images):
    packed = pack_images()
    (packed.path / "shard-00001.images.bin").unlink()
    other = rows(packed, 1)
    other["images"] = 255 - other["images"]
    other["labels"] = 2 - other["labels"]
    before = content(packed.path)
    with (
        PackedWriter(packed.path, packed.plan) as writer,
        pytest.raises(UserError, match=r"shard-00001\.images\.bin would come out differently .*nothing was changed"),
    ):
        writer.write_shard(1, other)
    assert content(packed.path) == before


def test_other_settings_are_refused_by_name_and_change_nothing(pack_images):
    packed = pack_images(todo=[0])
    before = content(packed.path)
    other = dataclasses.replace(packed.plan, count=11, source={"path": "here", "images": 11})
    with pytest.raises(UserError, match=r"count was 10, now 11; source\.images was 10, now 11"):
        PackedWriter(packed.path, other)
    assert content(packed.path) == before


def test_other_settings_before_the_first_shard_are_taken(pack_images):
    packed = pack_images(todo=[])
    other = dataclasses.replace(packed.plan, shard_size=5)
    with PackedWriter(packed.path, other) as writer:
        assert writer.todo == [0, 1]
        writer.write_shard(0, {"images": packed.images[:5].numpy(), "labels": packed.labels[:5].numpy()})
    with pytest.raises(UserError, match="shard_size was 5, now 4"):
        PackedWriter(packed.path, packed.plan)
    with PackedWriter(packed.path, other) as writer:
        assert writer.todo == [1]


def test_a_source_that_was_moved_is_the_same(pack_images):
    packed = pack_images(todo=[0])
    moved = dataclasses.replace(packed.plan, source={"path": "there", "images": 10})
    with PackedWriter(packed.path, moved) as writer:
        assert writer.todo == [1, 2]


def test_a_folder_of_something_else_is_left_alone(pack_images, tmp_path):
    plan = pack_images().plan
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(UserError, match=r"holds files that scalelong-fast prepare did not write; nothing was changed"):
        PackedWriter(tmp_path / "photos", plan)
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    with pytest.raises(UserError, match="is a file"):
        PackedWriter(tmp_path / "photos" / "cat.jpg", plan)


def test_two_processes_do_not_write_to_one_folder(pack_images):
    packed = pack_images(todo=[0])
    with PackedWriter(packed.path, packed.plan), pytest.raises(UserError, match="another process is preparing"):
        PackedWriter(packed.path, packed.plan)
    with PackedWriter(packed.path, packed.plan) as writer:
        assert writer.todo == [1, 2]


def test_a_file_system_without_locks_will_do(pack_images, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert PackedSet(pack_images().path).image_shape == (3, 4, 4)


def test_rows_of_another_shape_are_refused(pack_images):
    packed = pack_images(todo=[])
    wrong = rows(packed, 0)
    wrong["images"] = wrong["images"][:, :1]
    with PackedWriter(packed.path, packed.plan) as writer, pytest.raises(ValueError, match="images"):
        writer.write_shard(0, wrong)


def test_a_full_disk_leaves_what_was_finished(pack_images, monkeypatch):
    packed = pack_images(todo=[0])
    with PackedWriter(packed.path, packed.plan) as writer:

        def full(handle):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                writer.write_shard(1, rows(packed, 1))
    assert not list(packed.path.glob(".*.tmp"))
    assert content(pack_images().path) == content(pack_images(name="whole").path)


def pack_and_die(path, plan, packed, at):
    """Pack in a child process that kills itself at its ``at``-th sync to the disk; gives the signal it died of."""
    child = os.fork()
    if child == 0:
        syncs, real = 0, os.fsync

        def fsync(handle):
            nonlocal syncs
            syncs += 1
            if syncs == at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)

        os.fsync = fsync
        try:
            with PackedWriter(path, plan) as writer:
                for shard in list(writer.todo):
                    writer.write_shard(shard, rows(packed, shard))
                writer.finish()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(pack_images, tmp_path):
    whole = pack_images(name="whole")
    at = 1
    while pack_and_die(tmp_path / f"killed-{at}", whole.plan, whole, at) == signal.SIGKILL:
        assert not (tmp_path / f"killed-{at}" / "manifest.json").exists() or at > 20
        assert content(pack_images(name=f"killed-{at}").path) == content(whole.path), at
        at += 1
    # Two for each file, one for its bytes and one for its name, and for each line of the journal.
    assert at - 1 == 2 * (3 * 2 + 1) + 2 * 4


def test_the_journal_and_the_manifest_hold_no_date_and_no_machine(pack_images):
    packed = pack_images()
    values = json.loads((packed.path / "manifest.json").read_text())
    assert set(values) == {"format", "version", "plan", "shards", "null_text"}
    assert values["plan"]["source"] == {"path": "here", "images": 10}
    assert np.fromfile(packed.path / "shard-00000.images.bin", np.uint8).size == 4 * 48
