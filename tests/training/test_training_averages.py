"""The averaged model beside the checkpoints: where it is held, who writes it, and when."""

import threading

import pytest
import torch
from torch import nn

import scalelong_fast.training.loop as loop
from scalelong_fast.models import UViT, build_model
from scalelong_fast.training import RunFolder, Trainer
from scalelong_fast.training.checkpoint import CheckpointFolder
from scalelong_fast.training.ema import EMA
from scalelong_fast.training.outputs import Outputs
from scalelong_fast.training.parallel import place
from scalelong_fast.training.ranks import Ranks


@pytest.fixture
def written(monkeypatch):
    """What each call of ``save_ema`` was given, in order, and in which thread; and an event that it waits for."""
    save, calls, may = RunFolder.save_ema, [], threading.Event()

    def noted(self, model):
        may.wait()
        calls.append((threading.current_thread().name, {k: v.clone() for k, v in model.state_dict().items()}))
        save(self, model)

    monkeypatch.setattr(RunFolder, "save_ema", noted)
    return calls, may


def test_it_is_written_while_the_training_goes_on(tiny, train, tmp_path, written, monkeypatch):
    (calls, may), draw = written, loop.BatchSource.__call__

    def going_on(self, step):
        if step == 7:
            assert calls == []  # due after step 4
            may.set()
        return draw(self, step)

    monkeypatch.setattr(loop.BatchSource, "__call__", going_on)
    reached, _ = train(tiny({"train.async_save": True, "train.keep_checkpoints": 3}), tmp_path)
    assert reached == 10
    assert [name for name, _ in calls] == ["checkpoint"] * 3  # after steps 4, 8 and 10, and not once more at the end
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    for step, (_, found) in zip((4, 8, 10), calls, strict=True):
        averages = checkpoints.load(step)["train"]["ema"]
        assert set(found) == set(averages)
        assert all(torch.equal(found[name], averages[name]) for name in averages), step


def test_samples_on_the_way_leave_it_alone(tiny, train, tmp_path, written, monkeypatch):
    """It is on its way to disk while the samples of a later step are drawn from a later average."""
    (calls, may), draw, drawn = written, Outputs.draw_grid, []

    def during(self):
        drawn.append(len(calls))
        result = draw(self)
        may.set()
        return result

    monkeypatch.setattr(Outputs, "draw_grid", during)
    train(tiny({"train.async_save": True, "train.sample_every": 6, "train.steps": 7}), tmp_path)
    assert drawn == [0, 2]
    averages = CheckpointFolder(tmp_path / "checkpoints").load(4)["train"]["ema"]
    assert all(torch.equal(calls[0][1][name], averages[name]) for name in averages)


def test_an_interrupt_waits_for_what_is_being_written(tiny, tmp_path, alone, written, monkeypatch):
    """Also for one process under torchrun: there is nobody who could hang."""
    from scalelong_fast.training.ranks import connect

    (_, may), draw = written, loop.BatchSource.__call__

    def interrupted(self, step):
        if step == 5:
            threading.Timer(0.2, may.set).start()
            raise KeyboardInterrupt
        return draw(self, step)

    monkeypatch.setattr(loop.BatchSource, "__call__", interrupted)
    config = tiny({"train.async_save": True})
    with pytest.raises(KeyboardInterrupt), connect(config.train) as ranks:
        Trainer(config, tmp_path, ranks=ranks).run()
    assert CheckpointFolder(tmp_path / "checkpoints").steps() == [4]
    assert (tmp_path / "ema" / "model.safetensors").is_file()


def test_what_takes_long_in_one_process_counts_as_progress(tiny, tmp_path, alone, monkeypatch):
    from scalelong_fast.training.ranks import connect

    config, busy = tiny({"train.steps": 2}), {}

    def noting(owner, name):
        function = getattr(owner, name)

        def noted(*args, **options):
            busy.setdefault(name, ranks.watch.busy)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    noting(loop.CheckpointFolder, "steps")  # of all that resuming does
    noting(loop, "open_training_set")
    noting(loop.BatchSource, "__init__")
    noting(loop.TrainStep, "__call__")  # the first one may compile
    noting(loop.LossWindow, "add")
    with connect(config.train) as ranks:
        Trainer(config, tmp_path, ranks=ranks).run()
    assert busy == {"steps": True, "open_training_set": True, "__init__": True, "__call__": True, "add": False}


@pytest.mark.parametrize(("kind", "device"), [("fsdp", "cpu"), ("hsdp", "cpu"), ("ddp", "meta")])
def test_a_model_that_is_to_be_cut_up_is_never_whole_on_the_device(tiny, kind, device):
    config, ranks = tiny({"train.parallel": kind}), Ranks(world=2, control=object())
    model = place(build_model(config.model), config.train, torch.device("meta"), ranks)
    assert isinstance(model, UViT)
    assert {parameter.device.type for parameter in model.parameters()} == {device}


def test_parameters_may_move_to_other_memory():
    """As FSDP may do with its shares when it first runs."""
    model = nn.Linear(2, 2)
    average = EMA(model, 0.5)
    before = model.weight.detach().clone()
    model.weight.data = torch.full((2, 2), 7.0)
    average.update()
    torch.testing.assert_close(average.state_dict()["weight"], (before + 7.0) / 2)
