"""How soon networks learn: curves, levels, times of a step, and the analysis of them."""

import copy
import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from scalelong_fast.analysis import ConvergenceSettings, Training, Units, analyze_convergence, step_time
from scalelong_fast.analysis import convergence as convergence_module
from scalelong_fast.analysis.convergence_levels import Level, compare_levels, verdict
from scalelong_fast.analysis.learning_curve import draw_probe, learning_curve, probe_loss, steps_to
from scalelong_fast.analysis.sample_distance import SampleDistance
from scalelong_fast.analysis.training import train_watched
from scalelong_fast.errors import UserError
from scalelong_fast.models import build_model


def with_decay(config, decay):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, ema_decay=decay))


def test_a_level_is_reached_where_straight_lines_between_recordings_meet_it():
    steps, values = [0, 10, 20, 30], [8.0, 4.0, 5.0, 1.0]
    assert steps_to(6.0, steps, values) == 5
    assert steps_to(4.0, steps, values) == 10
    assert steps_to(3.0, steps, values) == 25
    assert steps_to(9.0, steps, values) == 0
    assert steps_to(0.5, steps, values) is None


def test_curve_is_of_the_averaged_weights_on_a_probe_that_all_share(tiny_training):
    config = with_decay(tiny_training().config("ls", 3), 0.5)
    averages = []

    def keep(watched):
        averages.append(watched.average.copy_to(build_model(config.model)).eval())
        schedules.append(watched.schedule)

    schedules = []
    train_watched(config, keep, every=2)
    curve = learning_curve(config, every=2, probe_size=16)
    assert curve["steps"] == [0, 2, 4]
    assert curve["sampled"] == curve["distances"] == []
    probe = draw_probe(tiny_training(batch_size=2).config("none", 0), 16)
    expected = [probe_loss(model, schedules[0], probe) for model in averages]
    assert curve["losses"] == expected
    assert len(set(expected)) == 3


def test_looks_change_nothing_and_the_last_step_is_always_looked_at(tiny_training):
    config, looked = tiny_training().config("cs", 0), []
    often = learning_curve(config, 1, 8, 2, lambda model: looked.append(copy.deepcopy(model)) or 1.0)
    rarely = learning_curve(config, 3, 8, 3, lambda model: 2.0)
    assert often["sampled"] == [2, 4]
    assert rarely["steps"] == [0, 3, 4]
    assert rarely["sampled"] == [3, 4]
    assert [often["losses"][step] for step in (0, 3, 4)] == rarely["losses"]
    assert not any(model.training for model in looked)


def test_distance_is_of_equal_seeds_and_of_what_the_network_draws(tiny_training):
    config = tiny_training().config("none", 0)
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    measure = SampleDistance(config, samples=40, steps=2)
    first = measure(model)
    assert measure(model) == first
    assert SampleDistance(config, samples=20, steps=2)(model) != first
    with torch.no_grad():
        model.final_layer.bias.fill_(50.0)
    assert measure(model) != first
    assert 0 < first < math.inf


def test_distance_refuses_what_it_cannot_draw(tiny_training):
    config = tiny_training().config("none", 0)
    latents = dataclasses.replace(config, model=dataclasses.replace(config.model, in_chans=4))
    with pytest.raises(UserError, match="--extractor: got 'auto', expected none for latents"):
        SampleDistance(latents, 10, 2)


def test_steps_are_timed_in_turns(monkeypatch):
    taken, clock = [], itertools.count()

    def set_up(config):
        step = SimpleNamespace(execution=SimpleNamespace(device=torch.device("cpu")))

        class Step:
            execution = step.execution

            def __call__(self, number, draw):
                assert number == draw
                taken.append((config, number))

        class Source:
            def __call__(self, number):
                return number

            def close(self):
                taken.append((config, "closed"))

        return SimpleNamespace(step=Step(), source=Source())

    monkeypatch.setattr(step_time, "set_up", set_up)
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: next(clock))
    found = step_time.step_seconds({"a": "A", "b": "B"}, rounds=3, steps=2)
    assert found == {"a": [0.5] * 3, "b": [0.5] * 3}
    order = [config for config, _ in taken]
    assert order == [*"AABB", *"AAABBB", *"BBBAAA", *"AAABBB", *"AB"]
    assert [number for config, number in taken if config == "A"] == [*range(11), "closed"]
    assert step_time.ratio_spread([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])[1] == 2


def line(steps_to_zero):
    """A curve that falls on a straight line from 1 to 0, where it stays."""
    return [0, steps_to_zero, 100], [1.0, 0.0, 0.0]


TIMES = {"none": [1.0, 1.0], "cs": [1.0, 1.0], "ls": [3.0, 3.0]}


def test_factors_are_of_equal_seeds_and_verdicts_plain():
    curves = {
        "none": [line(40), line(80), line(60)],
        "cs": [line(20), line(40), line(30)],
        "ls": [line(20), line(39), line(31)],
    }
    reached = compare_levels(Level("loss", 0.5), curves, TIMES)
    assert reached.steps["none"] == [20, 40, 30]
    assert reached.factors["cs"].mean == pytest.approx(2)
    assert reached.in_seconds("cs").low == pytest.approx(2)
    assert reached.in_seconds("ls").mean == pytest.approx(2 / 3, rel=0.01)
    told = verdict([reached], ["cs", "ls"])
    assert "cs was faster than none: faster to loss 0.5." in told
    assert "ls was partly faster than none: faster to loss 0.5 in steps; slower to loss 0.5 in seconds." in told
    assert "– (" not in reached.describe()


def test_what_was_not_faster_is_said_not_to_be():
    none, slow = [line(40), line(80)], [line(39), line(82)]
    reached = compare_levels(Level("loss", 0.5), {"none": none, "cs": slow, "ls": [([0, 100], [1.0, 0.9])] * 2}, TIMES)
    assert reached.steps["ls"] == [None, None]
    assert reached.factors["ls"] is None
    told = verdict([reached], ["cs", "ls"])
    assert "cs was not faster than none: no difference shown (the 95 % band holds 1) to loss 0.5." in told
    assert told.endswith(" ls did not get to loss 0.5 with every seed, none did.")
    json.dumps(reached.as_dict())


FLAT = [0, 100], [1.0, 0.9]


@pytest.mark.parametrize(
    ("none", "cs", "told"),
    [
        ([line(40), FLAT], [line(20), line(40)], "cs got to loss 0.5, loss 0.25 with every seed, none did not."),
        ([line(40), line(80)], [line(20), FLAT], "cs did not get to loss 0.5, loss 0.25 with every seed, none did."),
        ([line(40), FLAT], [FLAT, line(40)], "Neither cs nor none got to loss 0.5, loss 0.25 with every seed."),
    ],
)
def test_who_did_not_get_there_is_said_and_nobody_called_slower_for_it(none, cs, told):
    reached = [compare_levels(Level("loss", level), {"none": none, "cs": cs}, TIMES) for level in (0.5, 0.25)]
    assert [entry.factors["cs"] for entry in reached] == [None, None]
    assert verdict(reached, ["cs"]) == told


def test_a_level_that_one_missed_stands_beside_those_that_both_reached():
    none, cs = [([0, 10, 20], [1.0, 0.5, 0.4])] * 2, [([0, 5, 20], [1.0, 0.5, 0.3])] * 2
    reached = [compare_levels(Level("loss", level), {"none": none, "cs": cs}, TIMES) for level in (0.5, 0.35)]
    told = "cs was faster than none: faster to loss 0.5. cs got to loss 0.35 with every seed, none did not."
    assert verdict(reached, ["cs"]) == told


def test_a_level_reached_before_the_training_compares_nothing():
    curves = {"none": [line(40), line(40)], "cs": [line(20), line(20)]}
    with pytest.raises(UserError, match=r"--loss-levels: got 1\.5, expected levels below the loss at step 0"):
        compare_levels(Level("loss", 1.5), curves, TIMES)
    curves["cs"][1] = ([0, 100], [0.1, 0.05])
    curves["none"] = [([0, 100], [1.0, 0.4])] * 2
    reached = compare_levels(Level("loss", 1.25, relative=True), curves, TIMES)
    assert reached.steps["cs"][1] == 0
    assert reached.factors["cs"] is None
    assert verdict([reached], ["cs"]) == (
        "At step 0 already cs or none was at 1.25 × none's final loss, which compares nothing."
    )
    json.dumps(reached.as_dict())


def test_a_spread_of_the_times_widens_the_band_in_seconds():
    curves = {"none": [line(40), line(40)], "cs": [line(20), line(20)]}
    reached = compare_levels(Level("loss", 0.5), curves, {"none": [1.0, 1.0], "cs": [1.0, 8.0]})
    found = reached.in_seconds("cs")
    assert found.low < 1 < found.mean < found.high


def test_levels_may_be_shares_of_what_none_of_the_seed_has_at_the_end():
    none = [([0, 10], [4.0, 2.0]), ([0, 10], [4.0, 1.0])]
    reached = compare_levels(Level("loss", 1.5, relative=True), {"none": none}, {"none": [1.0]})
    assert reached.steps["none"] == [5, pytest.approx(10 * 2.5 / 3)]
    assert reached.level.describe() == "1.5 × none's final loss"


def test_analysis_keeps_curves_and_asks_for_other_levels_without_training(tiny_training, tmp_path, monkeypatch):
    training = tiny_training(scalings=("none", "ls"))
    settings = ConvergenceSettings(
        training, every=1, sample_every=2, probe=8, samples=20, solver_steps=1, shares=(1.5, 1.0), rounds=2
    )
    units = Units(tmp_path)
    finding = analyze_convergence(settings, units, workers=1)
    assert len(list(tmp_path.iterdir())) == 4
    assert [(entry["measure"], entry["level"]) for entry in finding.data["levels"]] == [
        ("loss", 1.5),
        ("loss", 1.0),
        ("distance", 1.5),
        ("distance", 1.0),
    ]
    assert all(None not in entry["steps"]["none"] for entry in finding.data["levels"])
    assert "about 1.5 (ScaleLong Fig. 5)" in finding.sentence
    assert "ls was " in finding.sentence
    monkeypatch.setattr(convergence_module, "follow", lambda *_: pytest.fail("trained again"))
    again = analyze_convergence(dataclasses.replace(settings, loss_levels=(0.9, 1e-9)), units, workers=1)
    assert again.data["curves"] == json.loads(json.dumps(finding.data["curves"]))
    assert [entry["level"] for entry in again.data["levels"]] == [0.9, 1e-9, 1.5, 1.0]
    assert again.data["levels"][1]["steps"] == {"none": [None, None], "ls": [None, None]}
    from matplotlib.figure import Figure

    figure = Figure()
    again.draw(figure)
    assert len(figure.axes) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_every": 7, "every": 2}, "--sample-every: got 7, expected a multiple of --every"),
        ({"every": 1000}, "--every: got 1000"),
        ({"loss_levels": (-0.1,)}, "--loss-levels: got -0.1"),
        ({"ema_decay": 1.0}, "--ema-decay: got 1.0"),
        ({"training": Training(scalings=("cs", "ls"))}, "--scalings: .* expected none, and at least one"),
        ({"training": Training(scalings=("none",))}, "--scalings: .* expected none, and at least one"),
    ],
)
def test_bad_settings_of_convergence_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ConvergenceSettings(**changes)
