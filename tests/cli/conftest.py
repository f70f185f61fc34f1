"""The command called in this process, and one tiny run that the sample tests share."""

import contextlib
import io
from types import SimpleNamespace

import pytest

from scalelong_fast.cli import main

TINY = [
    *("--model.embed-dim", "16", "--model.depth", "2", "--model.num-heads", "2"),
    *("--train.steps", "2", "--train.batch-size", "8", "--train.log-every", "1", "--train.save-every", "1"),
    *("--train.device", "cpu", "--train.precision", "fp32", "--train.no-tensorboard"),
    *("--sample.sampler", "ddim", "--sample.steps", "2", "--sample.grid", "1"),
]


@pytest.fixture(scope="session")
def cli():
    """``cli("train", ...)``: run the command here; gives ``code``, ``out`` and ``err``."""

    def run(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as leaving:  # argparse and tyro leave this way
                code = leaving.code
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())

    return run


@pytest.fixture(scope="session")
def tiny():
    """Options that shrink the digits preset to a second of training; later ones override them."""
    return TINY


@pytest.fixture(scope="session")
def assert_refused():
    """Assert exit code 2 and one paragraph on stderr that holds every given text."""

    def check(result, *texts):
        assert result.code == 2, (result.out, result.err)
        errors = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
        assert len(errors) == 1, result.err
        assert errors[0].startswith("scalelong-fast: error: ")
        for text in texts:
            assert text in errors[0]

    return check


@pytest.fixture(scope="session")
def trained(cli, tiny, tmp_path_factory):
    """The folder of a run trained long enough for labels to show in the pixels; not to be changed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    options = ["--train.steps", "60", "--train.log-every", "20", "--train.save-every", "60"]
    learning = [
        "--train.lr",
        "0.02",
        "--train.warmup-steps",
        "5",
        "--train.ema-decay",
        "0.5",
        "--train.batch-size",
        "32",
    ]
    result = cli("train", "digits-uvit", *tiny, *options, *learning, "--out", out)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="session")
def unconditional(cli, tiny, tmp_path_factory):
    """The folder of a run without labels; not to be changed."""
    out = tmp_path_factory.mktemp("unconditional") / "run"
    options = ["--model.num-classes", "-1", "--diffusion.label-dropout", "0", "--sample.guidance", "1"]
    result = cli("train", "digits-uvit", *tiny, *options, "--sample.grid", "2", "--out", out)
    assert result.code == 0, result.err
    return out
