"""Averages followed for post-hoc EMA: their arithmetic, snapshots, resuming, and models made of them."""

import os
import shutil

import pytest
import torch
from torch import nn

from scalelong_fast.errors import UserError
from scalelong_fast.training.posthoc_ema import PostHocEMA, snapshot_due
from scalelong_fast.training.posthoc_profiles import Profile, fit, gamma_of
from scalelong_fast.training.posthoc_snapshots import Snapshots
from scalelong_fast.training.ranks import Ranks

TWO = (0.05, 0.1)
WIDTHS = {"train.ema_profiles": TWO, "train.ema_snapshot_every": 2}


def wander(model):
    """Change the weights as training might: a drift and a jitter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 + 0.02 * torch.randn_like(parameter))


@pytest.fixture
def followed(tmp_path):
    """Snapshots of two profiles every 5 of 160 steps, the history of the weights, and a third profile followed too."""
    torch.manual_seed(1)
    model = nn.Linear(6, 5)
    posthoc, direct = PostHocEMA(model, TWO), PostHocEMA(model, (0.13,))
    snapshots, history = Snapshots(tmp_path / "posthoc"), []
    for step in range(1, 161):
        wander(model)
        history.append({name: p.detach().double().clone() for name, p in model.named_parameters()})
        posthoc.update(step)
        direct.update(step)
        if step % 5 == 0:
            posthoc.store(snapshots, step, Ranks())
    return snapshots, history, direct.averages[0.13].state_dict()


def test_average_is_the_weighted_sum_of_the_history(followed):
    _, history, direct = followed
    edges = (torch.arange(161, dtype=torch.float64) / 160) ** (gamma_of(0.13) + 1)
    shares = edges.diff()
    for name, average in direct.items():
        exact = sum(share * weights[name] for share, weights in zip(shares, history, strict=True))
        torch.testing.assert_close(average.double(), exact, rtol=2e-6, atol=0)


def test_initial_weights_leave_no_trace():
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.fill_(float("inf"))
    posthoc = PostHocEMA(model, (0.1,))
    with torch.no_grad():
        model.weight.fill_(2.0)
    posthoc.averages[0.1]._average[0].fill_(1e6)
    posthoc.update(1)
    assert torch.equal(posthoc.state_dict()["0.1"]["weight"], model.weight)


def test_reconstruction_equals_the_average_that_was_followed(followed):
    snapshots, _, direct = followed
    stored = snapshots.profiles()
    assert len(stored) == 64
    made = snapshots.combine(stored, fit(stored, [Profile(160, 0.13)])[0].weights)
    nearest = snapshots.load(Profile(160, 0.1))
    for name, average in direct.items():
        assert made[name].dtype == torch.float32
        error, other = (made[name] - average).norm(), (nearest[name] - average).norm()
        assert error < other / 200, (error, other)


def test_a_followed_profile_comes_back(followed):
    snapshots, *_ = followed
    stored = snapshots.profiles()
    for wanted in (Profile(160, 0.05), Profile(80, 0.1)):
        kept = [profile for profile in stored if profile.step <= wanted.step]
        made = snapshots.combine(kept, fit(kept, [wanted])[0].weights)
        for name, tensor in snapshots.load(wanted).items():
            torch.testing.assert_close(made[name], tensor, rtol=1e-6, atol=1e-7)


def test_torn_and_altered_snapshots_are_refused(followed):
    snapshots, *_ = followed
    profile = snapshots.profiles()[3]
    whole = snapshots.file(profile).read_bytes()
    for content in (whole[:-7], whole[:20], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        snapshots.file(profile).write_bytes(content)
        with pytest.raises(UserError, match=rf"snapshot .*{snapshots.file(profile).name} cannot be read.*backup"):
            snapshots.load(profile)


def test_snapshots_of_two_models_are_not_mixed(followed):
    snapshots, *_ = followed
    snapshots.save(Profile(165, 0.1), {"weight": torch.zeros(2, 2)})
    stored = snapshots.profiles()
    with pytest.raises(UserError, match="holds other parameters than"):
        snapshots.combine(stored, torch.ones(len(stored)).numpy())


def test_full_disk_leaves_nothing_half_written(followed, monkeypatch):
    snapshots, *_ = followed
    before = sorted(path.name for path in snapshots.path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        PostHocEMA(nn.Linear(2, 2), (0.1,)).store(snapshots, 200, Ranks())
    assert sorted(path.name for path in snapshots.path.iterdir()) == before


def test_others_may_read_snapshots_where_they_may_read_other_files(followed):
    snapshots, *_ = followed
    before = os.umask(0o022)
    try:
        snapshots.save(Profile(165, 0.1), {"weight": torch.zeros(2)})
    finally:
        os.umask(before)
    assert snapshots.file(Profile(165, 0.1)).stat().st_mode & 0o777 == 0o644


def test_snapshots_are_kept_when_a_run_begins_anew(tiny, train, tmp_path, tree):
    """Somebody removed the checkpoints; the averages of the steps before are in no other file."""
    train(tiny({"train.steps": 4, **WIDTHS}), tmp_path)
    before = tree(tmp_path / "posthoc")
    for number in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints")
        _, said = train(tiny({"train.steps": 2, **WIDTHS}), tmp_path)
        assert (
            f"There is no checkpoint, but snapshots of averages: they are kept in {tmp_path}/posthoc-{number}" in said
        )
    assert len(before) == 4
    assert tree(tmp_path / "posthoc-1") == before
    assert len(tree(tmp_path / "posthoc")) == len(tree(tmp_path / "posthoc-2")) == 2


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [(4, 10, [4, 8, 10]), (0, 64, list(range(2, 65, 2))), (0, 5, [1, 2, 3, 4, 5]), (100, 7, [7])],
)
def test_when_snapshots_are_due(every, steps, expected):
    assert [step for step in range(1, steps + 1) if snapshot_due(step, every, steps)] == expected


def test_resumed_run_has_the_snapshots_of_an_uninterrupted_one(tiny, train, tmp_path, tree, last_state, assert_same):
    train(tiny(WIDTHS), tmp_path / "whole")
    train(tiny({**WIDTHS, "train.steps": 5}), tmp_path / "parts")
    (tmp_path / "parts" / "posthoc" / "step_000000005_sigma_0.05.safetensors").unlink()  # of the shorter run's end
    (tmp_path / "parts" / "posthoc" / "step_000000005_sigma_0.1.safetensors").unlink()
    stale = Snapshots(tmp_path / "parts" / "posthoc")
    stale.save(Profile(9, 0.1), {"of": torch.zeros(1)})  # a step that was lost in a crash
    train(tiny(WIDTHS), tmp_path / "parts")
    whole, parts = tree(tmp_path / "whole" / "posthoc"), tree(tmp_path / "parts" / "posthoc")
    assert len(whole) == 10
    assert whole == parts
    assert_same(last_state(tmp_path / "parts"), last_state(tmp_path / "whole"))


def test_following_averages_changes_nothing_else(tiny, train, tmp_path, history):
    train(tiny(), tmp_path / "plain")
    train(tiny(WIDTHS), tmp_path / "followed")
    assert history(tmp_path / "plain") == history(tmp_path / "followed")
    models = [(tmp_path / name / "ema" / "model.safetensors").read_bytes() for name in ("plain", "followed")]
    assert models[0] == models[1]
    assert not (tmp_path / "plain" / "posthoc").exists()


def test_a_profile_cannot_be_begun_late(tiny, train, tmp_path, tree):
    train(tiny({"train.steps": 4, **WIDTHS, "train.ema_profiles": (0.05,)}), tmp_path)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"ema_profiles: got \(0.05, 0.1\).*begun late\. Leave out 0.1"):
        train(tiny(WIDTHS), tmp_path)
    assert tree(tmp_path) == before


def test_a_profile_can_be_dropped(tiny, train, tmp_path):
    train(tiny({"train.steps": 4, **WIDTHS}), tmp_path)
    reached, _ = train(tiny({**WIDTHS, "train.ema_profiles": (0.1,)}), tmp_path)
    assert reached == 10
    names = {path.name for path in (tmp_path / "posthoc").iterdir()}
    assert "step_000000004_sigma_0.05.safetensors" in names
    assert "step_000000010_sigma_0.05.safetensors" not in names
    assert "step_000000010_sigma_0.1.safetensors" in names


def test_no_snapshot_of_broken_weights(tiny, train, tmp_path, monkeypatch):
    from scalelong_fast.training import NonFiniteLossError
    from scalelong_fast.training.step import TrainStep

    step_call = TrainStep.__call__

    def broken(self, step, draw):
        loss = step_call(self, step, draw)
        if step == 5:
            with torch.no_grad():
                self.parameters[0].fill_(float("nan"))
        return loss

    monkeypatch.setattr(TrainStep, "__call__", broken)
    with pytest.raises(NonFiniteLossError):
        train(tiny({**WIDTHS, "train.log_every": 100}), tmp_path)
    assert {p.step for p in Snapshots(tmp_path / "posthoc").profiles()} == {2, 4}


@pytest.mark.parametrize("widths", [(0.3,), (0.0,), (0.1, 0.1)])
def test_bad_widths(tiny, widths):
    with pytest.raises(UserError, match=r"train\.ema_profiles: got"):
        tiny({"train.ema_profiles": widths})
