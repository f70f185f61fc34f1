"""Runs on several processes give the numbers of one process, however the work is shared."""

import pytest
import torch

from scalelong_fast.models import UViT

#: Name → (processes, of which on each machine, arguments).
RUNS = {
    "ddp": (2, 2, "--train.parallel ddp"),
    "fsdp in two parts, recomputed": (2, 2, "--train.parallel fsdp --train.accumulate 2 --train.recompute block"),
    "hsdp in two parts": (4, 2, "--train.parallel hsdp --train.accumulate 2"),
}
#: Stopped and gone on with on another number of processes, shared in another way.
MOVES = {
    "one to four to two to one": [(0, "auto", 2), (4, "fsdp", 5), (2, "ddp --train.accumulate 2", 7), (0, "auto", 10)],
}
CLIP = "--train.grad-clip 0.5 --data.flip"
#: Says how long the groups of shares and copies wait for each other.
LIMITS = """
if rank == 3:
    parallel, torch = module("scalelong_fast.training.parallel"), module("torch")
    cut = parallel._shares
    def told(model, *args):
        cut(model, *args)
        mesh = next(model.parameters()).device_mesh
        for name in mesh.mesh_dim_names:
            print(name, "within", mesh.get_group(name)._get_backend(torch.device("cpu")).options._timeout)
    parallel._shares = told
"""

# The sums of a batch are taken in another order. A rounding error of float32 is 6e-8 of a number; that of a gradient,
# a mean over 8 images, about the same; AdamW's first updates depend on the sign of a gradient alone, so that entries
# near 0 are not continued smoothly. 10 steps stay within 2e-6 here, of which this is five times as much.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def runs(on_ranks, tmp_path_factory):
    """Every entry of RUNS and the last of every one of MOVES, and that of one process as ``"one"``."""
    runs = [{"world": 0, "arguments": CLIP, "out": tmp_path_factory.mktemp("one")}]
    for world, local, arguments in RUNS.values():
        out = tmp_path_factory.mktemp("several")
        run = {"world": world, "local_world": local, "arguments": f"{CLIP} {arguments}", "out": out}
        runs.append({**run, "sabotage": LIMITS if world == 4 else ""})
    for pieces in MOVES.values():
        out = tmp_path_factory.mktemp("moved")
        for world, parallel, steps in pieces:
            arguments = f"{CLIP} --train.parallel {parallel} --train.steps {steps}"
            runs.append({"world": world, "arguments": arguments, "out": out})
    for run, ended in zip(runs, ended_runs := on_ranks(runs), strict=True):
        assert set(ended.codes) == {0}, (run, ended.errors)
    names = ["one", *RUNS, *(name for name, pieces in MOVES.items() for _ in pieces)]
    return dict(zip(names, ended_runs, strict=True))


@pytest.fixture(scope="module")
def folders(runs):
    """Their run folders."""
    return {name: ended.out for name, ended in runs.items()}


@pytest.mark.parametrize("name", [*RUNS, *MOVES])
def test_the_curve_is_that_of_one_process(folders, history, name):
    expected = [row for row in history(folders["one"]) if name in RUNS or not row[3]]
    found = [row for row in history(folders[name]) if name in RUNS or not row[3]]
    assert [row[0] for row in found] == [row[0] for row in expected]
    assert [row[2:] for row in found] == [row[2:] for row in expected]
    assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], rel=TOLERANCE)


@pytest.mark.parametrize("name", [*RUNS, *MOVES])
def test_the_averaged_model_is_that_of_one_process(folders, name):
    one, other = (UViT.from_pretrained(str(folders[key] / "ema")).state_dict() for key in ("one", name))
    for key, expected in one.items():
        # Updates are of the size of the learning rate, 3e-3: a tenth of one where a gradient is but a rounding error.
        torch.testing.assert_close(other[key], expected, rtol=0, atol=3e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_the_groups_of_hsdp_wait_as_long_as_the_others(runs):
    said = runs["hsdp in two parts"].said
    for name in ("copy", "shard"):
        assert f"{name} within 0:01:40\n" in said  # twice train.timeout and a minute


@pytest.mark.parametrize("name", [*RUNS, *MOVES])
def test_a_checkpoint_can_be_read_whole_by_one_process(folders, last_state, name):
    step, state = last_state(folders[name])
    assert step == 10
    moments = state["train"]["optimizer"]
    assert set(moments) == set(state["train"]["model"]) == set(state["train"]["ema"])
    for key, weight in state["train"]["model"].items():
        assert moments[key]["exp_avg"].shape == weight.shape == state["train"]["ema"][key].shape
        assert float(moments[key]["step"]) == 10
