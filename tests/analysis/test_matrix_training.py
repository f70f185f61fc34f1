"""Matrix UNets that learn to predict the noise, and their oscillation."""

import json
import math

import pytest
import torch

from scalelong_fast.analysis import MatrixTraining, MatrixUNet, OscillationSettings, Units, analyze_oscillation
from scalelong_fast.analysis.matrix_training import ScaledMatrixUNet, train_matrices
from scalelong_fast.analysis.training import DivergedError
from scalelong_fast.errors import UserError
from scalelong_fast.scaling import create_scaling


def tiny(**changes):
    return MatrixTraining(**({"depth": 4, "steps": 8, "batch_size": 4, "seeds": (0, 1)} | changes))


def watch(training, scaling="none", seed=0, rate=1e-3, warmup=0, every=1):
    seen = []
    return train_matrices(training, scaling, seed, rate, warmup, seen.append, every), seen


@pytest.mark.parametrize("name", ["none", "uniform", "cs", "cs-reversed"])
def test_constants_make_the_matrix_unet_of_the_theorems(generator, name):
    scaling = create_scaling(name, num_skips=3, widths=8)
    net = ScaledMatrixUNet(scaling, 8, 2, "paper", generator=generator)
    plain = MatrixUNet(scaling.kappas, 8, 2, "paper", generator=generator, dtype=torch.float32)
    plain.load_state_dict({"weights": net.weights})
    x = torch.randn(1, 5, 8, generator=generator)
    for own, other in zip(net.features(x), plain.features(x), strict=True):
        torch.testing.assert_close(own, other)


def test_ls_gates_each_number_of_a_skip_by_what_it_is(generator):
    scaling = create_scaling("ls", num_skips=1, widths=8, reduction=4)
    net = ScaledMatrixUNet(scaling, 8, 1, "norm-keeping", generator=generator)
    x = torch.randn(1, 5, 8, generator=generator)
    encoder, middle, decoder = net.weights[0, :, 0]
    skip = x[0] @ encoder.T
    expected = (scaling.gate(skip) * skip + skip @ middle.T) @ decoder.T
    torch.testing.assert_close(net(x)[0], expected)
    net(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scaling.parameters())


def test_what_is_observed_is_the_step_and_changes_nothing():
    often, seen = watch(tiny(), "ls")
    rarely, twice = watch(tiny(), "ls", every=4)
    assert [w.step for w in seen] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [w.step for w in twice] == [4, 8]
    assert seen[-1] == twice[-1]
    assert torch.equal(often.weights, rarely.weights)
    for watched in seen:
        sizes = (watched.features, watched.batch_features, watched.gradients)
        assert all(len(values) == 2 and min(values) > 0 for values in sizes)
    # The last decoder block is the network's output: the loss is that of predicting the noise with it.
    assert 0 < seen[-1].loss < (1 + seen[-1].features[-1]) ** 2


def test_equal_seeds_begin_with_equal_matrices_and_kappa_alone_makes_the_difference():
    kept = {}
    for scaling in ("none", "cs", "ls"):
        _, seen = watch(tiny(depth=12), scaling, rate=1e-12)
        kept[scaling] = seen[0].batch_features[-1]
    # The squared norms of Theorem 3.1, 1 + Σκ²: 7, 2.9 and, with κ about a half, 2.5.
    assert kept["none"] > 1.3 * kept["cs"]
    assert kept["none"] > 1.3 * kept["ls"]


def test_training_lowers_the_loss_and_warms_up():
    _, seen = watch(tiny(steps=200, batch_size=16), "cs", rate=3e-3, every=50)
    assert seen[-1].loss < 0.7 * seen[0].loss
    first = {warmup: watch(tiny(), warmup=warmup)[0].weights for warmup in (0, 8)}
    start = watch(tiny(), rate=1e-12)[0].weights
    assert 0 < (first[8] - start).norm() < 0.8 * (first[0] - start).norm()


def test_oscillation_of_matrices_is_kept_and_compared(tmp_path):
    settings = OscillationSettings(tiny(scalings=("none", "ls")), every=1)
    finding = analyze_oscillation(settings, Units(tmp_path))
    assert len(list(tmp_path.iterdir())) == 4
    assert finding.name == "oscillation-matrix"
    assert "Theorems 3.1 and 3.3" in finding.reference
    assert finding.sentence.startswith(
        "matrix UNet, depth 4, batch 4, 8 steps, no warm-up, learning rate 0.001, 2 seeds"
    )
    assert finding.data == json.loads(json.dumps(analyze_oscillation(settings).data))
    # The first fifth of the eight recordings is left out.
    kept = [row for record in finding.data["records"]["ls"] for row in record["gradients"][1:]]
    assert finding.data["size"]["gradients"]["ls"]["mean"] == pytest.approx(sum(map(sum, kept)) / (14 * 2))
    assert "| size of gradients |" in finding.markdown
    assert all(math.isfinite(b["mean"]) for found in finding.data["bands"].values() for b in found.values())


@pytest.mark.parametrize(("rate", "what"), [(1.0, "became NaN or infinite"), (1e-2, "died, one of its features")])
def test_a_training_that_breaks_says_how(rate, what):
    with pytest.raises(DivergedError, match=rf"scaling 'none' and seed 0 {what}.* at step .*--learning-rate"):
        watch(tiny(depth=12, block_depth=3, steps=60, batch_size=2), rate=rate)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "--depth: got 3, expected an even number"),
        ({"depth": 0}, "--depth: got 0"),
        ({"block_depth": 0}, "--block-depth: got 0"),
        ({"scalings": ()}, "--scalings"),
        ({"seeds": (1, 1)}, r"--seeds: got \(1, 1\)"),
        ({"dataset": "mnist"}, "DATASET: got 'mnist'"),
        ({"init": "pape"}, "init: got 'pape'"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)
