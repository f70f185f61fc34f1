"""The digits and their classifier, one tiny run, and the command called in this process."""

import contextlib
import copy
import io
import shutil
from types import SimpleNamespace

import pytest
import torch

from scalelong_fast.cli import main
from scalelong_fast.data import load_images
from scalelong_fast.evaluation import FeatureExtractor, extractors, measure_dataset, save_reference
from scalelong_fast.evaluation.digits_classifier import train_digits_classifier

TINY = [
    *("--model.embed-dim", "16", "--model.depth", "2", "--model.num-heads", "2"),
    *("--train.steps", "2", "--train.batch-size", "8", "--train.log-every", "1", "--train.save-every", "1"),
    *("--train.device", "cpu", "--train.precision", "fp32", "--train.no-tensorboard"),
    *("--sample.sampler", "ddim", "--sample.steps", "2", "--sample.grid", "1"),
]


@pytest.fixture(scope="session")
def digits():
    """The 1,797 handwritten digits."""
    pytest.importorskip("sklearn")
    return load_images("digits")


@pytest.fixture(scope="session")
def classifier(digits):
    """The classifier whose activations are the features of digits."""
    return train_digits_classifier()


@pytest.fixture
def extractor(classifier):
    """The extractor ``digits``."""
    return FeatureExtractor("digits", classifier)


@pytest.fixture(scope="session")
def noisy(digits):
    """``noisy(32)``: the digits under Gaussian noise of that many grey levels."""

    def add(level):
        noise = torch.randn(digits.images.shape, generator=torch.Generator().manual_seed(0))
        return (digits.images + level * noise).round().clamp(0, 255).to(torch.uint8)

    return add


@pytest.fixture(scope="session")
def cli():
    """``cli("evaluate", ...)``: run the command here; gives ``code``, ``out`` and ``err``."""

    def run(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as leaving:
                code = leaving.code
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())

    return run


@pytest.fixture(scope="session")
def assert_refused():
    """Assert exit code 2 and one paragraph on stderr that holds every given text."""

    def check(result, *texts):
        assert result.code == 2, (result.out, result.err)
        errors = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
        assert len(errors) == 1, result.err
        for text in texts:
            assert text in errors[0]

    return check


@pytest.fixture
def quick_classifier(classifier, monkeypatch):
    """The commands take the classifier that is trained already."""
    monkeypatch.setattr(extractors, "train_digits_classifier", lambda: copy.deepcopy(classifier))


@pytest.fixture(scope="session")
def trained(cli, digits, tmp_path_factory):
    """The folder of a tiny class-conditional run; not to be changed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    result = cli("train", "digits-uvit", *TINY, "--out", out)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="session")
def unconditional(cli, digits, tmp_path_factory):
    """The folder of a tiny run without labels; not to be changed."""
    out = tmp_path_factory.mktemp("unconditional") / "run"
    options = ["--model.num-classes", "-1", "--diffusion.label-dropout", "0", "--sample.guidance", "1"]
    result = cli("train", "digits-uvit", *TINY, *options, "--out", out)
    assert result.code == 0, result.err
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="session")
def stats(digits, classifier, tmp_path_factory):
    """Statistics of the digits with their features."""
    path = tmp_path_factory.mktemp("stats") / "digits.npz"
    save_reference(path, measure_dataset(digits, FeatureExtractor("digits", classifier), keep=True))
    return path
