"""The ablation: which networks a table has, what is said of them, and one table on tiny networks."""

import dataclasses
import json
import math

import pytest
import torch

from scalelong_fast.analysis import AblationSettings, Training, Units, analyze_ablation, write_finding
from scalelong_fast.analysis.ablation import SCALES, WIDTHS, describe_recipe, measure_variant
from scalelong_fast.analysis.ablation_report import compare, describe, draw, to_markdown
from scalelong_fast.analysis.ablation_tables import FIGURES, TABLES, Row, Table, Variants
from scalelong_fast.analysis.paper import REPORTED, Reported
from scalelong_fast.errors import UserError
from scalelong_fast.evaluation.extractors import create_extractor

DIGITS = SCALES["digits"]
EVERY = {**{f"table {n}": make for n, make in TABLES.items()}, **{f"figure {n}": make for n, make in FIGURES.items()}}


def rows(make, settings=DIGITS):
    return {row.label: row for row in make(settings.training, settings.variants).rows}


@pytest.mark.parametrize("name", EVERY)
def test_rows_have_a_label_each_a_run_that_is_valid_and_something_to_compare_with(name):
    table = EVERY[name](DIGITS.training, DIGITS.variants)
    labels = [row.label for row in table.rows]
    assert len(set(labels)) == len(labels)
    assert all(row.against is None or row.against in labels for row in table.rows)
    assert any(row.against is not None for row in table.rows)
    for row in table.rows:
        assert DIGITS.config(row, 1).train.seed == 1


def test_the_networks_of_the_paper():
    models = {label: DIGITS.config(row, 0).model for label, row in rows(TABLES[2]).items()}
    assert [models[f"reduction, r = {r}"].reduction for r in (4, 8, 16)] == [4, 8, 16]
    assert models["activation, mish"].activation == "mish"
    assert models["module, IE"].calibration == "ie"
    assert models["gate, individual"].scaling == "ls-individual"
    assert models["gate, shared"] == models["reduction, r = 4"]
    models = {label: DIGITS.config(row, 0).model for label, row in rows(TABLES[3]).items()}
    assert (models["stable-tau, τ = 0.3"].block_scaling, models["stable-tau, τ = 0.3"].block_tau) == ("stable-tau", 0.3)
    assert (models["rezero"].block_scaling, models["rezero"].scaling) == ("rezero", "none")
    assert (models["cs"].scaling, models["cs"].kappa) == ("cs", 0.7)
    models = {label: DIGITS.config(row, 0).model for label, row in rows(TABLES[4]).items()}
    assert (models["cs-reversed, κ = 0.9"].scaling, models["cs-reversed, κ = 0.9"].kappa) == ("cs-reversed", 0.9)
    figure = {label: DIGITS.config(row, 0) for label, row in rows(FIGURES[6]).items()}
    assert [figure[f"ls, batch {size}"].train.batch_size for size in (8, 16, 32)] == [8, 16, 32]
    assert [figure[f"none, depth {depth}"].model.depth for depth in (4, 12, 20)] == [4, 12, 20]
    models = {label: DIGITS.config(row, 0).model for label, row in rows(FIGURES[13]).items()}
    assert models["cs, κ = 1.3"].kappa == 1.3
    assert models["cs, κ = 1"].scaling == "none"  # the same network, which other tables have too


def test_a_unet_has_no_depth_to_vary():
    settings = AblationSettings(Training(preset="digits-unet", depth=None))
    assert {row.point for row in rows(FIGURES[6], settings).values()} == {"batch 2", "batch 4", "batch 8"}
    assert rows(TABLES[3], settings)
    for make in EVERY.values():
        assert [settings.config(row, 0) for row in rows(make, settings).values()]


TABLE = Table(
    "example",
    "ScaleLong Table 0",
    "an example",
    (Row("none", "", {"scaling": "none"}), *(Row(name, "", {"scaling": name}, 8, "none") for name in ("cs", "ls"))),
)


def outcomes(*losses):
    return [{"loss": loss, "distance": 10 * loss} for loss in losses]


class TestReport:
    def test_differences_are_those_at_equal_seeds(self):
        found = compare(TABLE, {"none": outcomes(1, 2, 3), "cs": outcomes(0.9, 1.91, 2.89), "ls": outcomes(1.1, 1, 4)})
        assert [row["differences"].get("loss", {}).get("verdict") for row in found] == [None, "lower", "not shown"]
        assert found[1]["differences"]["loss"]["mean"] == pytest.approx(-0.1)
        assert found[0]["loss"]["mean"] == pytest.approx(2)
        sentence = describe(TABLE, found, "tiny")
        assert "loss lowest with cs (1.9)" in sentence
        assert "Loss: lower with cs (against none); no difference shown in 1 of 2 comparisons." in sentence
        assert "(ScaleLong Table 0)" in sentence
        markdown = to_markdown(TABLE, found, "tiny")
        assert "| cs | — | 1.9 ± 2.5 | 19 ± 25 | none | lower | lower | scaling cs, batch 8 |" in markdown
        assert "—: the paper's number is not known here" in markdown

    def test_a_seed_shows_no_difference(self):
        found = compare(TABLE, {"none": outcomes(1), "cs": outcomes(0.5), "ls": outcomes(2)})
        assert [row["differences"]["loss"]["verdict"] for row in found[1:]] == ["not shown", "not shown"]
        assert "| none | — | 1 | 10 |" in to_markdown(TABLE, found, "tiny")

    def test_what_diverged_or_failed_is_said_in_its_place(self):
        own = {
            "none": outcomes(1, 2),
            "cs": [{"diverged": 40}, {"diverged": 60}],
            "ls": [*outcomes(1), {"failed": "ls: its process was ended by SIGKILL."}],
        }
        found = compare(TABLE, own)
        assert found[1]["loss"] is None
        assert found[1]["differences"] == {measure: {"verdict": "seeds lost"} for measure in ("loss", "distance")}
        assert found[2]["differences"]["loss"] == {"mean": 0, "low": 0, "high": 0, "count": 1, "verdict": "seeds lost"}
        markdown, sentence = to_markdown(TABLE, found, "tiny"), describe(TABLE, found, "tiny")
        assert "| cs | — | diverged, seen at step 40, 60 (2 of 2 seeds) | diverged, seen at" in markdown
        assert "none | seeds lost | seeds lost |" in markdown
        assert "| ls | — | 1; ls: its process was ended by SIGKILL. |" in markdown
        assert "Diverged: cs. Networks missing: 1; the same command tries them again." in sentence
        assert json.dumps(found)

    @pytest.mark.parametrize("lost", [{"diverged": 7}, {"failed": "its process was ended by SIGKILL."}])
    def test_the_seeds_that_are_left_show_nothing(self, lost):
        own = {"none": outcomes(3, 2, 2.9), "cs": [lost, *outcomes(1, 1.9)], "ls": outcomes(2.9, 1.91, 2.79)}
        found = compare(TABLE, own)
        assert [row["differences"]["loss"]["verdict"] for row in found[1:]] == ["seeds lost", "lower"]
        assert found[1]["differences"]["loss"]["count"] == 2
        sentence = describe(TABLE, found, "tiny")
        assert "loss lowest with ls (2.533) of the 2 rows that lost no seed" in sentence
        assert "Loss: lower with ls (against none); seeds lost with cs (against none)." in sentence
        own["none"] = [*outcomes(3, 2), lost]
        found = compare(TABLE, own)
        assert [row["differences"]["loss"]["verdict"] for row in found[1:]] == ["seeds lost", "seeds lost"]
        none_left = compare(TABLE, {name: [lost, *outcomes(1)] for name in own})
        assert "no row came through with every seed" in describe(TABLE, none_left, "tiny")

    def test_a_row_that_lost_seeds_is_hollow_in_the_figure(self):
        figure_module = pytest.importorskip("matplotlib.figure")
        own = {"none": outcomes(1, 2), "cs": [{"diverged": 4}, *outcomes(1)], "ls": [{"diverged": 4}, {"failed": "x"}]}

        def drawn(outcomes_of):
            figure = figure_module.Figure()
            draw(figure, TABLE, compare(TABLE, outcomes_of))
            white = [line for axes in figure.axes for line in axes.lines if line.get_color() == "white"]
            return len(white), figure.get_suptitle()

        assert drawn(own) == (2, "an example (ScaleLong Table 0); hollow: seeds lost")
        count, title = drawn(dict.fromkeys(own, outcomes(1, 2)))
        assert count == 0
        assert "hollow" not in title

    def test_a_number_of_the_paper_stands_beside_ours_with_its_source(self, monkeypatch):
        monkeypatch.setitem(REPORTED, ("ScaleLong Table 0", "cs"), Reported("1.23", "FID of CIFAR10", "its page 7"))
        found = compare(TABLE, dict.fromkeys(("none", "cs", "ls"), outcomes(1, 2)))
        markdown = to_markdown(TABLE, found, "tiny")
        assert "| cs | 1.23 |" in markdown
        assert "The paper: FID of CIFAR10; its page 7." in markdown


@pytest.fixture
def tiny(tiny_training):
    return AblationSettings(tiny_training(), Variants(depths=(2,)), probe=8, samples=8, solver_steps=2)


def test_tables_share_what_they_have_in_common(tiny, tmp_path):
    def made(*names):
        return lambda training, variants: dataclasses.replace(
            TABLE, rows=tuple(row for row in TABLE.rows if row.label in names)
        )

    units, seen = Units(tmp_path / "units"), []
    first = analyze_ablation(made("none", "cs"), tiny, units, workers=1)
    assert len(list(units.folder.iterdir())) == 4
    again = analyze_ablation(made("none", "cs"), tiny, units, lambda *now: seen.append(now))
    assert seen == []
    assert again.data == json.loads(json.dumps(first.data))
    assert again.markdown == first.markdown
    analyze_ablation(made("cs", "ls"), tiny, units, lambda *now: seen.append(now), workers=1)
    assert seen == [(2, 4, "ls, seed 0"), (3, 4, "ls, seed 1")]
    for row in first.data["rows"]:
        assert 0 < row["loss"]["mean"] < 10
        assert row["distance"]["mean"] > 0
    paths = write_finding(first, tmp_path)
    assert [path.name for path in paths] == ["example.json", "example.png", "example.svg", "example.md"]
    assert paths[3].read_text() == first.markdown


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, False),  # 64 features of digits
        ({"samples": 63}, True),
        ({"samples": 63, "extractor": "none"}, False),
        ({"extractor": "inception"}, True),
        ({"extractor": "inception", "samples": 2048}, False),
        ({"training": Training(preset="cifar10-uvit")}, True),
        ({"extractor": "mine:network"}, False),  # how many it has is not known before it is run
    ],
)
def test_a_recipe_says_where_samples_are_fewer_than_features(changes, warned):
    settings = dataclasses.replace(AblationSettings(), **changes)
    assert ("(fewer than features: compare distances within this table only)" in describe_recipe(settings)) is warned


def test_widths_are_those_of_the_extractors():
    assert WIDTHS["digits"] == create_extractor("digits")(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape[1]


def test_the_loss_alone(tiny):
    found = measure_variant(dataclasses.replace(tiny, extractor="none"), TABLE.rows[0], 0)
    assert list(found) == ["loss"]
    compared = compare(TABLE, {row.label: [found] for row in TABLE.rows})
    assert compared[0]["distance"] is None
    assert "loss lowest with none" in describe(TABLE, compared, "tiny")
    assert "Fréchet" not in describe(TABLE, compared, "tiny")


def test_what_no_network_can_do_is_an_error(tiny):
    with pytest.raises(UserError, match="--extractor: got 'inceptoin'"):
        analyze_ablation(TABLES[4], dataclasses.replace(tiny, extractor="inceptoin"), workers=1)


def test_a_training_that_breaks_gives_the_step(tiny, monkeypatch):
    monkeypatch.setattr("scalelong_fast.training.step.learning_rate", lambda step, train: math.nan)
    assert measure_variant(tiny, TABLE.rows[0], 0) == {"diverged": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, "--samples: got 1"),
        ({"probe": 0}, "--probe: got 0"),
        ({"solver_steps": 0}, "--solver-steps: got 0"),
        ({"ema_decay": 1.0}, "--ema-decay: got 1.0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(DIGITS, **changes)
