"""docs/reproduction.md: made of the committed findings, with commands that exist."""

import dataclasses
import importlib
import json
import re
import shlex
from datetime import datetime, timezone

import pytest

from benchmarks import findings, prose, reproduction
from benchmarks.environment import ROOT
from benchmarks.reproduction_items import (
    ITEMS,
    against_none,
    judge_ablation,
    judge_convergence,
    judge_kappa,
    judge_norms,
    judge_range,
)
from scalelong_fast.analysis.finding import json_ready
from scalelong_fast.analysis.kappa_range import KappaRange
from scalelong_fast.cli.analyses.dataset import KappaRangeArguments
from scalelong_fast.cli.analyses.options import DatasetOptions
from scalelong_fast.cli.analyses.together import AllArguments
from scalelong_fast.cli.analyze import ANALYSES
from scalelong_fast.cli.parse import parse
from scalelong_fast.errors import UserError
from scalelong_fast.evaluation.protocols import PROTOCOLS
from scalelong_fast.training import PRESETS
from scalelong_fast.version import __version__


@pytest.fixture(scope="module")
def page():
    return reproduction.PAGE.read_text(encoding="utf-8")


def commands(page):
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL))
    return [shlex.split(line, comments=True) for line in blocks.splitlines() if line.startswith("scalelong-fast")]


class TestPage:
    def test_it_is_what_the_findings_give(self):
        assert reproduction.main(["--check"]) == 0, "run: python -m benchmarks reproduction"

    def test_every_finding_and_the_overview_are_shown(self, page):
        assert re.findall(r"<!-- benchmark:([\w-]+) -->", page).count("overview") == 1
        assert set(re.findall(r"<!-- benchmark:([\w-]+) -->", page)) == {"overview", *findings.STUDIES}

    def test_figures_outside_what_is_generated_have_a_source(self, page):
        assert prose.unsourced("reproduction.md", page) == []

    def test_links_lead_somewhere(self, page):
        prose_only = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
        headings = {
            re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", prose_only, re.M)
        }
        for target in re.findall(r"\]\(([^)\s]+)\)", page):
            file, _, anchor = target.partition("#")
            assert not file or (ROOT / "docs" / file).is_file(), target
            assert file or anchor in headings, target

    def test_pictures_are_small(self):
        pictures = list(findings.PICTURES.glob("*.png"))
        assert {picture.stem for picture in pictures} == {path.stem for path in findings.FINDINGS.glob("*.json")}
        assert all(picture.stat().st_size <= findings.LARGEST_PICTURE for picture in pictures)

    def test_each_analysis_has_a_command_whose_options_are_taken(self, page):
        named = [words[2:] for words in commands(page) if words[1] == "analyze"]
        for name, *rest in named:
            if name == "all":
                parse(AllArguments, rest, name)
                continue
            positional = [rest.pop(0)] if issubclass(ANALYSES[name].arguments, DatasetOptions) else []
            assert ANALYSES[name].tasks(parse(ANALYSES[name].arguments, rest, name), *positional)
        assert {study.command.split()[2] for study in findings.STUDIES.values()} == set(ANALYSES)

    def test_table_1_has_a_preset_and_a_protocol_for_each_data_set(self, page):
        trained = {words[2] for words in commands(page) if words[1] == "train"}
        judged = {words[words.index("--protocol") + 1] for words in commands(page) if words[1] == "evaluate"}
        for data in ("cifar10", "celeba64", "imagenet64", "coco"):
            assert [name for name in trained if name.startswith(data)]
            assert [name for name in judged if name.startswith(data)]
        assert trained <= set(PRESETS)
        assert judged <= set(PROTOCOLS)


def test_every_item_is_measured_by_a_study_or_says_why_not():
    for item in ITEMS:
        assert (item.finding in findings.STUDIES and item.judge) or (item.finding is None and item.otherwise), item


def bands(**middles):
    return {s: {"mean": m, "low": m - 0.1, "high": m + 0.1, "count": 3} for s, m in middles.items()}


@pytest.mark.parametrize(
    ("cs", "ls", "word"),
    [
        (0.5, 0.6, "agrees"),
        (0.9, 1.1, "not shown"),
        (0.5, 1.1, "in part"),
        (0.5, 1.5, "in part"),
        (1.5, 1.1, "does not agree"),
    ],
)
def test_bands_decide(cs, ls, word):
    assert against_none({"index": bands(none=1.0, cs=cs, ls=ls)}).word == word


def test_every_series_has_a_say():
    less, more = bands(none=1.0, cs=0.5, ls=0.5), bands(none=1.0, cs=1.5, ls=1.5)
    assert against_none({"one": less, "other": less}).word == "agrees"
    assert against_none({"one": less, "other": more}).word == "in part"


def test_differences_at_equal_seeds_decide_where_they_are_given():
    far = {"rise": bands(none=1.0, cs=0.5, ls=0.5)}
    verdict = against_none(far, {"rise": bands(cs=-0.05, ls=0.05)})
    assert verdict.word == "not shown"
    assert verdict.why.endswith("95 % bands of the differences at equal seeds hold 0")
    near = {"rise": bands(none=1.0, cs=0.9, ls=0.95)}
    assert against_none(near, {"rise": bands(cs=-0.2, ls=-0.2)}).word == "agrees"
    assert against_none(near, {"rise": bands(cs=0.2, ls=-0.2)}).word == "in part"


def kappas(moved, base, distance):
    """Data of a finding on κ, of networks that training moved by ``moved``; None: of finished runs."""
    band = {"low": 0.0, "high": 1.0, "count": 3}
    movement = moved and {"steps": 600, "start": {"mean": 0.49, **band}, "moved": [{"mean": m, **band} for m in moved]}
    closest = {"kappa": base, "distance": distance}
    return {"bands": [{"mean": 0.51, **band}, {"mean": 0.55, **band}], "closest_cs": closest, "movement": movement}


def test_kappa_that_hardly_moved_is_the_initialisations():
    verdict = judge_kappa(kappas([0.02, 0.06], 0.8, 0.25))
    assert verdict.word == "hardly moved from the start"
    assert verdict.why.startswith("κ began at 0.49 and hardly moved, by +0.02 to +0.06 in 600 steps: κ_i of LS lie")
    assert judge_kappa(kappas([0.02, -0.3], 0.8, 0.25)).word == "not near a curve of CS"
    assert judge_kappa(kappas([0.5, 0.3], 0.8, 0.05)).word == "near a curve of CS"
    runs = judge_kappa(kappas(None, 0.8, 0.05))
    assert (runs.word, runs.why[:12]) == ("near a curve of CS", "κ_i of LS li")


def level(measure, value, cs, ls, relative=True):
    """A level of convergence; None: not reached with every seed."""
    factors = {s: m and {"mean": m, "low": m - 0.1, "high": m + 0.1, "count": 3} for s, m in (("cs", cs), ("ls", ls))}
    return {"measure": measure, "level": value, "relative_to_none": relative, "steps_over_own": factors}


@pytest.mark.parametrize(
    ("levels", "word"),
    [
        ([level("loss", 1.1, 1.5, 1.3), level("distance", 1.1, 1.5, 1.2)], "agrees"),
        ([level("loss", 1.1, 1.5, 1.3), level("loss", 1.0, 1.0, 1.05)], "not shown"),  # the lowest counts
        ([level("loss", 1.1, 1.5, 1.3), level("loss", 1.0, None, 1.05)], "in part"),  # a stricter one was missed
        ([level("loss", 1.1, 1.0, 1.05), level("loss", 1.0, None, 1.05)], "not shown"),
        ([level("loss", 1.1, 1.5, 1.3), level("distance", 1.1, None, 1.2)], "in part"),
        ([level("loss", 1.1, 1.0, 0.8)], "does not agree"),
        ([level("loss", 1.1, None, None)], "not shown"),
    ],
)
def test_convergence_is_judged_by_the_lowest_level_that_was_reached(levels, word):
    assert judge_convergence({"levels": levels}).word == word


def test_convergence_names_the_level_and_those_that_were_missed():
    levels = [level("loss", 1.1, 1.5, 1.3), level("loss", 1.0, None, 1.5), level("distance", 7.5, 1.5, 1.3, False)]
    why = judge_convergence({"levels": levels}).why
    assert "to a loss of 1.1 times what none has at the end (1 times what none has at the end: not with every" in why
    assert "; to a distance of 7.5: cs 1.50 (1.40 to 1.60), ls 1.30 (1.20 to 1.40);" in why


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.6, 0.9, "agrees"), (0.3, 0.6, "in part"), (0.1, 0.4, "does not agree")]
)
def test_a_range_of_kappa_is_compared_with_the_papers(low, high, word):
    found = KappaRange(6, 1.1, 1.5, low, high)
    assert judge_range(json_ready(found.as_dict())).word == word


def test_norms_are_explained_where_the_sum_does():
    rows = [{"init": init, "norm_r2": r2} for init, r2 in (("norm-keeping", 0.99), ("paper", 0.99), ("paper", 0.6))]
    assert judge_norms({"explained": rows}).word == "in part"
    assert judge_norms({"explained": rows[:2]}).word == "agrees"


def test_ablations_say_what_differs():
    verdicts = {"r = 8": "lower", "r = 16": "not shown"}
    row = {"against": "r = 4", "paper": None, "outcomes": [{"loss": 1.0, "distance": 2.0}]}
    rows = [{**row, "label": "r = 4", "against": None, "differences": {}}]
    rows += [
        {**row, "label": label, "differences": {"distance": {"verdict": verdict}}}
        for label, verdict in verdicts.items()
    ]
    why = "Fréchet distance: lower with r = 8 (against r = 4); no difference shown in 1 of 2 comparisons"
    assert judge_ablation({"rows": rows}).why == why
    lost = {"label": "r = 2", "outcomes": [{"diverged": 9}], "differences": {"distance": {"verdict": "seeds lost"}}}
    why = (
        "Fréchet distance: lower with r = 8 (against r = 4); seeds lost with r = 2 (against r = 4); no difference "
        "shown in 1 of 3 comparisons; diverged: r = 2"
    )
    assert judge_ablation({"rows": [*rows, {**row, **lost}]}).why == why


def settings_of(name, scale="digits"):
    study = findings.STUDIES[name]
    module = importlib.import_module(f"scalelong_fast.analysis.{study.module}")
    return json_ready({**dataclasses.asdict(module.SCALES[scale]), **study.added})


@pytest.mark.parametrize("name", findings.STUDIES)
def test_the_scale_is_told_by_the_settings(name):
    for scale in ("smoke", "digits"):
        own = settings_of(name, scale)
        assert findings.Kept(name, "", own, {}, "", [], False).scale == scale
        assert findings.scale_of(name, own | {"added later": None}) == scale
        assert findings.scale_of(name, own | {next(iter(own)): "other"}) == "own settings"
        assert findings.scale_of(name, own | {"more": 12}) == "own settings"


def test_what_a_command_adds_to_its_scale_is_its_default():
    assert findings.STUDIES["suggest-kappa"].added == {"skips": KappaRangeArguments().skips}
    assert findings.scale_of("suggest-kappa", settings_of("suggest-kappa") | {"skips": 12}) == "own settings"


@pytest.mark.parametrize("name", findings.STUDIES)
def test_sources_exist(name):
    assert all((ROOT / source).is_file() for source in findings.STUDIES[name].sources)


def utc(seconds):
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kappa", "scaling/gates"),
        ("oscillation", "models/attention"),
        ("robustness", "training/optim"),
        ("convergence", "diffusion/solvers"),
        ("convergence", "training/ema"),
        ("ablation-table-2", "evaluation/moments"),
        ("ablation-table-3", "scaling/block_output"),
        ("oscillation-matrix", "scaling/learnable"),
        ("oscillation-matrix", "analysis/statistics"),
    ],
)
def test_what_decides_the_numbers_is_a_source(name, source):
    assert f"scalelong_fast/{source}.py" in findings.STUDIES[name].sources


class TestTaking:
    @pytest.fixture
    def written(self, tmp_path):
        """A finding and its picture as ``scalelong-fast analyze`` writes them."""
        folder = tmp_path / "runs"
        folder.mkdir()
        code = [(ROOT / source).stat().st_mtime for source in findings.STUDIES["oscillation"].sources]
        data = {
            "bands": {what: bands(none=1.0, cs=0.5, ls=0.5) for what in ("features", "gradients")},
            "size": {"features": bands(none=2, cs=1, ls=1)},
            "loss": bands(none=0.2, cs=0.3, ls=0.3),
            "records": [1],
        }
        content = {
            "sentence": "It shows.",
            "settings": settings_of("oscillation"),
            "version": __version__,
            "measured": utc(max(code) + 1),
            "data": data,
        }
        (folder / "oscillation.json").write_text(json.dumps(content))
        (folder / "oscillation.png").write_bytes((ROOT / "docs" / "images" / "digits.png").read_bytes())
        (folder / "mine.json").write_text("{}")
        return folder

    @pytest.fixture
    def files(self, tmp_path):
        page = tmp_path / "page.md"
        text = "".join(
            f"<!-- benchmark:{name} -->\n<!-- /benchmark:{name} -->\n" for name in ("overview", "oscillation")
        )
        page.write_text(f"Mine.\n{text}")
        return {"page": page, "findings": tmp_path / "findings", "pictures": tmp_path / "pictures"}

    def test_a_finding_is_taken_without_its_records_and_shown(self, written, files, capsys):
        assert reproduction.main(["--take", str(written)], **files) == 0
        out = capsys.readouterr().out
        assert "mine.json: the page shows no such finding" in out
        assert "oscillation.json: taken.\n" in out
        kept = json.loads((files["findings"] / "oscillation.json").read_text())
        assert (kept["left_out"], set(kept["data"])) == (["records"], {"bands", "loss", "size"})
        assert [path.name for path in files["pictures"].iterdir()] == ["oscillation.png"]
        text = files["page"].read_text()
        assert text.startswith("Mine.\n")
        assert "| features | 1 ± 0.1 | 0.5 ± 0.1 | 0.5 ± 0.1 |" in text
        assert "**agrees**: features: none 1, cs 0.5 (less), ls 0.5 (less); 3 seeds" in text
        assert "`scalelong-fast analyze oscillation`, `--scale digits`:" in text
        assert "stale" not in text
        assert reproduction.main(["--check"], page=files["page"], findings=files["findings"]) == 0
        assert (written / "oscillation.json").is_file()

    @pytest.mark.parametrize("change", [{"source_sha256": "0"}, {"version": "0.0.0"}, {"sources": ["gone.py"]}])
    def test_other_code_makes_it_stale(self, written, files, change):
        reproduction.main(["--take", str(written)], **files)
        path = files["findings"] / "oscillation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert reproduction.main(["--check"], page=files["page"], findings=files["findings"]) == 1
        assert reproduction.main([], **files) == 0
        assert "It shows. (stale)" in files["page"].read_text()

    def test_what_was_measured_before_a_change_is_stale_however_late_it_was_written(self, written, files, capsys):
        path = written / "oscillation.json"
        source = "scalelong_fast/training/optim.py"
        before = utc((ROOT / source).stat().st_mtime - 1)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"measured": before}))
        reproduction.main(["--take", str(written)], **files)
        assert re.search(rf"taken\. Stale: measured before the last change of .*{source}", capsys.readouterr().out)
        text = files["page"].read_text()
        assert "It shows. (stale)" in text
        assert "| oscillation index, mean ± 95 % |" in text

    @pytest.mark.parametrize(
        ("settings", "why"), [(settings_of("oscillation", "smoke"), "smoke"), ({"every": 5}, "own settings")]
    )
    def test_other_scales_are_left_where_they_are(self, written, files, capsys, settings, why):
        path = written / "oscillation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": settings}))
        with pytest.raises(UserError, match=r"holds no finding of .* --scale digits"):
            reproduction.main(["--take", str(written)], **files)
        assert not files["findings"].exists()
        (written / "noise.png").write_bytes((written / "oscillation.png").read_bytes())
        noise = json.loads(path.read_text()) | {"settings": settings_of("noise"), "data": {}}
        (written / "noise.json").write_text(json.dumps(noise))
        assert findings.take(written, files["findings"], files["pictures"])[-1] == (
            f"oscillation.json: {why}, and the page shows --scale digits alone; left where it is."
        )

    def test_one_that_does_not_say_when_it_was_measured_is_refused(self, written, files):
        path = written / "oscillation.json"
        content = json.loads(path.read_text())
        del content["measured"]
        path.write_text(json.dumps(content))
        with pytest.raises(
            UserError, match=r"KeyError: 'measured'\)\. Run scalelong-fast analyze oscillation .* again"
        ):
            reproduction.main(["--take", str(written)], **files)

    def test_what_is_no_finding_is_refused(self, written, files, tmp_path):
        empty = tmp_path / "empty"
        empty.mkdir()
        with pytest.raises(UserError, match=r"--take: .*empty holds no finding"):
            reproduction.main(["--take", str(empty)], **files)
        bounds = json.loads((written / "oscillation.json").read_text()) | {"settings": settings_of("bounds")}
        (written / "bounds.json").write_text(json.dumps(bounds))
        (written / "bounds.png").write_bytes((written / "oscillation.png").read_bytes())
        (written / "oscillation.png").unlink()
        with pytest.raises(UserError, match=r"not a finding with its picture .*scalelong-fast analyze oscillation"):
            reproduction.main(["--take", str(written)], **files)
        assert not files["findings"].exists()  # nor bounds, which comes before it
        files["findings"].mkdir()
        (files["findings"] / "noise.json").write_text("[]")
        with pytest.raises(UserError, match=r"noise\.json: not a finding that was taken"):
            reproduction.main([], **files)

    def test_a_marker_without_its_end_is_refused(self, files):
        files["page"].write_text("<!-- benchmark:noise -->\n<!-- benchmark:kappa -->\n<!-- /benchmark:kappa -->\n")
        with pytest.raises(UserError, match="<!-- benchmark:noise --> has no"):
            reproduction.main([], **files)

    def test_a_large_picture_gets_a_palette(self, written, files, monkeypatch):
        monkeypatch.setattr(findings, "LARGEST_PICTURE", 60_000)
        reproduction.main(["--take", str(written)], **files)
        assert (files["pictures"] / "oscillation.png").stat().st_size <= 60_000
