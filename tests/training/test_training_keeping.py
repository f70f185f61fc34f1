"""What a run keeps: a save that failed in the background is made good by the next."""

from types import SimpleNamespace

import pytest

from scalelong_fast.errors import UserError
from scalelong_fast.training.checks import check_same_precision
from scalelong_fast.training.keeping import Keeper
from scalelong_fast.training.ranks import Ranks


class Checkpoints:
    """Stands for a checkpoint folder whose saves succeed or fail in the background, in this order."""

    def __init__(self, *outcomes: bool):
        self.outcomes, self.under_way, self.saved = list(outcomes), None, []

    def save(self, step, state, then):
        self.wait()
        self.under_way = step

    def wait(self):
        step, self.under_way = self.under_way, None
        if step is not None:
            if not self.outcomes.pop(0):
                raise UserError("out: could not write: the disk is full.")
            self.saved.append(step)


def keeper(checkpoints):
    nothing = SimpleNamespace(
        state_dict=dict, is_finite=lambda: True, combine=lambda: None, first_bad_step=lambda: None,
        gather_average=lambda: None, write_average=lambda pulse: None,
    )  # fmt: skip
    return Keeper(SimpleNamespace(path="run"), checkpoints, nothing, nothing, nothing, Ranks())


def test_a_save_that_failed_is_made_good_by_the_next():
    checkpoints = Checkpoints(False, True)
    keeping = keeper(checkpoints)
    keeping.save(10)
    with pytest.warns(UserWarning, match="the save before that of step 20 failed .*disk is full.*this one is written"):
        keeping.save(20)
    assert checkpoints.saved == [20]


def test_two_failures_end_the_run_at_the_second():
    keeping = keeper(Checkpoints(False, False))
    keeping.save(10)
    with pytest.raises(UserError, match="disk is full"):
        keeping.save(20)


def test_processes_that_compute_in_different_dtypes_are_refused():
    check_same_precision(["torch.bfloat16"] * 3)
    with pytest.raises(UserError, match=r"process 2 computes in torch\.float16, process 0 in torch\.bfloat16"):
        check_same_precision(["torch.bfloat16", "torch.bfloat16", "torch.float16"])
