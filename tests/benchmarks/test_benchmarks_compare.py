"""One commit against another: made-up commits, whose clocks are made up too, so that no figure is left to chance."""

import json
import subprocess

import pytest
import torch

from benchmarks import compare, environment
from benchmarks.compare_child import Child, extract
from scalelong_fast.errors import UserError

#: A package whose network takes a fixed time on a clock of its own.
PACKAGE = """
import os, time, torch

seconds, presets = {seconds}, {presets}
now = 0.0
time.perf_counter = lambda: now


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        global now
        now += seconds
        print("anything that a network prints")
        return x * self.weight


def create_model(preset, scaling):
    if preset == "crash":
        os._exit(7)
    if preset not in presets:
        raise ValueError(f"no preset {{preset}}")
    return Net()
"""


def case(preset, kind="step"):
    return {"kind": kind, "preset": preset, "options": {"scaling": "ls"}, "shape": [2, 3]}


def git(root, *args):
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write(root, seconds, presets=("net",)):
    package = root / "scalelong_fast"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(PACKAGE.format(seconds=seconds, presets=presets))


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "-q")
    (root / "note.txt").write_text("no package yet\n")
    git(root, "add", ".")
    git(root, "commit", "-qm", "empty")
    write(root, seconds=1.0, presets=("net", "gone"))
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return root


def test_a_slower_working_tree_is_a_regression(repository, tmp_path, capsys):
    write(repository, seconds=2.0, presets=("net", "new"))
    out = tmp_path / "out" / "compare.json"
    before = git(repository, "status", "--porcelain"), git(repository, "worktree", "list")
    chosen = {
        "step net": case("net"),
        "forward net": case("net", "forward"),
        "step new": case("new"),
        "step gone": case("gone"),
    }
    args = ["HEAD", "--rounds", "5", "--device", "cpu", "--out", str(out)]
    assert compare.main(args, root=repository, chosen=chosen) == 1
    result = json.loads(out.read_text())
    records = {record["case"]: record for record in result["records"]}
    assert {name: record["verdict"] for name, record in records.items()} == {
        "step net": "slower",
        "forward net": "slower",
        "step new": "no comparison",
        "step gone": "fails",
    }
    slow = records["step net"]
    assert (slow["ratio"], slow["ratio_p20"], slow["ratio_p80"]) == (2.0, 2.0, 2.0)
    assert (slow["base_us"], slow["head_us"]) == (1e6, 2e6)
    assert (
        records["step new"]["note"]
        == records["step gone"]["note"].replace("gone", "new")
        == ("ValueError: no preset new")
    )
    assert result["base"] == git(repository, "rev-parse", "HEAD").strip()
    shown = capsys.readouterr().out
    assert "3 of 4 slower or failing, the worst first" in shown
    listed = shown[shown.index("the worst first") :]
    assert "│ slower" in listed
    assert "no difference" not in listed
    assert (git(repository, "status", "--porcelain"), git(repository, "worktree", "list")) == before


def test_a_process_that_dies_is_named_and_keeps_what_there_is(repository, capsys):
    write(repository, seconds=0.5)
    chosen = {"step net": case("net"), "forward net": case("net", "forward"), "step crash": case("crash")}
    args = ["HEAD", "--rounds", "5", "--device", "cpu", "--only", "step"]
    assert compare.main(args, root=repository, chosen=chosen) == 1
    shown = capsys.readouterr().out
    assert "the process of the base ended with code 7" in shown
    assert "faster" in shown
    assert "forward net" not in shown


def test_a_base_without_the_package_is_not_compared_with_an_installed_one(repository, capsys):
    assert compare.main(["HEAD~1", "--device", "cpu"], root=repository, chosen={"step net": case("net")}) == 1
    assert "the base cannot be imported: RuntimeError: there is no scalelong_fast in" in capsys.readouterr().out


def test_bad_input_is_refused(repository, tmp_path):
    chosen = {"step net": case("net")}
    for args, message in (
        (["nowhere"], "BASE: got 'nowhere', expected a commit"),
        (["--device=cpu", "HEAD", "--rounds", "4"], "--rounds"),
        (["HEAD", "--only", "stepp"], "Did you mean 'step'"),
        (["HEAD", "--match", "nothing"], "--match"),
        (["HEAD", "--tolerance", "-1"], "--tolerance"),
    ):
        with pytest.raises(UserError, match=message):
            compare.main(args, root=repository, chosen=chosen)
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="not a git repository"):
        compare.main(["HEAD"], root=tmp_path / "plain", chosen=chosen)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.5] * 5, "slower"),
        ([0.5] * 5, "faster"),
        ([1.0] * 5, "no difference"),
        ([1.01] * 5, "no difference"),
        ([0.9, 1.1, 1.3, 1.5, 1.7], "slower"),  # one round of five is no spread
        ([0.8, 0.9, 1.2, 1.5, 1.7], "no difference"),
        ([0.3, 0.5, 0.8, 1.1, 1.2], "no difference"),
    ],
)
def test_the_verdict_needs_more_than_the_spread(ratios, expected):
    assert compare.verdict(ratios, tolerance=0.02) == expected


class Recorded:
    """A side that keeps what it was asked, and answers at once."""

    def __init__(self, side, asked, **answers):
        self.side, self.asked, self.answers = side, asked, answers

    def ask(self, do, **request):
        self.asked.append((self.side, do))
        return {"value": 1.0, "seconds": 1.0, **self.answers}


def test_visits_alternate_and_neither_side_is_always_first():
    asked = []
    base, head = Recorded("base", asked), Recorded("head", asked)
    compare.compare_case("step net", {}, base, head, rounds=4, tolerance=0.0)
    visits = [side for side, do in asked if do == "visit"]
    assert visits == ["base", "head", "head", "base", "base", "head", "head", "base"]
    assert asked[-2:] == [("base", "drop"), ("head", "drop")]


def test_another_value_is_said():
    asked = []
    sides = Recorded("base", asked, value=1.0), Recorded("head", asked, value=1.5)
    record = compare.compare_case("step net", {}, *sides, rounds=1, tolerance=0.0)
    assert record["note"] == "computes 1.5, the base 1"
    assert record["verdict"] == "no difference"


def test_a_commit_is_taken_out_as_it_was(repository, tmp_path):
    write(repository, seconds=9.0)
    (repository / "new.txt").write_text("not in the commit")
    tree = extract(repository, "HEAD", tmp_path / "tree")
    assert sorted(path.name for path in tree.iterdir()) == ["note.txt", "scalelong_fast"]
    assert "seconds, presets = 1.0" in (tree / "scalelong_fast" / "__init__.py").read_text()


def test_this_repository_can_be_asked_for_every_kind(tmp_path):
    cases = compare.all_cases(torch.device("cpu"))
    assert {name.split()[0] for name in cases} == set(compare.KINDS)
    with Child("now", environment.ROOT, "cpu", tmp_path / "worker") as child:
        assert child.ask("hello", root=str(environment.ROOT)) == {}
        for name, request in cases.items():
            if name.split()[0] == "ops" and "16 × 16" not in name and "se_gate" not in name:
                continue  # the large ones take long here
            if request["kind"] != "op":
                request = {**request, "shape": [1, 3, 32, 32]}
            answer = child.ask("build", name=name, case=request)
            assert "error" not in answer, (name, answer)
            assert answer["value"] > 0
            assert child.ask("visit", name=name, steps=1)["seconds"] > 0
            child.ask("drop", name=name)
        assert "KeyError" in child.ask("visit", name=name, steps=1)["error"]
