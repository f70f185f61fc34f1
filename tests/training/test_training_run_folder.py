"""The run folder: its config, its averaged model, and one process at a time."""

import json
import os
from pathlib import Path

import pytest
import torch

from scalelong_fast.errors import UserError
from scalelong_fast.models import UViT, build_model
from scalelong_fast.training import RunFolder

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open_for_writing()
    yield folder
    folder.close()


class TestConfig:
    def test_comes_back_with_the_facts_beside_it(self, folder, tiny):
        folder.write_config(tiny(), preset="digits-uvit", data_fingerprint="abc")
        assert folder.read_config() == (tiny(), {"preset": "digits-uvit", "data_fingerprint": "abc"})

    def test_no_run(self, tmp_path):
        with pytest.raises(UserError, match=r"^RUN: got '.*nowhere', expected the folder of a training run"):
            RunFolder(tmp_path / "nowhere").read_config()

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"null", b"[]", b"3", b'"text"', b"{}", b"\xff\xfe\x00", b'{"model": 3}'],
        ids=["empty", "torn", "null", "list", "number", "text", "no sections", "bytes", "number for a section"],
    )
    def test_a_damaged_file_is_an_error_that_names_it(self, folder, content):
        folder.config_file.write_bytes(content)
        with pytest.raises(UserError, match=r"config\.json"):
            folder.read_config()

    @pytest.mark.parametrize("section", [3, None, [], "text"])
    def test_a_damaged_section_is_an_error_that_names_the_file(self, folder, tiny, section):
        folder.write_config(tiny())
        values = json.loads(folder.config_file.read_text())
        folder.config_file.write_text(json.dumps({**values, "train": section}))
        with pytest.raises(UserError, match=r"config\.json"):
            folder.read_config()

    def test_a_bad_value_is_named(self, folder, tiny):
        folder.write_config(tiny())
        values = json.loads(folder.config_file.read_text())
        values["train"]["lr"] = -1
        folder.config_file.write_text(json.dumps(values))
        with pytest.raises(UserError, match=r"train\.lr: got -1"):
            folder.read_config()


class TestAveragedModel:
    @pytest.fixture
    def saved(self, folder, tiny):
        model = UViT(tiny().model)
        folder.save_ema(model)
        modes = {file.name: file.stat().st_mode for file in folder.ema.iterdir()}
        assert modes["model.safetensors"] == modes["config.json"]  # whoever may read the one may read the other
        return folder, model

    def test_comes_back_in_eval_mode(self, saved):
        folder, model = saved
        loaded = folder.load_ema()
        assert not loaded.training
        assert loaded.config == model.config
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name

    def test_can_be_loaded_without_this_class(self, saved):
        folder, model = saved
        loaded = UViT.from_pretrained(str(folder.ema))
        assert torch.equal(loaded.pos_embed, model.pos_embed)

    def test_a_second_save_replaces_the_first(self, saved):
        folder, model = saved
        with torch.no_grad():
            model.pos_embed.add_(1)
        folder.save_ema(model)
        assert torch.equal(folder.load_ema().pos_embed, model.pos_embed)
        assert {path.name for path in folder.path.iterdir()} == {".lock", "ema"}

    def test_what_a_crash_left_behind_does_no_harm(self, saved):
        folder, model = saved
        staging = folder.path / ".ema.tmp"
        staging.mkdir()
        (staging / "model.safetensors").write_bytes(b"torn")
        folder.save_ema(model)
        assert torch.equal(folder.load_ema().pos_embed, model.pos_embed)
        assert not staging.exists()

    @pytest.mark.parametrize("backwards", [False, True])
    def test_in_whichever_order_a_file_system_lists_the_files(self, folder, tiny, monkeypatch, backwards):
        listed = Path.iterdir
        monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path), reverse=backwards)))
        model = UViT(tiny().model)
        folder.save_ema(model)
        assert torch.equal(folder.load_ema().pos_embed, model.pos_embed)

    def test_content_reaches_the_disk_before_its_name(self, folder, tiny, monkeypatch):
        calls, fsync, replace = [], os.fsync, os.replace

        def synced(handle):
            calls.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
            fsync(handle)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("name", b.name)), replace(a, b)))
        folder.save_ema(build_model(tiny().model))
        names = [name for kind, name in calls if kind == "name"]
        assert {"model.safetensors", "config.json"} <= set(names)
        for name in names:
            assert calls.index(("fsync", name)) < calls.index(("name", name))
        assert calls[-1] == ("fsync", "ema")

    def test_no_model_yet(self, folder):
        with pytest.raises(UserError, match=r"^RUN: .* has no trained model yet"):
            folder.load_ema()

    @pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
    def test_a_truncated_model_is_refused(self, saved, share):
        folder, _ = saved
        weights = folder.ema / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])
        with pytest.raises(UserError, match=r"^RUN: the model in .* cannot be read"):
            folder.load_ema()

    def test_a_model_that_lacks_a_tensor_is_refused(self, saved):
        folder, _ = saved
        weights = folder.ema / "model.safetensors"
        tensors = safetensors.load_file(weights)
        del tensors["pos_embed"]
        safetensors.save_file(tensors, weights)
        with pytest.raises(UserError, match=r"^RUN: the model in .* cannot be read"):
            folder.load_ema()

    def test_a_model_of_another_size_is_refused_in_one_line(self, saved):
        folder, _ = saved
        file = folder.ema / "config.json"
        file.write_text(file.read_text().replace('"embed_dim": 16', '"embed_dim": 32'))
        with pytest.raises(UserError, match=r"^RUN: the model in .* cannot be read") as caught:
            folder.load_ema()
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", [None, "", "{", "[]"])
    def test_a_missing_or_damaged_config_is_refused(self, saved, content):
        folder, _ = saved
        file = folder.ema / "config.json"
        file.unlink()
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError, match=r"^RUN: the model in .* cannot be read"):
            folder.load_ema()

    def test_a_full_disk_is_an_os_error_and_keeps_the_old_model(self, saved, python):
        folder, model = saved
        code = """
import resource, sys, torch
from pathlib import Path
from scalelong_fast.models import create_model
from scalelong_fast.training import RunFolder
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    RunFolder(sys.argv[1]).save_ema(create_model("uvit_digits"))
except OSError as error:
    print("OSError", error)
"""
        done = python(code, folder.path)
        assert done.stdout.startswith("OSError"), done.stderr  # Trainer.run explains an OSError, and nothing else
        assert torch.equal(folder.load_ema().pos_embed, model.pos_embed)


class TestOneProcess:
    def test_a_second_one_is_refused(self, folder):
        with pytest.raises(UserError, match=r"^out: another process is training in .*choose another --out"):
            RunFolder(folder.path).open_for_writing()

    def test_the_folder_is_free_again_after_closing(self, folder):
        folder.close()
        other = RunFolder(folder.path)
        other.open_for_writing()
        other.close()
        folder.close()  # closing twice is no error

    @pytest.mark.parametrize("below", ["run", "deep/er/run"])
    def test_a_place_below_a_regular_file_is_refused(self, tmp_path, below):
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match=r"^out: cannot write to .*choose another --out"):
            RunFolder(tmp_path / "file" / below).open_for_writing()

    def test_a_regular_file_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match=r"^out: cannot write to"):
            RunFolder(tmp_path / "file").open_for_writing()
        assert (tmp_path / "file").read_text() == "x"
