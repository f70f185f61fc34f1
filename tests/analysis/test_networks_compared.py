"""Networks that an analysis compares: what they are kept under, the data they learn, and those that diverge."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from scalelong_fast.analysis import (
    AblationSettings,
    ConvergenceSettings,
    LearntKappaSettings,
    MatrixTraining,
    OscillationSettings,
    RobustnessSettings,
    Training,
    Units,
    analyze_ablation,
    analyze_convergence,
    analyze_learnt_kappa,
    analyze_oscillation,
    analyze_robustness,
    sample_distance,
)
from scalelong_fast.analysis import convergence as convergence_module
from scalelong_fast.analysis.ablation import measure_variant
from scalelong_fast.analysis.ablation_tables import TABLES, Row
from scalelong_fast.analysis.learnt_kappa import read_kappas
from scalelong_fast.analysis.networks import train_each, unless_diverged
from scalelong_fast.analysis.progress import silent
from scalelong_fast.analysis.sample_distance import SampleDistance
from scalelong_fast.analysis.training import DivergedError, open_data
from scalelong_fast.errors import UserError


@pytest.fixture
def digits_in_a_folder(tmp_path):
    """Grey images of 8×8 in ten classes, which the preset digits-uvit takes as they are."""
    generator = np.random.default_rng(0)
    for label in range(10):
        (tmp_path / "photos" / str(label)).mkdir(parents=True)
        for number in range(2):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / str(label) / f"{number}.png")
    return tmp_path / "photos"


class TestData:
    def test_results_are_kept_under_the_keys_they_had_before_data_could_be_given(self):
        key = {"preset": "digits-unet", "kappa": 0.7, "depth": None, "steps": 600, "batch_size": 8}
        assert Training(preset="digits-unet", depth=None).key() == key

    def test_other_data_are_part_of_the_key_and_a_folder_is_resolved(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        training = Training("cifar10-uvit", data="folder", path="photos")
        key = training.key()
        assert (key["data"], key["path"]) == ("folder", tmp_path / "photos")
        assert "scalings" not in key
        assert training.name == "cifar10-uvit on folder photos"

    def test_the_run_has_the_data_that_were_given_and_else_the_presets(self, tmp_path):
        def data(**changes):
            return Training("cifar10-uvit", **changes).config("none", 0).data

        assert (data().name, data().path, data().flip) == ("cifar10", None, True)
        assert (data(path=tmp_path).name, data(path=tmp_path).path) == ("cifar10", tmp_path)
        assert (data(data="folder", path=tmp_path).name, data(data="folder").path) == ("folder", None)
        with pytest.raises(UserError, match=r"--data: got 'foldr'.* 'folder'"):
            data(data="foldr")

    def test_a_network_learns_a_folder_of_images(self, tiny_training, digits_in_a_folder):
        training = tiny_training(scalings=("ls",), data="folder", path=digits_in_a_folder)
        assert len(open_data(training.config("ls", 0))) == 20
        own = analyze_learnt_kappa(LearntKappaSettings(training, recordings=1))
        other = analyze_learnt_kappa(LearntKappaSettings(tiny_training(scalings=("ls",)), recordings=1))
        assert own.data["final"] != other.data["final"]
        assert json.loads(json.dumps(own.settings, default=str))["training"]["path"] == str(digits_in_a_folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"data": "folder"}, "^--path: got None, expected a folder of images. Give it with --path FOLDER"),
            ({"data": "folder", "path": "nowhere"}, "^--path: '.*nowhere' does not exist"),
            ({"path": "."}, "^--path: got .* expected none for digits"),
            ({"preset": "cifar10-uvit", "data": "digits"}, "digits.*the network is that of --preset: take one that"),
        ],
        ids=str,
    )
    def test_data_that_cannot_be_are_refused_by_the_options_of_an_analysis(
        self, tiny_training, tmp_path, changes, message
    ):
        training = tiny_training(scalings=("none", "cs"), **changes)
        units = Units(tmp_path / "units")
        with pytest.raises(UserError, match=message):
            analyze_robustness(RobustnessSettings(training, checks=1), units)
        with pytest.raises(UserError, match=message):
            analyze_convergence(ConvergenceSettings(training, every=1, sample_every=1), units)
        with pytest.raises(UserError, match=message):
            analyze_ablation(TABLES[4], AblationSettings(training), units)
        assert not units.folder.exists()

    def test_a_reference_is_measured_once_in_a_process(self, tiny_training, monkeypatch):
        measured, measure = [], sample_distance.measure_dataset

        def counted(dataset, *args, **kwargs):
            measured.append(dataset.fingerprint())
            return measure(dataset, *args, **kwargs)

        monkeypatch.setattr(sample_distance, "_REFERENCES", {})
        monkeypatch.setattr(sample_distance, "measure_dataset", counted)
        distances = [SampleDistance(tiny_training().config(s, 0), 10, 1) for s in ("none", "ls")]
        assert distances[0]._reference is distances[1]._reference
        assert len(measured) == 1


#: What is trained here breaks where it is asked to; functions of a module, as jobs of several processes are.
def _trained(scaling, seed):
    if (scaling, seed) in (("cs", 1), ("ls", 0)):
        raise DivergedError("NaN", 10 + seed)
    return {"loss": float(seed)}


def diverges(monkeypatch, scaling, seed):
    """One network of a convergence analysis does."""
    curve = convergence_module.learning_curve

    def broken(config, *args):
        if (config.model.scaling, config.train.seed) == (scaling, seed):
            raise DivergedError("NaN", 3)
        return curve(config, *args)

    monkeypatch.setattr(convergence_module, "learning_curve", broken)


class TestDivergence:
    def test_networks_that_diverge_are_all_named_once_and_not_trained_again(self, tiny_training, tmp_path):
        training, units, seen = tiny_training(scalings=("none", "cs", "ls")), Units(tmp_path), []
        for _ in range(2):
            with pytest.raises(UserError) as caught:
                train_each(training, {"analysis": "x"}, _trained, units, lambda *now: seen.append(now), 1, "Do that.")
            assert "2 of 6 networks diverged" in str(caught.value)
            assert "cs, seed 1 (seen at step 11); ls, seed 0 (seen at step 10). They would again. Do that." in str(
                caught.value
            )
            assert "goes on from there" not in str(caught.value)
        assert len(seen) == 6
        whole = train_each(tiny_training(scalings=("none",)), {"analysis": "x"}, _trained, units, silent, 1)
        assert whole == {"none": [{"loss": 0.0}, {"loss": 1.0}]}

    def test_jobs_can_be_sent_to_other_processes(self, tiny_training, monkeypatch):
        def computed(jobs, *_):
            return [pickle.loads(pickle.dumps(job.compute))() for job in jobs]

        monkeypatch.setattr("scalelong_fast.analysis.networks.run_jobs", computed)
        settings = OscillationSettings(tiny_training(scalings=("none",), seeds=(0,)), every=1)
        assert analyze_oscillation(settings).data["records"]["none"][0]["steps"] == [1, 2, 3, 4]

    def test_other_errors_are_no_divergence(self):
        def refuse():
            raise UserError("--depth")

        with pytest.raises(UserError, match="--depth"):
            unless_diverged(refuse)

    @pytest.mark.parametrize("kind", ["oscillation", "robustness", "kappa"])
    def test_analyses_that_need_every_network_say_which_diverged(self, tiny_training, monkeypatch, kind):
        monkeypatch.setattr("scalelong_fast.training.step.learning_rate", lambda step, train: math.nan)
        training = tiny_training(scalings=("ls",))
        analyze = {
            "oscillation": lambda: analyze_oscillation(OscillationSettings(training, every=1)),
            "robustness": lambda: analyze_robustness(RobustnessSettings(training, checks=1)),
            "kappa": lambda: analyze_learnt_kappa(LearntKappaSettings(training, recordings=1)),
        }[kind]
        with pytest.raises(
            UserError, match=r"ls, seed 0 \(seen at step \d\); ls, seed 1 .*Choose other --seeds or --sc"
        ):
            analyze()

    def test_matrix_unets_that_die_are_named_with_what_helps(self):
        training = MatrixTraining(scalings=("none",), depth=2, steps=4, batch_size=4, seeds=(0,))
        settings = OscillationSettings(training, every=1, learning_rate=1e30)
        with pytest.raises(UserError, match=r"none, seed 0 \(seen at step .*--learning-rate or --block-depth 1"):
            analyze_oscillation(settings)

    def test_a_network_that_diverged_did_not_get_there(self, tiny_training, monkeypatch, tmp_path):
        diverges(monkeypatch, "cs", seed=1)
        settings = ConvergenceSettings(
            tiny_training(scalings=("none", "cs", "ls")),
            every=1,
            probe=8,
            extractor="none",
            shares=(1.5,),
            rounds=1,
            sample_every=1,
        )
        followed = convergence_module.follow(settings, "cs", 1)
        assert followed == {"steps": [], "losses": [], "sampled": [], "distances": [], "diverged": 3}
        finding = analyze_convergence(settings, Units(tmp_path), workers=1)
        (level,) = finding.data["levels"]
        assert level["steps"]["cs"][0] is not None
        assert level["steps"]["cs"][1] is None
        assert level["steps_over_own"]["cs"] is None
        assert "Diverged, and so got nowhere: cs, seed 1 (seen at step 3)." in finding.sentence
        assert "ls, seed" not in finding.sentence
        from matplotlib.figure import Figure

        figure = Figure()
        finding.draw(figure)
        assert [line.get_label() for line in figure.axes[0].lines] == ["none", "cs", "ls"]

    def test_a_level_relative_to_a_network_that_diverged_is_out_of_reach(self, tiny_training, monkeypatch):
        diverges(monkeypatch, "none", seed=0)
        settings = ConvergenceSettings(
            tiny_training(scalings=("none", "ls")),
            every=1,
            probe=8,
            extractor="none",
            shares=(10.0,),
            rounds=1,
            sample_every=1,
        )
        (level,) = analyze_convergence(settings, workers=1).data["levels"]
        assert [steps[0] for steps in level["steps"].values()] == [None, None]
        assert [steps[1] for steps in level["steps"].values()] == [0, 0]

    def test_no_finding_where_every_network_diverged(self, tiny_training, monkeypatch):
        monkeypatch.setattr("scalelong_fast.training.step.learning_rate", lambda step, train: math.nan)
        settings = ConvergenceSettings(
            tiny_training(scalings=("none", "ls")), every=1, probe=8, extractor="none", sample_every=1
        )
        with pytest.raises(UserError, match=r"Every network diverged: none, seed 0 .*; ls, seed 1 \(seen at step 2\)"):
            analyze_convergence(settings, workers=1)

    def test_samples_that_are_not_finite_are_a_divergence_too(self, tiny_training, monkeypatch):
        drawn = "scalelong_fast.evaluation.drawing.sample_images"
        monkeypatch.setattr(
            drawn, lambda *args, image_shape, seeds, **kwargs: torch.full((len(seeds), 1, 8, 8), math.nan)
        )
        settings = AblationSettings(tiny_training(), probe=8, samples=8, solver_steps=1)
        assert measure_variant(settings, Row("none", "", {"scaling": "none"}), 0) == {"diverged": 4}


def test_a_run_whose_data_are_gone_is_named(tiny_training, tmp_path, monkeypatch):
    gone = tiny_training(data="folder", path=tmp_path / "gone").config("ls", 0)

    class Folder:
        def __init__(self, path):
            pass

        read_config = staticmethod(lambda: (gone, {}))
        load_ema = staticmethod(lambda: None)

    monkeypatch.setattr("scalelong_fast.analysis.learnt_kappa.RunFolder", Folder)
    with pytest.raises(UserError, match=r"--runs: got .*run', expected runs whose data can be opened.*gone' does not"):
        read_kappas(tmp_path / "run")
