"""UNets on the command line: trained, resumed, sampled from, and refused like U-ViTs."""

import json

import numpy as np
import pytest

from scalelong_fast.models import UNet, UNetConfig, list_models
from scalelong_fast.scaling import list_scalings
from scalelong_fast.training import RunFolder, get_preset
from scalelong_fast.training.metrics import read_metrics

#: The model at toy size; the rest of the options are those of the U-ViT's tests.
MODEL = ["--model.model-channels", "8", "--model.num-res-blocks", "1", "--model.num-groups", "4"]


@pytest.fixture(scope="module")
def options(tiny):
    return [*MODEL, *tiny[tiny.index("--train.steps") :]]


@pytest.fixture
def train(cli, options, tmp_path):
    """``train("--model.scaling", "cs")``: a tiny run in ``tmp_path / "run"``."""
    return lambda *more: cli("train", "digits-unet", *options, "--out", tmp_path / "run", *more)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def test_trained_resumed_and_sampled_from(cli, train, run, tmp_path):
    own = ["--model.scaling", "cs", "--model.kappa", "0.7", "--model.channel-mult", "1", "2", "--model.dropout", "0.1"]
    result = train("--train.steps", "3", *own)
    assert result.code == 0, result.err
    assert "digits-unet: UNet of 0.0" in result.out
    assert "4 long skips scaled by 'cs'" in result.out
    result = train("--train.steps", "5", *own)
    assert result.code == 0, result.err
    assert "Going on from step 3 of 5" in result.out
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert json.loads((run / "config.json").read_text())["model"]["architecture"] == "unet"

    result = cli("sample", run, "--labels", "3,7", "--num-per-label", "2", "--out", tmp_path / "x.npz")
    assert result.code == 0, result.err
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["images"].shape == (4, 8, 8, 1)
        assert arrays["labels"].tolist() == [3, 3, 7, 7]


@pytest.mark.parametrize("scaling", list_scalings())
def test_every_scaling(train, run, scaling):
    result = train("--model.scaling", scaling)
    assert result.code == 0, result.err
    model = RunFolder(run).load_ema()
    assert isinstance(model, UNet)
    assert model.config.scaling == scaling


def test_options_reach_the_config_and_the_rest_is_the_presets(train, run):
    levels = ["--model.channel-mult", "1", "2", "4", "--model.attention-resolutions", "4", "2"]
    assert train(*levels, "--model.fused", "True").code == 0
    config, facts = RunFolder(run).read_config()
    preset = get_preset("digits-unet")
    assert isinstance(config.model, UNetConfig)
    assert (config.model.channel_mult, config.model.attention_resolutions) == ((1, 2, 4), (4, 2))
    assert (config.model.model_channels, config.model.fused) == (8, True)
    assert (config.model.num_classes, config.model.scaling) == (preset.model.num_classes, preset.model.scaling)
    assert config.train.lr == preset.train.lr
    assert facts["preset"] == "digits-unet"


class TestHelp:
    @pytest.mark.parametrize(
        ("preset", "own", "other"),
        [
            ("digits-unet", ["--model.channel-mult", "--model.dropout"], ["--model.embed-dim", "--model.patch-size"]),
            ("cifar10-unet", ["--model.num-groups", "--model.learn-sigma"], ["--model.depth"]),
            ("digits-uvit", ["--model.embed-dim", "--model.depth"], ["--model.channel-mult", "--model.dropout"]),
        ],
    )
    def test_shows_the_fields_of_the_presets_own_network(self, cli, preset, own, other):
        result = cli("train", preset, "--help")
        assert result.code == 0
        assert all(option in result.out for option in [*own, "--model.scaling", "--train.lr", "--out"])
        assert not any(option in result.out for option in other)


class TestRefusals:
    """Exit code 2, one paragraph, and no trace of a run."""

    @pytest.mark.parametrize(
        "case",
        [
            (["--model.num-groups", "3"], ["num_groups: got 3, expected a divisor of the channels", "(8, 16)"]),
            (["--model.model-channels", "10"], ["num_groups: got 4, expected a divisor of the channels", "(10, 20)"]),
            (["--model.img-size", "9"], ["img_size: got 9, expected a multiple of 2", "channel_mult"]),
            (["--model.img-size", "16"], ["attention_resolutions: got (4,), expected sides among (16, 8)"]),
            (["--model.attention-resolutions", "5"], ["attention_resolutions: got (5,), expected sides among (8, 4)"]),
            (["--model.num-heads", "3"], ["num_heads: got 3, expected a divisor of"]),
            (["--model.dropout", "1"], ["dropout: got 1"]),
            (["--model.kappa", "0"], ["kappa: got 0.0", "> 0"]),
            (["--model.scaling", "lss"], ["scaling: got 'lss'", "Did you mean 'ls'"]),
            (["--model.num-classes", "5"], ["model.num_classes: got 5, expected 11"]),
            (["--model.num-classes", "-1"], ["diffusion.label_dropout: got 0.1", "0 in a model without labels"]),
            (["--model.in-chans", "3"], ["takes images of 3×8×8", "--model.in-chans 1"]),
            (["--model.learn-sigma"], ["model.learn_sigma: got True", "--model.no-learn-sigma"]),
        ],
        ids=lambda case: " ".join(case[0]),
    )
    def test_bad_values(self, train, run, assert_refused, case):
        options, texts = case
        assert_refused(train(*options), *texts)
        assert not run.exists()

    @pytest.mark.parametrize(
        "case",
        [
            (["--model.embed-dim", "16"], ["--model.embed-dim"]),
            (["--model.channel-mul", "1", "2"], ["--model.channel-mul", "--model.channel-mult"]),
            (["--model.channel-mult", "one"], ["--model.channel-mult", "one"]),
        ],
        ids=lambda case: " ".join(case[0]),
    )
    def test_what_cannot_be_parsed(self, train, run, case):
        options, texts = case
        result = train(*options)
        assert result.code == 2
        assert all(text in result.err for text in texts)
        assert "Traceback" not in result.err
        assert not run.exists()

    def test_an_option_of_a_unet_given_to_a_uvit(self, cli, tmp_path):
        result = cli("train", "digits-uvit", "--model.channel-mult", "1", "2", "--out", tmp_path / "run")
        assert result.code == 2
        assert "--model.channel-mult" in result.err
        assert not (tmp_path / "run").exists()

    def test_a_uvit_in_the_folder(self, cli, tiny, train, run, assert_refused):
        assert cli("train", "digits-uvit", *tiny, "--out", run).code == 0
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert_refused(train(), "holds a run of another kind (model.architecture was 'uvit', now 'unet')")
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_models_lists_the_unets(cli):
    result = cli("models", "unet*")
    assert result.code == 0
    rows = {line.split("│")[1].strip(): line for line in result.out.splitlines() if line.startswith("│")}
    assert list(rows) == list_models("unet*")
    for name, texts in {
        "unet_cifar10": ("3×32×32", "none", "35.8M", " 12 ", " – "),
        "unet_imagenet64": ("3×64×64", "1000 labels", " 12 ", " – "),
        "unet_imagenet64_large": ("3×64×64", "1000 labels", " 16 "),
        "unet_coco": ("4×32×32", "text", " 12 "),
        "unet_digits": ("1×8×8", "11 labels", " – "),
    }.items():
        assert all(text in rows[name] for text in texts), rows[name]
