"""Options of ``scalelong-fast analyze``: what follows another one that was given, and what has no effect is refused."""

import dataclasses
import inspect

import numpy as np
import pytest
from PIL import Image

from scalelong_fast.analysis.training import open_data
from scalelong_fast.cli.analyses import ANALYSES, ablation, convergence, watched
from scalelong_fast.cli.analyses.together import AllArguments, run_all
from scalelong_fast.cli.parse import parse
from scalelong_fast.errors import UserError


@pytest.fixture
def photos(tmp_path):
    """Unlabelled colour images of differing sizes."""
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(4):
        pixels = generator.integers(0, 256, (40, 36 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("name", ["oscillation", "robustness", "kappa", "convergence", "ablation"])
def test_a_network_of_a_preset_learns_photos_of_ones_own(photos, name):
    own = ["--preset", "cifar10-uvit", "--data", "folder", "--path", str(photos)]
    analysis = ANALYSES[name]
    task, *_ = analysis.tasks(parse(analysis.arguments, own, name))
    # A table of the ablation is a closure; the others are partial functions.
    settings = task.args[0] if name != "ablation" else inspect.getclosurevars(task).nonlocals["settings"]
    dataset = open_data(settings.training.config("none" if name != "kappa" else "ls", 0))
    assert (len(dataset), dataset.image_shape) == (4, (3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["robustness", "--data", "foldr"], ["--data: got 'foldr'", "'folder'"]),
        (["robustness", "--data", "folder"], ["--path: got None, expected a folder of images"]),
        (["oscillation", "--preset", "matrix", "--data", "folder"], ["--data: got 'folder', expected none for matrix"]),
        (["oscillation", "--path", "photos"], ["--path: got 'photos', expected none for matrix", "Name a --preset."]),
        (["kappa", "--runs", "run", "--steps", "9"], ["--steps: got 9, expected none with --runs"]),
        (["kappa", "--runs", "run", "--scale", "smoke"], ["--scale: got 'smoke', expected none with --runs"]),
        (["kappa", "--runs", "run", "--batch-size", "9"], ["--batch-size: got 9, expected none with --runs"]),
        (["kappa", "--kappa", "0.5"], ["--kappa: got 0.5, expected none, since LS learns its own"]),
        (["kappa", "--steps", "0"], ["--steps: got 0"]),
        (["convergence", "--steps", "0"], ["--steps: got 0"]),
        (["convergence", "--every", "0"], ["--every: got 0"]),
        (["convergence", "--steps", "50", "--every", "60"], ["--every: got 60"]),
        (["all", "--workers", "0"], ["--workers: got 0"]),
    ],
    ids=str,
)
def test_what_has_no_effect_or_no_sense_is_refused(cli, assert_refused, tmp_path, arguments, texts):
    assert_refused(cli("analyze", *arguments, "--out", tmp_path / "out"), *texts)
    assert not list(tmp_path.rglob("*.json"))


class TestFewSteps:
    """Intervals that were not given follow the steps that were."""

    def test_kappa(self):
        def recordings(**given):
            (task,) = watched.learnt_kappa(watched.LearntKappaArguments(**given))
            return task.args[0].recordings

        assert recordings() == 10
        assert recordings(steps=9) == 9

    def test_oscillation(self):
        def every(**given):
            return [task.args[0].every for task in watched.oscillation(watched.OscillationArguments(**given))]

        assert every() == [5, 5]
        assert every(steps=16) == [4, 4]
        with pytest.raises(UserError, match="--every: got 5"):
            every(steps=16, every=5)

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({}, (25, 100)),
            ({"steps": 50}, (25, 50)),
            ({"steps": 60}, (25, 50)),
            ({"steps": 10}, (10, 10)),
            ({"every": 40}, (40, 80)),
            ({"every": 150}, (150, 150)),
            ({"steps": 50, "every": 7}, (7, 49)),
        ],
    )
    def test_convergence(self, given, expected):
        (task,) = convergence.convergence(convergence.ConvergenceArguments(**given))
        settings = task.args[0]
        assert (settings.every, settings.sample_every) == expected


def test_all_gives_its_workers_to_the_analyses_that_share_networks_out(tmp_path):
    seen = []
    analyses = {
        name: dataclasses.replace(analysis, tasks=lambda own, name=name: seen.append((name, own.workers)) or [])
        for name, analysis in {**watched.ANALYSES, **ablation.ANALYSES}.items()
    }
    assert run_all(analyses, AllArguments("smoke", tmp_path, 3), lambda *_: None) == 0
    assert seen == [(name, 3) for name in ("oscillation", "robustness", "kappa", "ablation")]
