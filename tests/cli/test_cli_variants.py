"""The variants of scaling on the command line: trained, resumed, sampled from, refused."""

import pytest
import torch

from scalelong_fast.scaling import IEGate, ReZero
from scalelong_fast.training import RunFolder

UNET = ["--model.model-channels", "8", "--model.num-res-blocks", "1", "--model.num-groups", "4"]


@pytest.mark.parametrize("network", ["uvit", "unet"])
def test_rezero_and_ie_train_resume_and_sample(cli, tiny, tmp_path, network):
    small = tiny if network == "uvit" else [*UNET, *tiny[tiny.index("--train.steps") :]]
    options = [*small, "--model.block-scaling", "rezero", "--model.calibration", "ie", "--train.lr", "0.01"]
    run = tmp_path / "run"
    command = ["train", f"digits-{network}", *options, "--out", run]
    assert cli(*command).code == 0
    result = cli(*command, "--train.steps", "4")
    assert result.code == 0, result.err
    assert "Going on from step 2 of 4" in result.out
    model = RunFolder(run).load_ema()
    assert isinstance(model.scaling.gate, IEGate)
    alphas = torch.cat([m.alpha for m in model.modules() if isinstance(m, ReZero)])
    assert alphas.abs().min() > 0
    result = cli("sample", run, "--labels", "3", "--out", tmp_path / "x.png")
    assert result.code == 0, result.err


def test_another_variant_does_not_go_on_with_a_run(cli, tiny, tmp_path, assert_refused):
    command = ["train", "digits-uvit", *tiny, "--out", tmp_path / "run"]
    assert cli(*command, "--model.block-scaling", "stable-tau").code == 0
    assert_refused(cli(*command), "block_scaling")


def test_unknown_names_are_refused(cli, tiny, tmp_path):
    for option in ("--model.block-scaling", "--model.calibration"):
        result = cli("train", "digits-uvit", *tiny, option, "sse", "--out", tmp_path / "run")
        assert result.code == 2
        assert "sse" in result.err
    assert not (tmp_path / "run").exists()
