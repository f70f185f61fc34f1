"""``scalelong-fast analyze``: every analysis at its smallest, and what is refused."""

import json
import subprocess
import sys

import pytest

from scalelong_fast.cli.analyze import ANALYSES

TRAINING = ["--depth", "2", "--steps", "4", "--batch-size", "4", "--seeds", "0", "1", "--workers", "1"]
CASES = {
    "noise": (["digits", "--samples", "10"], ["noise"], "Fig. 3a, b"),
    "suggest-kappa": (["digits", "--skips", "6", "--samples", "10"], ["suggest-kappa"], "§4.1"),
    "bounds": (["--skips", "2", "--widths", "8", "--trials", "4"], ["bounds", "lipschitz"], "Theorem 3.4"),
    "oscillation": (
        ["--scalings", "none", "cs", "--every", "1", *TRAINING],
        ["oscillation", "oscillation-matrix"],
        "Fig. 1 and 12",
    ),
    "robustness": (["--scalings", "none", "ls", *TRAINING], ["robustness"], "Fig. 3c"),
    "kappa": (TRAINING, ["kappa"], "Fig. 7"),
    "convergence": (["--scalings", "none", "cs", "--extractor", "none", *TRAINING], ["convergence"], "Fig. 5"),
    "ablation": (["--tables", "4", "--samples", "70", *TRAINING], ["ablation-table-4"], "ScaleLong Table 4"),
}


@pytest.mark.parametrize("name", ANALYSES)
def test_each_analysis_writes_numbers_a_figure_and_a_sentence(cli, tmp_path, name):
    options, stems, reference = CASES[name]
    result = cli("analyze", name, *options, "--scale", "smoke", "--out", tmp_path)
    assert result.code == 0, result.err
    assert reference in result.out
    for stem in stems:
        content = json.loads((tmp_path / f"{stem}.json").read_text())
        assert content["sentence"] in result.out
        assert (tmp_path / f"{stem}.png").stat().st_size > 1000
        assert (tmp_path / f"{stem}.svg").stat().st_size > 1000


def test_kappa_of_a_finished_run(cli, trained, tmp_path):
    result = cli("analyze", "kappa", "--runs", trained, "--out", tmp_path)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "kappa.json").read_text())["settings"]["runs"] == [str(trained)]


def test_a_unet_has_no_depth_to_be_told(cli, tmp_path):
    options = ["--preset", "digits-unet", "--steps", "4", "--batch-size", "2", "--seeds", "0", "--scale", "smoke"]
    assert cli("analyze", "kappa", *options, "--out", tmp_path).code == 0
    kappas = json.loads((tmp_path / "kappa.json").read_text())["data"]["final"]
    assert len(kappas[0]) == 6


def test_help_names_every_analysis(cli):
    result = cli("analyze", "--help")
    assert result.code == 0
    assert all(name in result.out for name in ANALYSES)
    assert cli("analyze").code == 2
    result = cli("analyze", "oscillation", "--help")
    assert result.code == 0
    assert "--batch-size" in result.out


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["oscilation"], ["ANALYSIS: got 'oscilation'", "'oscillation'"]),
        (["noise"], ["DATASET: expected the data set first"]),
        (["noise", "digitz"], ["DATASET: got 'digitz'", "'digits'"]),
        (["suggest-kappa", "digits", "--skips", "1"], ["--skips: got 1"]),
        (["kappa", "--preset", "digits-unet", "--depth", "4"], ["--depth: got 4, expected none"]),
        (["kappa", "--scalings", "cs"], ["--scalings: got 'cs'"]),
        (["oscillation", "--preset", "digits-uvit", "--block-depth", "2"], ["--block-depth: got 2, expected none"]),
        (["oscillation", "--preset", "matrix", "--depth", "3"], ["--depth: got 3, expected an even number"]),
        (["oscillation", "--warmup", "301"], ["--warmup: got 301"]),
        (["robustness", "--steps", "1"], ["--steps: got 1"]),
        (["robustness", "--workers", "0"], ["--workers: got 0"]),
        (["ablation", "--tables", "5"], ["--tables: got '5'", "Known: 2, 3, 4"]),
        (["ablation", "--figures", "4"], ["--figures: got '4'", "Known: 13, 6"]),
        (["bounds", "--widths", "0"], ["--widths: got 0"]),
        (["bounds", "--skips", "1"], ["--skips: got 1", ">= 2"]),
        (["bounds", "--dataset", "mnist"], ["--dataset: got 'mnist'"]),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(cli, assert_refused, tmp_path, monkeypatch, arguments, texts):
    monkeypatch.chdir(tmp_path)
    assert_refused(cli("analyze", *arguments), *texts)
    assert not list(tmp_path.iterdir())


def test_an_interruption_says_how_to_go_on(cli, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("scalelong_fast.analysis.analyze_noise", interrupted)
    result = cli("analyze", "noise", "digits", "--out", tmp_path)
    assert result.code == 130
    assert f"kept in {tmp_path / 'units'}: the same command goes on from there" in result.out


def test_a_folder_that_was_not_given_is_asked_for_by_its_own_option(cli, assert_refused, tmp_path):
    result = cli("analyze", "noise", "folder", "--out", tmp_path)
    assert_refused(result, "--path: got None, expected a folder of images. Give it with --path")


def test_a_run_that_is_none_or_not_of_ls_is_refused(cli, assert_refused, tiny, tmp_path):
    assert_refused(
        cli("analyze", "kappa", "--runs", tmp_path, "--out", tmp_path / "out"), "the folder of a training run"
    )
    assert cli("train", "digits-uvit", *tiny, "--model.scaling", "none", "--out", tmp_path / "run").code == 0
    result = cli("analyze", "kappa", "--runs", tmp_path / "run", "--out", tmp_path / "out")
    assert_refused(result, "runs whose scaling is ls or ls-individual")


def test_the_command_is_parsed_without_the_analyses():
    code = "import sys, scalelong_fast.cli.analyze as a; print([m for m in sys.modules if 'fast.analysis' in m])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
