"""``scalelong-fast evaluate``: the result, what it depends on, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scalelong_fast.data import load_images
from scalelong_fast.evaluation import (
    frechet_distance,
    kernel_distance,
    load_reference,
    moments_of,
    pool,
    steps,
)
from scalelong_fast.evaluation.picture import nearest
from scalelong_fast.training import RunFolder, generate

image_module = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("quick_classifier")


@pytest.fixture
def evaluate(cli, run, stats):
    """``evaluate("--fid", "100")``: the result that a successful command added."""

    def call(*options, reference=stats):
        given = () if reference is None else ("--reference", reference)
        result = cli("evaluate", run, "--device", "cpu", *given, *options)
        assert result.code == 0, result.err
        return json.loads((run / "evaluation.json").read_text())[-1]

    return call


class TestResult:
    def test_it_is_the_distance_of_the_images_that_sample_draws(self, evaluate, run, stats, extractor):
        result = evaluate("--fid", "70")
        config, _ = RunFolder(run).read_config()
        images, _ = generate(RunFolder(run).load_ema(), config, num_per_label=7)
        features = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
        expected = frechet_distance(moments_of(features), load_reference(stats).moments)
        assert result["fid"] == pytest.approx(expected, rel=1e-5)
        assert result["n"] == 70

    def test_what_stands_beside_the_number(self, evaluate, run, extractor, digits):
        result = evaluate("--fid", "30", "--seed", "4", "--steps", "3", "--guidance", "1.5", "--sampler", "dpmpp")
        assert result["extractor"] == {"name": "digits", "fingerprint": extractor.fingerprint, "width": 64}
        assert result["reference"] == {"name": "digits", "n": 1797, "data_fingerprint": digits.fingerprint()}
        sampling = result["sampling"]
        assert {key: sampling[key] for key in ("sampler", "steps", "guidance", "seed", "condition", "step")} == {
            "sampler": "dpm-solver++",
            "steps": 3,
            "guidance": 1.5,
            "seed": 4,
            "condition": "balanced",
            "step": 2,
        }
        assert sampling["precision"] == "fp32"
        assert len(sampling["weights"]) == 16
        assert result["kid"] is None
        assert result["protocol"] is None
        assert set(result["versions"]) >= {"torch", "numpy"}
        assert result["date"].endswith("+00:00")
        assert result["processes"] == 1

    def test_results_are_added(self, evaluate, run):
        evaluate("--fid", "20")
        evaluate("--fid", "30")
        assert [result["n"] for result in json.loads((run / "evaluation.json").read_text())] == [20, 30]

    def test_the_table(self, cli, run, stats):
        result = cli("evaluate", run, "--device", "cpu", "--reference", stats, "--fid", "20", "--protocol", "auto")
        for text in ("Fréchet distance", "1,797 images", "dpm-solver++, 50 steps", "digits-10k, but images 20 (10000)"):
            assert text in result.out
        assert "the distance is mostly bias. Take more." in result.out

    def test_the_run_s_data_are_the_reference_unless_another_is_given(self, evaluate):
        stored, measured = evaluate("--fid", "40"), evaluate("--fid", "40", reference=None)
        assert measured["fid"] == pytest.approx(stored["fid"], rel=1e-5)
        assert measured["reference"] == stored["reference"]

    def test_kid(self, evaluate):
        pytest.importorskip("torchmetrics")
        result = evaluate("--fid", "40", "--kid")
        assert result["kid"]["subsets"] == 100
        assert result["kid"]["size"] == result["kid"]["of_generated"] == 40
        assert result["kid"]["of_reference"] == 1797
        assert 0 < result["kid"]["std"] < result["kid"]["mean"]

    def test_kid_takes_a_bounded_number_of_features(self, evaluate, cli, run, stats, monkeypatch):
        pytest.importorskip("torchmetrics")
        monkeypatch.setattr(pool, "KEPT", 30)
        kid = evaluate("--fid", "40", "--kid")["kid"]
        assert (kid["size"], kid["of_generated"], kid["of_reference"]) == (30, 30, 30)
        measured = evaluate("--fid", "40", "--kid", reference=None)
        assert (measured["reference"]["n"], measured["kid"]["of_reference"]) == (1797, 30)
        out = cli("evaluate", run, "--device", "cpu", "--reference", stats, "--fid", "40", "--kid").out
        assert "100 subsets of 30, of 30 generated and 30 reference images" in " ".join(out.replace("│", " ").split())

    def test_a_finished_fid_is_stored_before_kid_starts(self, cli, run, stats, monkeypatch):
        pytest.importorskip("torchmetrics")

        def interrupt(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(steps, "kernel_distance", interrupt)
        result = cli("evaluate", run, "--device", "cpu", "--reference", stats, "--fid", "40", "--kid")
        assert result.code == 130
        stored = json.loads((run / "evaluation.json").read_text())
        assert [(one["fid"] > 0, one["kid"]) for one in stored] == [(True, None)]
        assert f"The distance {stored[0]['fid']:.4f} is stored in" in result.out

    def test_kid_goes_to_the_cpu_where_the_gpu_is_full(self, evaluate, monkeypatch):
        pytest.importorskip("torchmetrics")
        plain, devices = evaluate("--fid", "40", "--kid"), []

        def full_at_first(features, reference, seed, device):
            devices.append(device)
            if len(devices) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return kernel_distance(features, reference, seed, device)

        monkeypatch.setattr(steps, "kernel_distance", full_at_first)
        assert evaluate("--fid", "40", "--kid")["kid"] == plain["kid"]
        assert devices[1] == "cpu"

    def test_a_folder_is_decoded_batch_by_batch(self, evaluate, digits, extractor, tmp_path):
        folder = tmp_path / "pictures"
        folder.mkdir()
        for index in range(90):
            pixels = digits.images[index, 0].numpy()
            image_module.fromarray(pixels).resize((16, 16), image_module.Resampling.NEAREST).save(
                folder / f"{index:02d}.png"
            )
        result = evaluate("--fid", "20", "--batch-size", "32", reference=folder)
        everything = load_images("folder", path=folder, img_size=8)
        assert result["reference"]["n"] == 90
        # Brought back to 8×8 they are the digits themselves.
        assert torch.equal(everything.images, digits.images[:90])
        np.savez(tmp_path / "same.npz", features=extractor(everything.images).numpy())
        assert evaluate("--fid", "20", reference=tmp_path / "same.npz")["fid"] == pytest.approx(result["fid"], rel=1e-5)

    def test_the_picture_has_the_first_images_and_their_neighbours(self, evaluate, run):
        evaluate("--fid", "20")
        with image_module.open(run / "evaluation.png") as alone:
            assert alone.size == (10 * 50 - 2, 48)
        evaluate("--fid", "20", reference=None)
        with image_module.open(run / "evaluation.png") as beside:
            assert beside.size == (6 * 50 - 2, 10 * 50 - 2)

    def test_a_picture_that_cannot_be_written_costs_no_result(self, cli, run, stats, assert_refused):
        (run / "evaluation.png").mkdir()
        result = cli("evaluate", run, "--device", "cpu", "--reference", stats, "--fid", "20")
        assert_refused(result, "RUN: cannot write", "The result itself is stored")
        assert len(json.loads((run / "evaluation.json").read_text())) == 1

    def test_neighbours(self):
        reference = torch.tensor([[0.0, 0], [10, 0], [0, 3], [4, 4]])
        assert nearest(torch.tensor([[1.0, 1], [9, 9]]), reference, 2).tolist() == [[0, 2], [3, 1]]

    def test_an_unconditional_model(self, cli, unconditional, stats, tmp_path):
        run = shutil.copytree(unconditional, tmp_path / "unconditional")
        result = cli("evaluate", run, "--device", "cpu", "--reference", stats, "--fid", "20")
        assert result.code == 0, result.err
        assert json.loads((run / "evaluation.json").read_text())[0]["sampling"]["condition"] == "none"

    def test_nothing_else_is_written(self, evaluate, run):
        before = {path for path in run.rglob("*")}
        evaluate("--fid", "20")
        assert {path.name for path in set(run.rglob("*")) - before} == {"evaluation.json", "evaluation.png"}


class TestWhatItDependsOn:
    def test_not_on_chance_nor_on_the_batch_size(self, evaluate):
        results = [evaluate("--fid", "50", "--batch-size", size)["fid"] for size in ("50", "50", "7")]
        assert results[0] == results[1]
        assert results[2] == pytest.approx(results[0], rel=1e-6)

    def test_on_the_seed_the_labels_and_the_guidance(self, evaluate):
        options = [(), ("--seed", "1"), ("--labels", "random"), ("--labels", "data"), ("--guidance", "1")]
        assert len({evaluate("--fid", "50", *option)["fid"] for option in options}) == 5

    def test_on_the_model(self, evaluate, run, trained):
        shutil.copytree(trained / "ema", run / "other")
        weights = load_file(run / "other" / "model.safetensors")
        save_file({name: weight * 1.1 for name, weight in weights.items()}, run / "other" / "model.safetensors")
        plain, other = evaluate("--fid", "20"), evaluate("--fid", "20", "--model", run / "other")
        assert plain["fid"] != other["fid"]
        assert plain["sampling"]["weights"] != other["sampling"]["weights"]
        assert other["sampling"]["step"] is None

    def test_on_the_extractor(self, evaluate, monkeypatch, run):
        monkeypatch.syspath_prepend(str(Path(__file__).parent))
        options = ("--fid", "20", "--extractor", "networks_for_extractor_tests:means")
        result = evaluate(*options, reference=None)
        assert result["extractor"]["width"] == 12
        assert result["fid"] > 0


class TestFeatures:
    @pytest.fixture
    def drawn(self, tmp_path):
        features = torch.randn(90, 64, generator=torch.Generator().manual_seed(0))
        np.savez(tmp_path / "drawn.npz", features=features.numpy())
        return tmp_path / "drawn.npz"

    def test_drawn_and_extracted_elsewhere(self, evaluate, drawn, stats):
        result = evaluate("--features", drawn, "--kid")
        expected = frechet_distance(load_reference(drawn).moments, load_reference(stats).moments)
        assert result["fid"] == pytest.approx(expected)
        assert result["n"] == 90
        assert result["sampling"] is None
        assert result["features"] == str(drawn)

    def test_moments_that_do_not_say_of_how_many_images(self, cli, run, drawn, stats, tmp_path):
        moments = load_reference(drawn).moments
        np.savez(tmp_path / "moments.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
        result = cli("evaluate", run, "--features", tmp_path / "moments.npz", "--reference", stats)
        assert result.code == 0, result.err
        assert "number unknown" in result.out

    def test_refusals(self, cli, run, drawn, stats, assert_refused, tmp_path):
        command = ("evaluate", run, "--features", drawn)
        assert_refused(cli(*command), "--reference: got None", "of the same extractor as --features")
        assert_refused(cli(*command, "--reference", "digits"), "--reference: got 'digits'")
        for option, value in (("--steps", "3"), ("--model", run / "ema"), ("--latent-scale", "0.5")):
            refused = cli(*command, "--reference", stats, option, value)
            assert_refused(refused, f"{option}: has no meaning with --features")
        np.savez(tmp_path / "narrow.npz", features=np.ones((9, 3)))
        assert_refused(cli(*command, "--reference", tmp_path / "narrow.npz"), "64 an image", "expected 3")
