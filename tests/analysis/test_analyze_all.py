"""``scalelong-fast analyze all``: everything that is registered, whatever happens to one of them."""

import dataclasses
import json

import pytest

from scalelong_fast.cli import analyze, main
from scalelong_fast.cli.analyses import dataset
from scalelong_fast.cli.analyses.options import Analysis, Common, DatasetOptions
from scalelong_fast.cli.analyses.together import AllArguments, run_all
from scalelong_fast.errors import UserError


@dataclasses.dataclass(frozen=True)
class Training(Common):
    """Options of an analysis that takes no data set."""


@pytest.fixture
def calls():
    return []


@pytest.fixture
def analyses(calls):
    def make(name, arguments, error=None):
        def tasks(own, *positional):
            calls.append((name, own.scale, own.out.name, *positional))
            if error is not None:
                raise error
            return [name]

        return Analysis(f"summary of {name}", arguments, tasks)

    return make


def run(name, tasks, out):
    assert tasks == [name]


def test_one_that_fails_does_not_end_the_others(tmp_path, analyses, calls, capsys):
    made = {
        "first": analyses("first", DatasetOptions),
        "refused": analyses("refused", Training, UserError("--kappa: got [7], expected less.")),
        "broken": analyses("broken", Training, ZeroDivisionError("by [0]")),
        "last": analyses("last", Training),
    }
    assert run_all(made, AllArguments("smoke", tmp_path / "out"), run) == 1
    assert calls == [
        ("first", "smoke", "out", "digits"),
        ("refused", "smoke", "out"),
        ("broken", "smoke", "out"),
        ("last", "smoke", "out"),
    ]
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip() and line.split()[0] in made}
    assert [rows[name].split()[2:3] for name in made] == [["done"], ["failed:"], ["failed:"], ["done"]]
    assert "--kappa: got [7]" in rows["refused"]
    assert "ZeroDivisionError: by [0]" in rows["broken"]
    assert "error: --kappa: got [7]" in err  # one paragraph
    assert "Traceback" in err  # a defect of ours


def test_all_done_is_success(tmp_path, analyses):
    assert run_all({"only": analyses("only", Training)}, AllArguments("smoke", tmp_path), run) == 0


def test_an_interruption_ends_it_and_says_what_is_done(tmp_path, analyses, calls, capsys):
    made = {
        "first": analyses("first", Training),
        "interrupted": analyses("interrupted", Training, KeyboardInterrupt()),
        "never": analyses("never", Training),
    }
    with pytest.raises(KeyboardInterrupt):
        run_all(made, AllArguments("smoke", tmp_path), run)
    assert [call[0] for call in calls] == ["first", "interrupted"]
    assert any(line.split()[:1] == ["first"] and "done" in line for line in capsys.readouterr().out.splitlines())


def test_the_command_runs_what_is_registered(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analyze, "ANALYSES", dataset.ANALYSES)
    assert main(["analyze", "all", "--scale", "smoke", "--out", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.glob("*.json")} == {"noise", "suggest-kappa"}
    assert json.loads((tmp_path / "noise.json").read_text())["settings"]["samples"] == 100
    assert capsys.readouterr().out.count("done") == 2


def test_a_folder_that_cannot_be_is_refused_before_anything_runs(tmp_path, analyses, calls):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--out: cannot write"):
        run_all({"only": analyses("only", Training)}, AllArguments("smoke", tmp_path / "file"), run)
    assert calls == []
