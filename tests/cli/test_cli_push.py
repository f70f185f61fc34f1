"""``scalelong-fast push``."""

import pytest
import torch

from scalelong_fast.models import UViT, UViTConfig
from scalelong_fast.training import RunConfig, RunFolder

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run; not to be changed."""
    folder = RunFolder(tmp_path_factory.mktemp("push") / "run")
    folder.path.mkdir()
    config = RunConfig(model=UViTConfig(img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2))
    folder.write_config(config, preset="digits-uvit")
    folder.save_ema(UViT(config.model))
    return folder.path


def test_dry_run_writes_the_folder_and_uploads_nothing(cli, run, tmp_path, monkeypatch):
    monkeypatch.setattr("scalelong_fast.cli.push.push_to_hub", None)
    result = cli("push", run, "me/mine", "--dry-run", "--out", tmp_path / "published")
    assert result.code == 0, result.err
    assert f"me/mine as it would be pushed is in {tmp_path / 'published'}" in result.out
    published = UViT.from_pretrained(str(tmp_path / "published"))
    own = RunFolder(run).load_ema()
    assert all(torch.equal(a, b) for a, b in zip(published.parameters(), own.parameters(), strict=True))
    assert "license: apache-2.0" in (tmp_path / "published" / "README.md").read_text()


def test_what_is_pushed(cli, run, monkeypatch):
    asked = {}

    def push(folder, repo_id, **options):
        asked.update(options, run=folder, repo_id=repo_id)
        return "https://huggingface.co/me/mine"

    monkeypatch.setattr("scalelong_fast.cli.push.push_to_hub", push)
    result = cli("push", run, "me/mine", "--private", "--license", "mit")
    assert (result.code, result.out) == (0, "Pushed to https://huggingface.co/me/mine\n")
    assert asked == {"run": str(run), "repo_id": "me/mine", "private": True, "license": "mit", "model": None}


def test_bad_input(cli, run, tmp_path, assert_refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert_refused(cli("push", run), "RUN REPO_ID: got", "expected the run folder and the repository first")
    assert_refused(cli("push", "--private", run), "RUN REPO_ID: got")
    assert_refused(cli("push", run, "a/b/c"), "REPO_ID: got 'a/b/c'")
    assert_refused(cli("push", run, "me/mine"), "token: there is none", "HF_TOKEN")
    assert_refused(cli("push", tmp_path, "me/mine", "--dry-run"), "expected the folder of a training run")
    assert_refused(cli("push", run, "me/mine", "--out", tmp_path), "--out: got", "without --dry-run")
    assert_refused(cli("push", run, "me/mine", "--dry-run", "--out", run), "It also holds ema")
    assert_refused(cli("push", run, "me/mine", "--dry-run", "--model", tmp_path), "--model: got")


def test_help(cli):
    assert cli("push", "--help").code == 0
    assert cli("push").code == 2
