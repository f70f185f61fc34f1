"""Publishing a run: the folder, its model card, and what is said to the Hub."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scalelong_fast.errors import UserError
from scalelong_fast.evaluation.extractors import weights_fingerprint
from scalelong_fast.integrations.hub import FILES, Release, push_to_hub
from scalelong_fast.models import UNetConfig, UViTConfig, build_model
from scalelong_fast.training import DataConfig, DiffusionConfig, RunConfig, RunFolder, SampleConfig
from scalelong_fast.training.config import from_dict
from scalelong_fast.training.figures import save_png

hub = pytest.importorskip("huggingface_hub")

UVIT = UViTConfig(img_size=8, in_chans=1, embed_dim=16, depth=4, num_heads=2, num_classes=4, reduction=4)
UNET = UNetConfig(
    **{"img_size": 8, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "num_groups": 4},
    **{"attention_resolutions": (), "scaling": "cs", "kappa": 0.7},
)
RUNS = {
    "class": RunConfig(
        model=UVIT, diffusion=DiffusionConfig(label_dropout=0.1), sample=SampleConfig(steps=2, guidance=2.0)
    ),
    "unconditional": RunConfig(
        model=UNET,
        data=DataConfig("cifar10"),
        diffusion=DiffusionConfig(schedule="cosine"),
        sample=SampleConfig(sampler="ddim", steps=2),
    ),
    "text": RunConfig(
        model=UNetConfig(**(vars(UNET) | {"in_chans": 4, "clip_dim": 12, "num_clip_token": 5, "scaling": "none"})),
        data=DataConfig("synthetic"),
    ),
    "latents": RunConfig(
        model=UViTConfig(**(vars(UVIT) | {"in_chans": 4, "num_classes": -1, "skip": False})),
        data=DataConfig("synthetic"),
        sample=SampleConfig(steps=2),
    ),
}


def evaluation(model, fid=12.34567, **changes):
    result = {
        "fid": fid,
        "kid": None,
        "n": 50_000,
        "extractor": {"name": "inception", "fingerprint": "abc", "width": 2048},
        "reference": {"name": "/home/somebody/real.npz", "n": 50_000, "data_fingerprint": "x"},
        "sampling": {"sampler": "ddim", "steps": 50, "guidance": 1.0, "seed": 7, "weights": weights_fingerprint(model)},
    }
    return result | changes


@pytest.fixture
def make_run(tmp_path):
    """``make_run(kind)``: a run folder such as training leaves one, and its model."""

    def make(kind="class", results=()):
        config = RUNS[kind]
        if kind == "class":
            data = DataConfig("folder", path=tmp_path / "my own pictures")
            config = RunConfig(config.model, data, config.diffusion, config.train, config.sample)
        folder = RunFolder(tmp_path / "runs" / kind)
        folder.path.mkdir(parents=True)
        folder.write_config(config, preset="some-preset", data_fingerprint="1234abcd")
        torch.manual_seed(0)
        model = build_model(config.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1)
        folder.save_ema(model)
        rows = [{"step": 100, "loss": 0.5}, {"step": 200, "loss": 0.25}]
        folder.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        save_png(folder.sample_grid, np.zeros((8, 8, 3), np.uint8))
        if results:
            (folder.path / "evaluation.json").write_text(json.dumps([make(model) for make in results]))
        return folder, model

    return make


@pytest.fixture
def api(monkeypatch):
    """Stands in for ``HfApi``; keeps what it was told, and what was uploaded."""
    said = SimpleNamespace(calls=[], files={}, private=False, fail=None)

    class Api:
        def __init__(self, token=None):
            said.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            said.calls.append(("create", repo_id, private, exist_ok))
            if said.fail == "create":
                raise ConnectionError("no route\nto host")
            full = repo_id if "/" in repo_id else f"me/{repo_id}"
            return hub.RepoUrl(f"https://huggingface.co/{full}")

        def model_info(self, repo_id):
            return SimpleNamespace(private=said.private)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            said.calls.append(("upload", repo_id))
            said.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_mine")
    return said


def code_of(card):
    return re.search(r"```python\n(.*?)```", card, re.S).group(1)


@pytest.mark.parametrize("kind", RUNS)
def test_the_card_says_how_to_load_the_model_and_that_code_runs(make_run, tmp_path, kind):
    folder, model = make_run(kind)
    out = tmp_path / "published"
    Release.of_run(folder.path).write(out, "me/mine")
    card = (out / "README.md").read_text()
    # Nobody's package of that name on an index is installed.
    assert re.findall(r"pip install (.*)", card) == [
        '"scalelong_fast[train] @ git+<address of the repository of scalelong_fast>"'
    ]
    names = {}
    exec(code_of(card).replace("me/mine", str(out)), names)
    for key, value in names["model"].state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    made = names["noise" if kind == "text" else "images"]
    assert made.shape == (1 if kind == "text" else 4, *model.input_shape)
    assert made.isfinite().all()
    assert ("clip_denoised=False" in card) == (kind == "latents")


def test_the_folder_holds_all_and_no_paths_of_this_machine(make_run, tmp_path):
    folder, _ = make_run()
    out = tmp_path / "published"
    Release.of_run(folder.path).write(out, "me/mine")
    assert {file.name for file in out.iterdir()} == set(FILES) - {"loss.png"}  # there was no curve
    stored = json.loads((out / "run.json").read_text())
    assert stored["preset"] == "some-preset"
    sections = {key: stored[key] for key in ("model", "diffusion", "train", "sample")}
    assert from_dict(RunConfig, sections).model == UVIT
    for file in out.iterdir():
        assert b"my own pictures" not in file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()
    assert (out / "samples.png").read_bytes() == folder.sample_grid.read_bytes()


def test_what_the_card_says(make_run, tmp_path):
    folder, model = make_run("unconditional", [evaluation])
    out = tmp_path / "published"
    Release.of_run(folder.path).write(out, "me/mine", license="cc-by-4.0")
    card = hub.ModelCard.load(out / "README.md")
    data = card.data
    assert (data.license, data.library_name) == ("cc-by-4.0", "scalelong_fast")
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.datasets == ["uoft-cs/cifar10"]
    assert {"scalelong", "unet", "diffusion"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("fid", 12.3457, "uoft-cs/cifar10")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for text in (
        "# mine\n",
        "![Samples](samples.png)",
        f"| parameters | {parameters:,} |",
        "4 long skips, constant κ_i = κ^(i−1) with κ = 0.7",
        "| preset | some-preset |",
        "cifar10 (fingerprint 1234abcd)",
        "last loss 0.25",
        "| noise | cosine |",
        "| FID | 12.3457 | 50,000 | real.npz (50000 images) | inception (abc) | ddim, 50 steps | 1 | 7 |",
        "huang2023scalelong",
    ):
        assert text in card.content


def test_only_evaluations_of_these_weights_count(make_run, tmp_path):
    def other_weights(model):
        return evaluation(model, fid=1.0, sampling=evaluation(model)["sampling"] | {"weights": "others"})

    def digits(model):
        return evaluation(model, fid=float("nan"), extractor={"name": "digits", "fingerprint": "d", "width": 64})

    folder, _ = make_run("class", [other_weights, digits, lambda model: evaluation(model, sampling=None)])
    out = tmp_path / "published"
    Release.of_run(folder.path).write(out, "me/mine")
    card = hub.ModelCard.load(out / "README.md")
    assert card.data.eval_results is None  # a number that is none is no result
    assert "| Fréchet distance | nan |" in card.content
    assert card.content.count("| ddim, 50 steps |") == 1
    assert "κ_i = σ(SE(GAP(skip_i))): one gate for all of them, reduction 4" in card.content


def test_a_folder_with_other_things_in_it_is_left_alone(make_run, tmp_path):
    folder, _ = make_run()
    with pytest.raises(UserError, match=r"--out: got .*It also holds"):
        Release.of_run(folder.path).write(folder.path, "me/mine")
    config, _ = folder.read_config()
    assert config.model == UVIT
    out = tmp_path / "published"
    Release.of_run(folder.path).write(out, "me/mine")
    Release.of_run(folder.path).write(out, "me/other")  # its own folder it may replace
    assert 'from_pretrained("me/other")' in (out / "README.md").read_text()


def test_pushed_is_what_was_written(make_run, tmp_path, api):
    folder, _ = make_run()
    assert push_to_hub(folder.path, "me/mine", private=False) == "https://huggingface.co/me/mine"
    assert api.calls == [("create", "me/mine", False, True), ("upload", "me/mine")]
    assert api.token == "hf_mine"
    Release.of_run(folder.path).write(tmp_path / "published", "me/mine")
    assert api.files == {path.name: path.read_bytes() for path in (tmp_path / "published").iterdir()}


def test_a_name_without_an_owner_is_completed_in_the_card(make_run, api):
    folder, _ = make_run()
    push_to_hub(folder.path, "mine", token="hf_other")
    assert api.token == "hf_other"
    assert api.calls[-1] == ("upload", "me/mine")
    assert b'from_pretrained("me/mine")' in api.files["README.md"]


def test_private_means_private(make_run, api):
    folder, _ = make_run()
    with pytest.raises(UserError, match=r"--private: got 'me/mine'.*exists and is public"):
        push_to_hub(folder.path, "me/mine", private=True)
    assert not api.files
    api.private = True
    push_to_hub(folder.path, "me/mine", private=True)
    assert api.files


def test_troubles_are_a_line_each(make_run, api, monkeypatch):
    folder, _ = make_run()
    for repo_id in ("a/b/c", "-mine", "me/mine!"):
        with pytest.raises(UserError, match="REPO_ID: got"):
            push_to_hub(folder.path, repo_id)
    api.fail = "create"
    with pytest.raises(UserError, match=r"could not be pushed \(ConnectionError: no route to host\)") as caught:
        push_to_hub(folder.path, "me/mine")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"there is none for the Hugging Face Hub.*HF_TOKEN"):
        push_to_hub(folder.path, "me/mine")
    with pytest.raises(UserError, match=r"RUN: got .*expected the folder of a training run"):
        push_to_hub(folder.path / "nowhere", "me/mine")
    assert [call[0] for call in api.calls] == ["create"]


def test_the_real_hub_client_offline_is_a_line(make_run, monkeypatch):
    folder, _ = make_run()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"me/mine could not be pushed \(") as caught:
        push_to_hub(folder.path, "me/mine", token="hf_none")
    assert "\n" not in str(caught.value)
