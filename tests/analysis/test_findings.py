"""What an analysis writes, and what it keeps to go on from."""

import json
import math
import os
from datetime import datetime

import pytest

from scalelong_fast.analysis import Finding, Units, write_finding
from scalelong_fast.analysis.finding import open_folder
from scalelong_fast.analysis.units import BEGUN, MISSING
from scalelong_fast.cli.analyze import run_tasks
from scalelong_fast.errors import UserError


def finding(**data):
    def draw(figure):
        figure.add_subplot().plot([0, 1], [1, 2], label="κ")

    return Finding("example", "Fig. 0", "It shows.", {"seeds": (0, 1)}, data, draw)


def test_json_png_and_svg(tmp_path):
    paths = write_finding(finding(value=1.5, nothing=math.nan, endless=[math.inf]), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["example.json", "example.png", "example.svg"]
    content = json.loads(paths[0].read_text())
    assert content["data"] == {"value": 1.5, "nothing": None, "endless": [None]}
    assert (content["sentence"], content["reference"], content["settings"]) == (
        "It shows.",
        "Fig. 0",
        {"seeds": [0, 1]},
    )
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in paths[2].read_bytes()


def test_equal_findings_give_equal_bytes(tmp_path):
    first = [path.read_bytes() for path in write_finding(finding(), tmp_path / "a")]
    assert [path.read_bytes() for path in write_finding(finding(), tmp_path / "b")] == first


def test_json_says_when_it_was_measured(tmp_path):
    (path, *_) = write_finding(finding(), tmp_path, measured=90.75)
    assert json.loads(path.read_text())["measured"] == "1970-01-01T00:01:30+00:00"  # a part of a second is not later
    write_finding(finding(), tmp_path)
    assert "measured" not in json.loads(path.read_text())


class TestTasks:
    """What ``scalelong-fast analyze`` makes of the measurements of one analysis."""

    def test_measured_is_when_the_oldest_result_was_computed(self, tmp_path):
        old, new = {"seed": 0}, {"seed": 1}
        for key, seconds in ((old, 1000), (new, 2000), ({"seed": 2}, 500)):  # the last one is not used
            before = set(tmp_path.glob("units/*"))
            Units(tmp_path / "units").keep(key, 7)
            (path,) = set(tmp_path.glob("units/*")) - before
            os.utime(path, (seconds, seconds))

        def task(units, progress):
            assert [units.find(new), units.get(old, None), units.find({"seed": 3})] == [7, 7, MISSING]
            return finding()

        run_tasks("example", [task], tmp_path)
        assert json.loads((tmp_path / "example.json").read_text())["measured"] == "1970-01-01T00:16:40+00:00"

    def test_what_this_process_computes_is_as_old_as_its_code(self, tmp_path):
        def task(units, progress):
            units.get({"seed": 0}, lambda: 7)
            return finding()

        for _ in range(2):  # computed, then kept
            run_tasks("example", [task], tmp_path)
            measured = datetime.fromisoformat(json.loads((tmp_path / "example.json").read_text())["measured"])
            assert measured.timestamp() == int(BEGUN)

    def test_one_that_fails_does_not_skip_the_next(self, tmp_path, capsys):
        def fails(units, progress):
            raise UserError("It diverged.")

        with pytest.raises(UserError, match=r"\AIt diverged\.\Z"):
            run_tasks("example", [fails, fails, lambda units, progress: finding()], tmp_path)
        assert (tmp_path / "example.json").is_file()
        out = capsys.readouterr().out
        assert out.index("It diverged. The next one begins.") < out.index("It shows.")


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--out: cannot write to .*file"):
        open_folder(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


class TestUnits:
    @pytest.fixture
    def calls(self):
        return []

    @pytest.fixture
    def compute(self, calls):
        return lambda: calls.append(1) or {"value": len(calls)}

    def test_computed_once_per_key(self, tmp_path, calls, compute):
        key = {"scaling": "cs", "levels": (0.1, 0.2)}
        assert Units(tmp_path).get(key, compute) == {"value": 1}
        assert Units(tmp_path).get(dict(key), compute) == {"value": 1}
        assert Units(tmp_path).get({**key, "scaling": "ls"}, compute) == {"value": 2}
        assert len(calls) == 2

    def test_without_a_folder_nothing_is_kept(self, calls, compute):
        units = Units()
        assert [units.get({"a": 1}, compute)["value"] for _ in range(2)] == [1, 2]

    @pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": {}, "value": 7}'])
    def test_a_damaged_file_is_computed_anew(self, tmp_path, compute, damage):
        units = Units(tmp_path)
        units.get({"a": 1}, compute)
        (path,) = tmp_path.iterdir()
        path.write_text(damage)
        assert units.get({"a": 1}, compute) == {"value": 2}
        assert units.get({"a": 1}, compute) == {"value": 2}

    def test_what_was_interrupted_is_not_kept(self, tmp_path, compute):
        def interrupted():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Units(tmp_path / "units").get({"a": 1}, interrupted)
        assert Units(tmp_path / "units").get({"a": 1}, compute) == {"value": 1}
