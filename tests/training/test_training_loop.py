"""The loop: what a run leaves in its folder, what it says, and what it refuses."""

import dataclasses
import errno
import json
import os
import signal

import numpy as np
import pytest
import torch

import scalelong_fast.training.checkpoint as checkpoint
import scalelong_fast.training.hardware as hardware
import scalelong_fast.training.loop as loop
import scalelong_fast.training.objective as objective_module
import scalelong_fast.training.outputs as outputs
from scalelong_fast.data import ImageDataset, load_images
from scalelong_fast.errors import UserError
from scalelong_fast.models import UViT
from scalelong_fast.training import NonFiniteLossError, RunFolder
from scalelong_fast.training.checks import check_data
from scalelong_fast.training.metrics import read_metrics
from scalelong_fast.training.optim import learning_rate

image_module = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def finished(tiny, train, tmp_path_factory):
    """A finished run, to be read and not to be changed: (config, folder, what it said)."""
    out = tmp_path_factory.mktemp("finished") / "run"
    config = tiny({"train.tensorboard": True})
    reached, said = train(config, out, curve=True)
    assert reached == 10
    return config, out, said


@pytest.fixture
def breaks(monkeypatch):
    """``breaks(how, at)``: ``how(loss, model)`` replaces the loss from the update after ``at`` finished steps on."""

    def install(how, at):
        calls = []
        original = objective_module.diffusion_loss

        def broken(model, *args):
            calls.append(None)
            loss = original(model, *args)
            return how(loss, model) if len(calls) > at else loss

        monkeypatch.setattr(objective_module, "diffusion_loss", broken)

    return install


class TestFolder:
    def test_contents(self, finished):
        _, out, _ = finished
        names = {path.name for path in out.iterdir()} - {".lock"}
        expected = {"config.json", "metrics.jsonl", "loss.png", "samples.png", "checkpoints", "ema", "tensorboard"}
        assert names == expected
        assert [path.name for path in sorted((out / "checkpoints").iterdir())] == [
            "step_000000008",
            "step_000000010",
        ]
        assert any("tfevents" in path.name for path in (out / "tensorboard").iterdir())

    def test_the_config_is_the_one_used(self, finished):
        config, out, _ = finished
        stored, facts = RunFolder(out).read_config()
        assert stored == config
        assert facts == {"preset": "digits-uvit", "data_fingerprint": load_images("digits").fingerprint()}

    def test_the_pictures_can_be_opened(self, finished):
        _, out, _ = finished
        with image_module.open(out / "loss.png") as curve:
            assert min(curve.size) >= 100
        with image_module.open(out / "samples.png") as grid:
            cell, gap = 48, 2
            assert grid.size == (cell, 10 * (cell + gap) - gap)

    def test_the_averaged_model_is_that_of_the_last_checkpoint(self, finished, last_state):
        _, out, _ = finished
        model = UViT.from_pretrained(str(out / "ema"))
        averages = last_state(out)[1]["train"]["ema"]
        assert set(averages) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, averages[name]), name

    def test_metrics(self, finished):
        config, out, _ = finished
        rows = read_metrics(out / "metrics.jsonl")
        assert [row["step"] for row in rows] == [3, 6, 9, 10]
        for row in rows:
            assert 0 < row["loss"] < 3
            assert row["images_per_second"] > 0
            assert row["batch_size"] == 8
            assert row["lr"] == learning_rate(row["step"] - 1, config.train)
        assert [row.get("partial", False) for row in rows] == [False, False, False, True]

    def test_rows_average_over_the_steps_since_the_last(self, tiny, train, tmp_path):
        train(tiny({"train.steps": 6, "train.log_every": 1}), tmp_path / "fine")
        train(tiny({"train.steps": 6, "train.log_every": 3}), tmp_path / "coarse")
        fine = [row["loss"] for row in read_metrics(tmp_path / "fine" / "metrics.jsonl")]
        coarse = [row["loss"] for row in read_metrics(tmp_path / "coarse" / "metrics.jsonl")]
        assert coarse == pytest.approx([np.mean(fine[:3]), np.mean(fine[3:])], rel=1e-12)

    def test_checkpoints_kept(self, tiny, train, tmp_path):
        train(tiny({"train.steps": 5, "train.save_every": 1, "train.keep_checkpoints": 3}), tmp_path)
        assert len(list((tmp_path / "checkpoints").iterdir())) == 3


class TestMessages:
    def test_says_what_is_trained_and_where(self, finished):
        _, out, said = finished
        first = said.splitlines()[0]
        for part in ("digits-uvit", "'ls'", "1797 images (digits)", "cpu, fp32, eager", str(out)):
            assert part in first

    def test_says_where_the_results_are(self, finished):
        _, out, said = finished
        last = said.splitlines()[-1]
        assert last.startswith("Done: 10 steps.")
        for name in ("samples.png", "loss.png", "ema"):
            assert str(out / name) in last

    def test_progress_outside_a_terminal_is_a_line(self, finished):
        assert "step 10/10  loss " in finished[2]

    def test_no_compiler_is_said_in_one_line(self, tiny, train, tmp_path, monkeypatch):
        monkeypatch.setattr(hardware, "find_cxx_compiler", lambda: None)
        reached, said = train(tiny({"train.steps": 2, "train.compile": "on"}), tmp_path)
        assert reached == 2
        assert len([line for line in said.splitlines() if "No C++ compiler found" in line]) == 1
        assert "eager" in said


class TestFinishedRun:
    def test_says_so_and_changes_no_result(self, finished, train, tree):
        config, out, _ = finished
        before = tree(out)
        reached, said = train(config, out)
        assert reached == 10
        assert "is finished: 10 steps of 10. Nothing to train." in said
        after = tree(out)
        assert set(after) == set(before)
        for name in before:
            if not name.startswith(("loss.png", "tensorboard")):
                assert after[name] == before[name], name

    @pytest.fixture
    def mine(self, tiny, train, tmp_path):
        config = tiny({"train.steps": 2})
        train(config, tmp_path)
        return config, tmp_path

    def test_restores_lost_pictures(self, mine, train):
        config, out = mine
        grid = (out / "samples.png").read_bytes()
        for name in ("samples.png", "loss.png"):
            (out / name).unlink()
        train(config, out, curve=True)
        assert (out / "samples.png").read_bytes() == grid
        assert (out / "loss.png").stat().st_size > 1000

    @pytest.mark.parametrize("damage", ["lost", "truncated", "no config"])
    def test_restores_the_averaged_model(self, mine, train, last_state, damage):
        config, out = mine
        weights = out / "ema" / "model.safetensors"
        if damage == "lost":
            weights.unlink()
        elif damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:100])
        else:
            (out / "ema" / "config.json").unlink()
        train(config, out)
        model = RunFolder(out).load_ema()
        assert torch.equal(model.pos_embed, last_state(out)[1]["train"]["ema"]["pos_embed"])

    def test_a_crash_before_the_last_averaged_model_is_made_good(self, tiny, train, tmp_path, monkeypatch, last_state):
        config, saves = tiny({"train.steps": 4, "train.save_every": 2}), []
        save = RunFolder.save_ema

        def dies_the_second_time(self, model):
            saves.append(None)
            if len(saves) == 2:
                raise KeyboardInterrupt
            save(self, model)

        monkeypatch.setattr(RunFolder, "save_ema", dies_the_second_time)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path)
        monkeypatch.undo()
        assert last_state(tmp_path)[0] == 4
        train(config, tmp_path)
        averages = last_state(tmp_path)[1]["train"]["ema"]
        assert torch.equal(RunFolder(tmp_path).load_ema().pos_embed, averages["pos_embed"])


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_saves_and_stops(self, tiny, train, tmp_path, breaks, last_state, number):
        def send(loss, model):
            os.kill(os.getpid(), number)
            return loss

        breaks(send, at=4)
        before = signal.getsignal(number)
        reached, said = train(tiny(), tmp_path)
        assert reached == 5
        assert f"{signal.Signals(number).name}: saved step 5. Run the same command to go on" in said
        assert last_state(tmp_path)[0] == 5
        assert not (tmp_path / "samples.png").exists()
        assert signal.getsignal(number) is before

    def test_a_second_ctrl_c_does_not_wait(self, tiny, train, tmp_path, breaks):
        def send(loss, model):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return loss

        breaks(send, at=1)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path)


def infinite(loss, model):
    return loss * float("inf")


def undefined(loss, model):
    return loss * float("nan")


def overflowing_gradient(loss, model):
    """The loss as it was, to the last bit, but the slope of a square root at 0."""
    return loss + (0 * model.pos_embed.sum()).square().sqrt()


class TestNonFinite:
    @pytest.mark.parametrize("how", [infinite, undefined])
    def test_stops_at_the_next_row_and_names_the_step(self, tiny, train, tmp_path, breaks, how, last_state):
        breaks(how, at=6)
        with pytest.raises(NonFiniteLossError, match=r"NaN or infinite at step 7\. .*last good checkpoint is step 4"):
            train(tiny(), tmp_path)
        assert last_state(tmp_path)[0] == 4
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3, 6]
        assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl"))

    def test_before_the_first_checkpoint(self, tiny, train, tmp_path, breaks):
        breaks(undefined, at=0)
        with pytest.raises(NonFiniteLossError, match=r"at step 1\. There was no checkpoint yet .*--train\.lr"):
            train(tiny(), tmp_path)
        assert not (tmp_path / "checkpoints").exists()
        assert not (tmp_path / "ema").exists()

    def test_a_checkpoint_due_before_the_next_row_is_not_written(self, tiny, train, tmp_path, breaks):
        breaks(undefined, at=2)
        with pytest.raises(NonFiniteLossError, match="at step 3"):
            train(tiny({"train.log_every": 100}), tmp_path)
        assert not (tmp_path / "checkpoints").exists()

    def test_a_gradient_may_overflow_under_a_finite_loss(self, tiny, train, tmp_path, breaks, last_state):
        breaks(overflowing_gradient, at=7)
        with pytest.raises(NonFiniteLossError, match=r"at step 8\. .*last good checkpoint is step 4"):
            train(tiny(), tmp_path)
        assert last_state(tmp_path)[0] == 4

    def test_the_run_goes_on_from_the_good_checkpoint(self, tiny, train, tmp_path, breaks, monkeypatch):
        breaks(undefined, at=6)
        with pytest.raises(NonFiniteLossError):
            train(tiny(), tmp_path)
        monkeypatch.undo()
        reached, said = train(tiny({"train.lr": 1e-4}), tmp_path)
        assert reached == 10
        assert "Going on from step 4 of 10" in said


@pytest.fixture(scope="module")
def run(tiny, train, tmp_path_factory):
    """A run of 2 steps, for tests that must not change it."""
    out = tmp_path_factory.mktemp("run")
    train(tiny({"train.steps": 2}), out)
    return out


class TestRefusals:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("model.embed_dim", 32),
            ("model.depth", 4),
            ("model.scaling", "cs"),
            ("model.reduction", 2),
            ("data.flip", True),
            ("diffusion.schedule", "ddpm"),
            ("diffusion.label_dropout", 0.2),
            ("train.batch_size", 16),
            ("train.seed", 1),
            ("train.compat", True),
        ],
    )
    def test_another_run_in_the_folder(self, run, tiny, train, tree, field, value):
        before = tree(run)
        with pytest.raises(UserError, match=rf"^out: .*{field} was .*now {value!r}.*another --out.*nothing was chan"):
            train(tiny({"train.steps": 4, field: value}), run)
        assert tree(run) == before

    def test_other_images(self, run, tiny, train, tree, monkeypatch):
        digits = load_images("digits")
        other = dataclasses.replace(digits, images=255 - digits.images)
        monkeypatch.setattr(loop, "open_training_set", lambda *args, **options: other)
        before = tree(run)
        with pytest.raises(UserError, match=r"^data\.name: .* was trained on other images"):
            train(tiny({"train.steps": 4}), run)
        assert tree(run) == before

    @pytest.mark.parametrize(
        ("field", "value"),
        [("model.use_checkpoint", True), ("train.lr", 1e-5), ("train.log_every", 1), ("sample.steps", 2)],
    )
    def test_what_does_not_change_the_kind_of_run_may_change(self, tiny, train, tmp_path, field, value):
        train(tiny({"train.steps": 2}), tmp_path)
        reached, _ = train(tiny({"train.steps": 4, field: value}), tmp_path)
        assert reached == 4
        section, name = field.split(".")
        assert json.loads((tmp_path / "config.json").read_text())[section][name] == value

    def test_two_spellings_of_a_scaling_are_one_run(self, tiny, train, tmp_path):
        train(tiny({"train.steps": 2, "model.scaling": "cs-reversed"}), tmp_path)
        reached, _ = train(tiny({"train.steps": 4, "model.scaling": "cs_reversed"}), tmp_path)
        assert reached == 4

    def test_two_processes_in_one_folder(self, run, tiny, train, tree):
        before = tree(run)
        other = RunFolder(run)
        other.open_for_writing()
        try:
            with pytest.raises(UserError, match="another process is training in"):
                train(tiny({"train.steps": 4}), run)
        finally:
            other.close()
        assert tree(run) == before

    def test_a_folder_below_a_file(self, tiny, train, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match=r"^out: cannot write to"):
            train(tiny(), tmp_path / "file" / "run")

    def test_the_folder_is_free_again_after_an_error(self, run, tiny, train):
        with pytest.raises(UserError):
            train(tiny({"train.seed": 1}), run)
        folder = RunFolder(run)
        folder.open_for_writing()
        folder.close()


class TestDamagedCheckpoints:
    def test_the_previous_one_is_used_and_the_damage_reported(
        self, tiny, train, tmp_path, finished, assert_same, last_state
    ):
        _, reference, _ = finished
        train(tiny(), tmp_path)
        newest = tmp_path / "checkpoints" / "step_000000010"
        (tensors,) = newest.glob("*.distcp")
        good = tensors.read_bytes()
        tensors.write_bytes(good[: len(good) // 2])
        reached, said = train(tiny(), tmp_path)
        assert reached == 10
        assert f"Checkpoint {newest} is damaged" in said
        assert "Going on from step 8 of 10" in said
        assert_same(last_state(tmp_path), last_state(reference))

    def test_none_left(self, tiny, train, tmp_path, tree):
        train(tiny({"train.steps": 2}), tmp_path)
        (tmp_path / "checkpoints" / "step_000000002" / "checksums.json").write_bytes(b"")
        before = tree(tmp_path)
        with pytest.raises(UserError, match=r"all 1 checkpoints in .* are damaged"):
            train(tiny(), tmp_path)
        assert tree(tmp_path) == before


class TestFullDisk:
    FULL = OSError(errno.ENOSPC, "No space left on device")

    @pytest.mark.parametrize("background", [False, True])
    def test_at_a_checkpoint(self, tiny, train, tmp_path, monkeypatch, last_state, background):
        write, saves = checkpoint.write_tensors, []

        def fills_up(*args):
            saves.append(None)
            if len(saves) >= 2:
                raise self.FULL
            write(*args)

        monkeypatch.setattr(checkpoint, "write_tensors", fills_up)
        config = tiny({"train.async_save": background})
        with pytest.raises(UserError, match=r"^out: could not write .*step 4 is untouched"):
            train(config, tmp_path)
        assert last_state(tmp_path)[0] == 4
        monkeypatch.undo()
        assert train(config, tmp_path)[0] == 10

    def test_a_disk_that_was_full_for_a_while_costs_one_checkpoint(
        self, tiny, train, tmp_path, monkeypatch, last_state
    ):
        write, saves = checkpoint.write_tensors, []

        def full_for_a_while(*args):
            saves.append(None)
            if len(saves) == 2:
                raise self.FULL
            write(*args)

        monkeypatch.setattr(checkpoint, "write_tensors", full_for_a_while)
        with pytest.warns(UserWarning, match="the save before that of step 10 failed"):
            assert train(tiny({"train.async_save": True}), tmp_path)[0] == 10
        assert last_state(tmp_path)[0] == 10

    def test_anywhere_else(self, tiny, train, tmp_path, monkeypatch):
        def fills_up(*args):
            raise self.FULL

        monkeypatch.setattr(outputs, "save_png", fills_up)
        with pytest.raises(UserError, match=r"^out: writing to .*No space left.*run the same command again"):
            train(tiny({"train.steps": 2}), tmp_path)
        monkeypatch.undo()
        assert train(tiny({"train.steps": 2}), tmp_path)[0] == 2
        assert (tmp_path / "samples.png").exists()


class TestCheckData:
    def images(self, channels=1, side=8, labels=10):
        pixels = torch.zeros(10, channels, side, side, dtype=torch.uint8)
        names = tuple(map(str, range(labels)))
        return ImageDataset("toy", pixels, torch.arange(10) % labels if labels else None, labels, names)

    def test_fitting_data(self, tiny):
        check_data(self.images(), tiny())
        unconditional = {"model.num_classes": -1, "diffusion.label_dropout": 0.0, "sample.guidance": 1.0}
        check_data(self.images(), tiny(unconditional))
        check_data(self.images(labels=0), tiny(unconditional))

    @pytest.mark.parametrize("shape", [{"channels": 3}, {"side": 16}])
    def test_shapes(self, tiny, shape):
        with pytest.raises(UserError, match=r"takes images of 1×8×8, but .*--model\.in-chans \d --model\.img-size \d"):
            check_data(self.images(**shape), tiny())

    def test_labels_missing(self, tiny):
        with pytest.raises(UserError, match=r"model\.num_classes: got 11, expected -1, since .* has no labels"):
            check_data(self.images(labels=0), tiny())

    @pytest.mark.parametrize(("dropout", "classes", "expected"), [(0.1, 10, 11), (0.0, 11, 10), (0.1, 5, 11)])
    def test_the_number_of_classes_counts_the_null_class(self, tiny, dropout, classes, expected):
        config = tiny({"model.num_classes": classes, "diffusion.label_dropout": dropout, "sample.guidance": 1.0})
        with pytest.raises(UserError, match=rf"model\.num_classes: got {classes}, expected {expected}: 10 classes"):
            check_data(self.images(), config)

    def test_text_models_have_nothing_to_read(self, tiny):
        overrides = {"model.num_classes": -1, "model.clip_dim": 8}
        config = tiny({**overrides, "diffusion.label_dropout": 0.0, "sample.guidance": 1.0})
        with pytest.raises(UserError, match=r"model\.clip_dim: got 8, expected 0"):
            check_data(self.images(), config)
