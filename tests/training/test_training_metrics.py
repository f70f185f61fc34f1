"""Metrics: the window that a row averages over, and the log that survives crashes."""

import json

import pytest
import torch

from scalelong_fast.training.metrics import LossWindow, MetricsLog, read_metrics
from scalelong_fast.training.ranks import Ranks

CPU = torch.device("cpu")


def row(step, **extra):
    return {"step": step, "loss": 1.0 / step, "lr": 1e-3, "images_per_second": 10.0, **extra}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


class TestLossWindow:
    def test_averages_what_was_added_since_the_reset(self):
        window = LossWindow(CPU)
        for step, loss in enumerate([1.0, 2.0, 6.0], start=1):
            window.add(step, torch.tensor(loss))
        assert window.mean() == 3.0
        window.reset()
        window.add(4, torch.tensor(0.5))
        assert window.mean() == 0.5

    def test_many_small_losses_do_not_drown_in_the_sum(self):
        window = LossWindow(CPU)
        window.add(1, torch.tensor(2.0**25))
        for step in range(2, 12):
            window.add(step, torch.tensor(1.0))
        assert window.mean() == (2**25 + 10) / 11

    @pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
    def test_remembers_the_first_bad_step(self, bad):
        window = LossWindow(CPU)
        window.add(1, torch.tensor(1.0))
        assert window.first_bad_step() is None
        window.add(2, torch.tensor(float(bad)))
        window.add(3, torch.tensor(1.0))
        window.add(4, torch.tensor(float("nan")))
        assert window.first_bad_step() == 2
        window.reset()
        assert window.first_bad_step() == 2

    def test_goes_on_from_its_state(self):
        first, second = LossWindow(CPU), LossWindow(CPU)
        losses = torch.rand(5)
        for step, loss in enumerate(losses[:3], start=1):
            first.add(step, loss)
        second.load_state_dict(first.state_dict())
        for step, loss in enumerate(losses[3:], start=4):
            first.add(step, loss)
            second.add(step, loss)
        assert second.mean() == first.mean() == pytest.approx(float(losses.double().mean()), rel=1e-15)


class Others(Ranks):
    """This process and others, of which it is known what they bring to the next exchange."""

    def __init__(self, world, windows=()):
        super().__init__(world=world, control=object())
        self.windows = windows

    def sum(self, tensor):
        tensor += sum(float(window.total) for window in self.windows)
        for window in self.windows:
            window.total.zero_()
        return tensor

    def least(self, tensor):
        return tensor


class TestLossWindowOfSeveral:
    def windows(self, world, state=None):
        """The windows of all processes; the first one knows the others."""
        others = [LossWindow(CPU) for _ in range(world - 1)]
        windows = [LossWindow(CPU, Others(world, others)), *others]
        if state is not None:
            windows[0].load_state_dict(state)
        return windows

    def test_the_mean_does_not_depend_on_when_losses_are_combined(self):
        """A run that stops in the middle of a window combines once more than one that does not."""
        losses = torch.rand(5, 3, generator=torch.Generator().manual_seed(3))
        whole, stopped = self.windows(3), self.windows(3)
        for step, row in enumerate(losses, start=1):
            for window, loss in zip(whole, row, strict=True):
                window.add(step, loss)
            for window, loss in zip(stopped, row, strict=True):
                window.add(step, loss)
            stopped[0].combine()
            stopped = self.windows(3, stopped[0].state_dict())
        whole[0].combine()
        assert stopped[0].mean() == whole[0].mean() == float(losses.double().sum()) / 15

    @pytest.mark.parametrize(("first", "then"), [(4, 2), (1, 2), (2, 4)])
    def test_every_step_counts_alike_on_another_number_of_processes(self, first, then):
        windows = self.windows(first)
        for window in windows:
            window.add(1, torch.tensor(3.0))
        windows[0].combine()
        windows = self.windows(then, windows[0].state_dict())
        for window in windows:
            window.add(2, torch.tensor(5.0))
        windows[0].combine()
        assert windows[0].mean() == 4.0

    def test_a_window_of_an_earlier_version_held_the_mean_over_the_processes(self):
        window = self.windows(2, {"total": torch.tensor(6.0, dtype=torch.float64), "count": 2})[0]
        assert window.mean() == 3.0


class TestMetricsLog:
    def test_each_row_can_be_read_as_soon_as_it_is_written(self, file):
        log = MetricsLog(file, 0)
        for step in (1, 2):
            log.write(row(step))
            assert [json.loads(line) for line in file.read_text().splitlines()] == [row(s) for s in range(1, step + 1)]
        log.sync()
        log.close()

    def test_a_resumed_log_is_cut_at_the_step(self, file):
        file.write_text("".join(json.dumps(row(step)) + "\n" for step in (2, 4, 6, 8)))
        log = MetricsLog(file, 5)
        log.write(row(6, loss=0.5))
        log.close()
        assert [(r["step"], r["loss"]) for r in read_metrics(file)] == [(2, 0.5), (4, 0.25), (6, 0.5)]
        assert log.rows == read_metrics(file)

    def test_a_row_of_the_step_itself_is_kept(self, file):
        file.write_text(json.dumps(row(4)) + "\n")
        MetricsLog(file, 4).close()
        assert read_metrics(file) == [row(4)]

    def test_rows_of_windows_closed_early_are_dropped(self, file):
        file.write_text("".join(json.dumps(r) + "\n" for r in (row(3), row(4, partial=True))))
        MetricsLog(file, 4).close()
        assert read_metrics(file) == [row(3)]

    def test_a_torn_last_line_is_dropped_and_written_over(self, file):
        text = json.dumps(row(1)) + "\n" + json.dumps(row(2))
        for cut in range(len(json.dumps(row(1))) + 1, len(text)):
            file.write_text(text[:cut])
            assert read_metrics(file) == [row(1)]
        log = MetricsLog(file, 10)
        log.write(row(2))
        log.close()
        assert read_metrics(file) == [row(1), row(2)]

    def test_bytes_that_are_no_text_end_the_log(self, file):
        file.write_bytes(json.dumps(row(1)).encode() + b"\n\xff\x00\xfe\n")
        assert read_metrics(file) == [row(1)]

    def test_no_file_means_no_rows(self, file):
        assert read_metrics(file) == []
        MetricsLog(file, 0).close()
        assert read_metrics(file) == []

    def test_nothing_else_is_left_beside_the_file(self, file):
        MetricsLog(file, 0).close()
        assert [path.name for path in file.parent.iterdir()] == [file.name]

    def test_tensorboard_gets_the_same_numbers(self, file, tmp_path):
        accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        log = MetricsLog(file, 0, tmp_path / "tensorboard")
        log.write(row(1))
        log.write(row(2))
        log.image(2, torch.zeros(4, 4, 3, dtype=torch.uint8).numpy())
        log.close()
        events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
        assert set(events.Tags()["scalars"]) == {"loss", "lr", "images_per_second"}
        assert events.Tags()["images"] == ["samples"]
