"""Networks trained under observation: oscillation, robustness and what LS learns."""

import copy
import json
import math
import re

import pytest
import torch

from benchmarks.reproduction_items import judge_robustness
from scalelong_fast.analysis import (
    LearntKappaSettings,
    OscillationSettings,
    RobustnessSettings,
    Training,
    Units,
    analyze_learnt_kappa,
    analyze_oscillation,
    analyze_robustness,
    robustness,
)
from scalelong_fast.analysis.composition import composition_norms, jacobian_norm
from scalelong_fast.analysis.learnt_kappa import _trend, closest_cs, kappa_means, movement
from scalelong_fast.analysis.oscillation import _compare, oscillation_index
from scalelong_fast.analysis.oscillation_records import block_features
from scalelong_fast.analysis.paired import less_none, sign
from scalelong_fast.analysis.statistics import band
from scalelong_fast.analysis.training import train_watched
from scalelong_fast.errors import UserError
from scalelong_fast.models import UNet


def watch(config, every=1):
    """The network and (step, gradients, features) of each observation."""
    seen = []
    model = train_watched(config, lambda w: seen.append((w.step, w.gradients, block_features(w))), every)
    return model, seen


@pytest.mark.parametrize("preset", ["digits-uvit", "digits-unet"])
def test_observation_changes_nothing(tiny_training, preset):
    depth = 4 if preset == "digits-uvit" else None
    config = tiny_training(preset=preset, depth=depth).config("ls", 0)
    often, seen = watch(config, every=1)
    rarely, twice = watch(config, every=4)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [step for step, _, _ in twice] == [0, 4]
    for a, b in zip(often.parameters(), rarely.parameters(), strict=True):
        assert torch.equal(a, b)
    assert seen[-1] == twice[-1]
    blocks = len(often.output_blocks if isinstance(often, UNet) else often.out_blocks)
    assert all(len(features) == blocks for _, _, features in seen)
    assert [len(gradients) for _, gradients, _ in seen] == [0, *[blocks] * 4]
    assert all(math.isfinite(g) and g > 0 for _, gradients, _ in seen[2:] for g in gradients)


def test_gradients_are_those_of_the_step(tiny_training):
    norms, observed = [], []
    config = tiny_training(batch_size=8).config("cs", 3)

    def observe(watched):
        observed.append(watched.gradients)
        if not watched.step:
            block = watched.model.out_blocks[0]
            squares = {}
            for name, parameter in block.named_parameters():
                parameter.register_hook(lambda g, n=name: squares.__setitem__(n, g.double().square().sum().item()))
            norms.append(squares)
        elif watched.step == 1:
            assert watched.gradients[0] == pytest.approx(math.sqrt(sum(norms[0].values())))

    train_watched(config, observe)
    assert len(observed) == 5


def test_features_are_the_blocks_outputs_and_kappas_those_of_the_forward(tiny_training):
    def observe(watched):
        if watched.step != 4:
            return
        outputs = []
        hook = watched.model.out_blocks[0].register_forward_hook(lambda _, __, out: outputs.append(out))
        with watched.model.scaling.recording() as kappas:
            watched.predict()
        hook.remove()
        assert block_features(watched)[0] == pytest.approx(outputs[0].double().square().mean().sqrt().item())
        assert kappa_means(watched) == [pytest.approx(kappas[1].mean().item())]
        assert watched.model.training
        seen.append(watched.loss())

    seen = []
    train_watched(tiny_training().config("ls", 0), observe)
    assert 0 < seen[0] < 10


def test_a_training_that_breaks_says_so(tiny_training, monkeypatch):
    config = tiny_training().config("none", 0)
    monkeypatch.setattr("scalelong_fast.training.step.learning_rate", lambda step, train: math.nan)
    with pytest.raises(UserError, match="scaling 'none' and seed 0 became NaN or infinite, seen at step 2"):
        train_watched(config, lambda watched: None)


def test_index_is_the_size_of_the_changes_whatever_the_level_and_hardly_the_drift():
    shaking = [1.0, 1.1] * 20
    assert oscillation_index(shaking) == pytest.approx(math.log(1.1))
    assert oscillation_index([100 * value for value in shaking]) == pytest.approx(math.log(1.1))
    assert oscillation_index([1.0] * 20) == 0
    drift = [math.exp(0.001 * number) for number in range(100)]
    assert oscillation_index(drift) == pytest.approx(0.001)
    assert oscillation_index(shaking, relative=False) == pytest.approx(0.1)
    assert oscillation_index([100 * value for value in shaking], relative=False) == pytest.approx(10)
    # The first fifth is left out.
    assert oscillation_index([1.0, 9.0, *[2.0] * 8]) == 0


def test_oscillation_compares_scalings_over_seeds_and_goes_on_after_an_interruption(tiny_training, tmp_path):
    settings = OscillationSettings(tiny_training(scalings=("none", "cs", "ls")), every=1)
    units, done = Units(tmp_path), []

    def stop_at_the_fourth(number, total, what):
        done.append(what)
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze_oscillation(settings, units, stop_at_the_fourth)
    assert len(list(tmp_path.iterdir())) == 3
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    finding = analyze_oscillation(settings, units)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert finding.data == json.loads(json.dumps(analyze_oscillation(settings).data))
    what = {"features", "batch features", "gradients"}
    assert set(finding.data["index"]) == what | {f"absolute {name}" for name in what}
    assert set(finding.data["index"]["features"]) == {"none", "cs", "ls"}
    assert finding.data["bands"]["features"]["ls"]["count"] == 2
    assert "Fig. 1 and 12" in finding.sentence
    times = finding.data["bands"]["gradients"]["ls"]["mean"] / finding.data["bands"]["gradients"]["none"]["mean"]
    assert re.search(
        rf"[;,:] gradients of (cs \([0-9.e+-]+ times\) and of )?ls \({times:.3g} times\)", finding.sentence
    )
    assert finding.data["loss"]["none"]["mean"] == pytest.approx(
        sum(e["loss"] for e in finding.data["records"]["none"]) / 2
    )
    assert "| loss at the end |" in finding.markdown
    none, ls = (finding.data["index"]["features"][scaling] for scaling in ("none", "ls"))
    mean = (ls[0] - none[0] + ls[1] - none[1]) / 2
    assert finding.data["differences"]["features"]["ls"]["mean"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("own", "none", "words"),
    [
        ([1.0, 1.1, 0.9], [3.0, 3.1, 2.9], "less (95 % bands do not overlap)"),
        ([3.0, 3.1, 2.9], [1.0, 1.1, 0.9], "more (95 % bands do not overlap)"),
        ([1.0, 2.0, 3.0], [1.1, 2.11, 3.09], "less seed by seed, although the 95 % bands overlap"),
        ([1.0, 2.0, 3.0], [1.1, 1.9, 3.0], "no difference shown"),
        ([1.0], [5.0], "of one seed, which shows nothing"),
    ],
)
def test_what_counts_as_a_difference(own, none, words):
    difference = less_none({"none": none, "cs": own})["cs"]
    assert words in _compare(band(own), band(none), difference)
    assert sign(difference) == ("no difference shown" if words[:2] in ("no", "of") else words[:4])


def test_robustness_measures_loss_and_movement(tiny_training):
    training = tiny_training(scalings=("none", "cs"), seeds=(0,), batch_size=2)
    settings = RobustnessSettings(training, levels=(0.01, 1.0), draws=2, checks=2)
    finding = analyze_robustness(settings)
    for results in finding.data["results"].values():
        for result in results:
            assert result["losses"][0] == pytest.approx(result["loss"], rel=0.05)
            assert all(value > 0 for value in result["amplification"])
            assert result["steps"] == [0, 2, 4]
            assert [len(norms) for norms in result["compositions"]] == [1, 1, 1]
            assert result["increase"] == [loss - result["loss"] for loss in result["losses"]]
    assert "Fig. 3c" in finding.sentence
    assert "Fig. 11" in finding.sentence
    assert "Theorem 3.4" in finding.sentence
    assert "Against none at equal seeds, rise of the loss: no difference shown (cs); movement" in finding.sentence


def test_robustness_is_the_rise_of_the_loss_at_equal_seeds(monkeypatch):
    """A network that is trained worse but disturbed less is the more robust one."""

    def disturbed(settings, scaling, seed):
        loss, rise = {"none": (0.1, 0.5), "cs": (0.4, 0.3)}[scaling]
        losses = [loss + seed + share * (rise + 0.1 * seed) for share in (0.5, 1)]
        return {"loss": loss + seed, "losses": losses, "amplification": [1.0, 2.0 + seed], "steps": []}

    monkeypatch.setattr(robustness, "measure_robustness", disturbed)
    training = Training(scalings=("none", "cs"), seeds=(0, 1, 2))
    finding = analyze_robustness(RobustnessSettings(training, levels=(0.1, 1.0)))
    assert finding.data["bands"]["losses"]["cs"][-1]["mean"] > finding.data["bands"]["losses"]["none"][-1]["mean"]
    rise = finding.data["differences"]["increase"]["cs"]
    assert [band["mean"] for band in rise] == pytest.approx([-0.1, -0.2])
    assert rise[-1]["high"] == pytest.approx(-0.2)
    assert finding.sentence.endswith(
        "Against none at equal seeds, rise of the loss: less (cs); movement of the output: no difference shown (cs)."
    )
    verdict = judge_robustness(with_ls(finding.data))
    assert verdict.word == "in part"
    assert "rise of the loss there: none 0.6, cs 0.4 (less), ls 0.4 (less); 3 seeds" in verdict.why


def with_ls(data):
    """``data`` with bands of LS that are those of CS."""
    both = {"bands", "differences"}
    return {
        key: {what: {**found, "ls": found["cs"]} for what, found in value.items()} if key in both else value
        for key, value in data.items()
    }


def test_composition_is_the_jacobian_of_encoder_and_decoder_block(tiny_training):
    def observe(watched):
        if watched.step:
            return
        inputs = {}
        blocks = (watched.model.in_blocks[0], watched.model.out_blocks[0])
        hooks = [b.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0])) for b in blocks]
        watched.predict()
        for hook in hooks:
            hook.remove()
        tokens, stream = (inputs[block][:1, :2].double() for block in blocks)
        a, b = (copy.deepcopy(block).double() for block in blocks)
        jacobian = torch.autograd.functional.jacobian(lambda x: b(stream, a(x)), tokens).view(tokens.numel(), -1)
        found = jacobian_norm(lambda x: b(stream, a(x)), tokens, steps=100)
        assert found.item() == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-3)
        assert len(composition_norms(watched)) == 1

    train_watched(tiny_training().config("none", 0), observe)


def test_a_unet_has_no_composition_and_is_disturbed_all_the_same(tiny_training):
    training = tiny_training(preset="digits-unet", depth=None, scalings=("cs",), seeds=(0,))
    finding = analyze_robustness(RobustnessSettings(training, levels=(0.1,), draws=1))
    assert finding.data["results"]["cs"][0]["compositions"] == []
    assert "Fig. 11" not in finding.sentence


def test_learnt_kappas_start_near_a_half_and_are_recorded_per_skip(tiny_training):
    settings = LearntKappaSettings(tiny_training(scalings=("ls",), depth=4), recordings=2)
    finding = analyze_learnt_kappa(settings)
    record = finding.data["records"][0]
    assert record["steps"] == [0, 2, 4]
    assert [len(kappas) for kappas in record["kappas"]] == [2, 2, 2]
    assert all(0.3 < kappa < 0.7 for kappa in record["kappas"][0])
    assert record["kappas"][0] != record["kappas"][-1]
    assert "Fig. 7" in finding.sentence
    moved = finding.data["movement"]
    both = finding.data["records"]
    assert moved["start"]["mean"] == pytest.approx(sum(sum(own["kappas"][0]) for own in both) / 4)
    assert moved["moved"][1]["mean"] == pytest.approx(sum(o["kappas"][-1][1] - o["kappas"][0][1] for o in both) / 2)
    assert (moved["steps"], moved["moved"][1]["count"]) == (4, 2)
    assert f"κ began at {moved['start']['mean']:.2f} and hardly moved, by " in finding.sentence
    json.dumps(finding.data)


def network(start, *kappas):
    """What is recorded of a network whose κ's begin equal."""
    return {"steps": [0, 300, 600], "kappas": [[start] * len(kappas), [9.0] * len(kappas), list(kappas)]}


def test_what_training_moved_is_told_from_what_it_began_with():
    little = movement([network(0.5, 0.53, 0.52, 0.56), network(0.48, 0.51, 0.5, 0.54)])
    assert [band.mean for band in little.moved] == pytest.approx([0.03, 0.02, 0.06])
    assert little.describe() == "began at 0.49 and hardly moved, by +0.02 to +0.06 in 600 steps"
    much = movement([network(0.5, 0.75, 0.4), network(0.5, 0.77, 0.5)])
    assert much.describe() == "began at 0.50 and moved by -0.05 to +0.26 in 600 steps"


@pytest.mark.parametrize(
    ("final", "told"),
    [
        ([[0.5, 0.6, 0.7], [0.3, 0.41, 0.5], [0.6, 0.7, 0.79]], "rising by 0.098 per skip"),
        ([[0.5, 0.4], [0.6, 0.51], [0.7, 0.59]], "falling by 0.1 per skip"),
        ([[0.5, 0.6], [0.6, 0.5], [0.5, 0.52]], "no trend shown"),  # slopes of either sign
        ([[0.5, 0.6]], "no trend shown"),
    ],
)
def test_a_trend_of_kappa_is_one_that_the_networks_share(final, told):
    assert told in _trend(final)
    assert _trend([[0.5], [0.6]]) == ""


def test_closest_cs():
    assert closest_cs([1.0, 0.7, 0.49]) == (0.7, pytest.approx(0, abs=1e-12))
    base, distance = closest_cs([0.5, 0.5])
    assert base == 0.5
    assert distance == pytest.approx(math.sqrt(0.125))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Training(preset="digits-unet"), "--depth: got 12, expected none for digits-unet"),
        (lambda: Training(preset="digit"), "preset: got 'digit'"),
        (lambda: Training(depth=3), "depth: got 3, expected an even number"),
        (lambda: Training(scalings=("lss",)), "scaling: got 'lss'"),
        (lambda: Training(seeds=(1, 1)), r"--seeds: got \(1, 1\)"),
        (lambda: Training(steps=2), "--steps: got 2"),
        (lambda: OscillationSettings(Training(steps=8), every=3), "--every: got 3"),
        (lambda: OscillationSettings(learning_rate=0.0), "--learning-rate: got 0.0"),
        (lambda: OscillationSettings(Training(steps=8), every=1, warmup=9), "--warmup: got 9"),
        (lambda: RobustnessSettings(levels=(0.2, 0.1)), r"--levels: got \(0.2, 0.1\), expected numbers that grow"),
        (lambda: RobustnessSettings(levels=(0.0,)), "--levels: got 0.0"),
        (lambda: LearntKappaSettings(Training(scalings=("cs",))), "--scalings: got 'cs', expected ls or ls-individual"),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
