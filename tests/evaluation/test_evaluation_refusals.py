"""``scalelong-fast evaluate``: what is refused, and in which words."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalelong_fast.evaluation import FeatureExtractor, Reference, load_reference, save_reference

pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("quick_classifier")


class TestRefusals:
    @pytest.mark.parametrize(
        "case",
        [
            (["--fid", "many"], ["--fid: got 'many'"]),
            (["--fid", "1"], ["--fid: got 1"]),
            (["--protocol", "imagenet"], ["--protocol: got 'imagenet'", "Did you mean"]),
            (["--steps", "1001"], ["--steps: got 1001"]),
            (["--guidance", "-1"], ["--guidance: got -1"]),
            (["--sampler", "dimm"], ["sampler: got 'dimm'", "Did you mean 'ddim'"]),
            (["--seed", "-1"], ["--seed: got -1"]),
            (["--batch-size", "0"], ["--batch-size: got 0"]),
            (["--device", "gpu"], ["--device: got 'gpu'"]),
            (["--extractor", "digit"], ["--extractor: got 'digit'"]),
            (["--reference", "nothing"], ["--reference: got 'nothing'"]),
            (["--reference", "nothing.npz"], ["--reference: got 'nothing.npz'", "cannot be read"]),
            (["--model", "nowhere"], ["--model: got 'nowhere'"]),
            (["--prompts", "nowhere"], ["--prompts: got 'nowhere'", "the model takes no text"]),
            (["--autoencoder", "no/such/folder"], ["--autoencoder: got 'no/such/folder'", "AutoencoderKL"]),
            (["--latent-scale", "0"], ["--latent-scale: got 0"]),
        ],
        ids=lambda case: " ".join(case[0]),
    )
    def test_bad_values(self, cli, trained, assert_refused, case):
        options, texts = case
        before = sorted(trained.rglob("*"))
        assert_refused(cli("evaluate", trained, "--fid", "20", "--device", "cpu", *options), *texts)
        assert sorted(trained.rglob("*")) == before

    def test_a_reference_of_another_extractor(self, cli, trained, stats, assert_refused, tmp_path):
        stored = load_reference(stats)
        other = vars(stored.extractor) | {"name": "inception"}
        save_reference(
            tmp_path / "other.npz", Reference("digits", stored.moments, type(stored.extractor)(**other), "f00d")
        )
        result = cli("evaluate", trained, "--fid", "20", "--device", "cpu", "--reference", tmp_path / "other.npz")
        assert_refused(result, "made with extractor 'inception'", "Give --extractor inception")

    def test_kid_of_moments_alone(self, cli, trained, stats, assert_refused, tmp_path):
        stored = load_reference(stats)
        save_reference(tmp_path / "moments.npz", Reference("digits", stored.moments, stored.extractor))
        options = ("--fid", "20", "--device", "cpu", "--reference", tmp_path / "moments.npz")
        assert_refused(cli("evaluate", trained, *options, "--kid"), "holds moments alone", "--keep-features")
        assert_refused(cli("evaluate", trained, *options, "--labels", "data"), "--labels: got 'data'")

    def test_kid_without_torchmetrics_is_found_before_the_work(self, cli, trained, stats, assert_refused, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
        monkeypatch.setattr("scalelong_fast.evaluation.evaluate.draw_features", None)
        result = cli("evaluate", trained, "--fid", "20", "--device", "cpu", "--reference", stats, "--kid")
        assert_refused(result, "--kid: it needs torchmetrics")

    def test_images_of_another_size(self, cli, trained, assert_refused, tmp_path, monkeypatch):
        monkeypatch.setattr("scalelong_fast.evaluation.evaluate.open_images", lambda *args, **options: Large())
        result = cli("evaluate", trained, "--fid", "20", "--device", "cpu", "--reference", "cifar10")
        assert_refused(result, "--reference: 'large' has images of 9×9, the model draws 8×8")

    def test_a_damaged_list_of_results(self, cli, run, assert_refused):
        for content in ("{", "{}"):
            (run / "evaluation.json").write_text(content)
            assert_refused(cli("evaluate", run, "--fid", "20"), "evaluation.json", "Move it away")
            assert (run / "evaluation.json").read_text() == content

    def test_no_run(self, cli, tmp_path, assert_refused):
        assert_refused(cli("evaluate", tmp_path / "nowhere"), "RUN: got", "the folder of a training run")
        assert_refused(cli("evaluate", "--fid", "10k"), "RUN: got '--fid', expected the run folder first")

    def test_a_diverged_model(self, cli, run, stats, assert_refused):
        file = run / "ema" / "model.safetensors"
        weights = load_file(file)
        save_file({name: weight * torch.nan for name, weight in weights.items()}, file)
        result = cli("evaluate", run, "--fid", "20", "--device", "cpu", "--reference", stats)
        assert_refused(result, "RUN: the model draws images that are NaN or infinite")
        assert not (run / "evaluation.json").exists()

    @pytest.mark.parametrize("command", ["evaluate", "fid-stats"])
    def test_a_full_gpu_is_one_line_with_the_mend(self, cli, run, assert_refused, monkeypatch, tmp_path, command):
        call = FeatureExtractor.__call__

        def full(self, images):
            if len(images) < 3:
                return call(self, images)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")

        monkeypatch.setattr(FeatureExtractor, "__call__", full)
        arguments = {"evaluate": [run, "--fid", "20"], "fid-stats": ["digits", "--out", tmp_path / "x.npz"]}[command]
        result = cli(command, *arguments, "--device", "cpu", "--batch-size", "64")
        assert_refused(result, "--batch-size: 64 images at once", "Tried to allocate 2.00 GiB)", "--batch-size 32")

    def test_features_that_are_not_finite(self, cli, run, stats, assert_refused, monkeypatch):
        call = FeatureExtractor.__call__
        # Blank images to identify the extractor come in ones and twos; the drawn ones are many.
        spoil = lambda self, images: call(self, images) * (1 if len(images) < 3 else torch.nan)  # noqa: E731
        monkeypatch.setattr(FeatureExtractor, "__call__", spoil)
        result = cli("evaluate", run, "--fid", "20", "--device", "cpu", "--reference", stats)
        assert_refused(result, "features: some are NaN or infinite", "scalelong-fast sample")
        assert not (run / "evaluation.json").exists()

    def test_help(self, cli):
        text = cli("evaluate", "--help").out
        for option in ("--fid", "--protocol", "--reference", "--extractor", "--autoencoder", "--prompts"):
            assert option in text


class Large:
    name, latent, image_shape, num_classes = "large", False, (3, 9, 9), 0
