"""``python -m benchmarks cpu``: parts in processes of their own, within a budget."""

import sys
import time

import pytest

from benchmarks import cpu
from benchmarks.__main__ import COMMANDS, main
from benchmarks.cpu import Part

WRITES = "import sys, pathlib; path = pathlib.Path(sys.argv[1]); path.parent.mkdir(parents=True, exist_ok=True); "
WRITES += "path.write_text(sys.argv[2])"
SCRIPTS = {"good": WRITES, "bad": "raise SystemExit(1)", "slow": "import time; time.sleep(60)", "later": WRITES}


@pytest.fixture
def told(monkeypatch):
    """Scripts that end at once stand for the parts; what each was told."""
    seconds = {}

    def command_of(name, part, budget, path):
        seconds[name] = budget
        return [sys.executable, "-S", "-c", SCRIPTS[name], str(path), f"{budget:.0f}"]

    monkeypatch.setattr(cpu, "PARTS", {"good": Part(1.0), "bad": Part(2.0), "slow": Part(1.0), "later": Part(1.0)})
    monkeypatch.setattr(cpu, "command_of", command_of)
    monkeypatch.setattr(cpu, "_GRACE_SECONDS", 0.5)
    ran = cpu.run_process
    monkeypatch.setattr(cpu, "run_process", lambda command, limit: 0 if "report" in command else ran(command, limit))
    return seconds


def test_a_part_that_fails_does_not_stop_the_others(told, tmp_path, capsys):
    args = ["--out", str(tmp_path / "out"), "--part", "good", "--part", "bad", "--part", "later"]
    assert cpu.main(args) == 1
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("[")] == ["good:", "bad:", "later:"]
    rows = {line.split()[1]: line for line in out.splitlines() if "│" in line}
    assert "failed" in rows["bad"]
    assert all("done" in rows[name] for name in ("good", "later", "report"))
    assert "error: bad: see above" in out
    assert (next((tmp_path / "out").glob("cpu-*/good.json"))).read_text() == f"{told['good']:.0f}"
    assert cpu.main(args[:4]) == 0


def test_an_older_file_is_not_shown_as_the_result_of_a_part(told, tmp_path, monkeypatch):
    path = tmp_path / cpu.environment.machine_name(cpu.torch.device("cpu")) / "bad.json"
    path.parent.mkdir()
    path.write_text("old")
    good, bad = cpu.run_parts(["good", "bad"], tmp_path, 60.0, cpu.Screen())
    assert bad.path is None
    assert good.path == path.with_name("good.json")
    assert cpu.run_parts(["good"], tmp_path, 60.0, cpu.Screen())[0].path == good.path, "written anew"


def test_that_no_part_had_time_is_a_failure(told, tmp_path, capsys):
    assert cpu.main(["--out", str(tmp_path), "--minutes", "0.1", "--part", "good", "--part", "later"]) == 1
    out = capsys.readouterr().out
    assert "no part had time" in out
    assert not list(tmp_path.rglob("good.json"))


def test_shares_follow_the_weights_and_what_is_spared_goes_to_the_others(told, tmp_path):
    args = ["--out", str(tmp_path), "--minutes", "2", "--part", "good", "--part", "bad", "--part", "later"]
    cpu.main(args)
    total = cpu._TOLD * (120 - cpu._REPORT_SECONDS)
    assert told["good"] == pytest.approx(total / 4, rel=0.01)
    assert total / 2 < told["bad"] < total * 2 / 3
    assert told["later"] > total / 2, "the others took no time"


def test_a_part_that_does_not_end_is_stopped_and_the_rest_is_not_begun(told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "_LEAST_SECONDS", 0.3)
    begun = time.perf_counter()
    screen = cpu.Screen()
    outcomes = cpu.run_parts(["slow", "later"], tmp_path, 1.0, screen)
    assert [one.verdict for one in outcomes] == [cpu.STOPPED, cpu.NO_TIME]
    assert time.perf_counter() - begun < 50
    assert cpu.shown(outcomes[0].path) == "–"


def test_every_part_is_a_command_that_takes_what_it_is_told(capsys, tmp_path):
    for name, part in cpu.PARTS.items():
        assert name in COMMANDS
        with pytest.raises(SystemExit):
            main([name, "--help"])
        usage = capsys.readouterr().out
        command = cpu.command_of(name, part, 12.3, tmp_path / "x.json")
        assert all(option in usage for option in command if option.startswith("--")), name
        assert ("--seconds" in command) is part.bounded


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--minutes", "0"], "--minutes"), (["--part", "opps"], "Did you mean 'ops'"), (["--out", __file__], "--out")],
)
def test_bad_values_are_refused(args, message, capsys):
    assert main(["cpu", *args]) == 2
    assert message in capsys.readouterr().err
