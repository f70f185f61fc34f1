"""A stopped run goes on to exactly the numbers of an uninterrupted one, bit for bit, however it was stopped."""

import os
import signal

import pytest

import scalelong_fast.training.objective as objective_module

#: What makes a run of the command line that of ``tiny()``.
OPTIONS = "--train.no-async-save"

#: How a process dies, the step from which the next one goes on, and options of the run. Rows come every 3 steps,
#: checkpoints every 4.
SABOTAGE = {
    "between two checkpoints, rows after the last one written": (
        """
loop = module("scalelong_fast.training.loop")
draw = loop.BatchSource.__call__
loop.BatchSource.__call__ = lambda self, step: die() if step == 7 else draw(self, step)
""",
        4,
        OPTIONS,
    ),
    "halfway through the tensors of a checkpoint": (
        """
checkpoint, files = module("scalelong_fast.training.checkpoint"), module("torch.distributed.checkpoint.filesystem")
save, write, saved, written = checkpoint.CheckpointFolder.save, files._write_item, [], []
def noted(self, step, *args, **options):
    saved.append(step)
    return save(self, step, *args, **options)
def torn(*args, **options):
    result = write(*args, **options)
    written.append(saved[-1])
    return die() if written.count(8) == 20 else result
checkpoint.CheckpointFolder.save, files._write_item = noted, torn
""",
        4,
        OPTIONS,
    ),
    "in a background thread, while the next step is taken": (
        """
checkpoint, loop, time = (module(name) for name in (
    "scalelong_fast.training.checkpoint", "scalelong_fast.training.loop", "time"
))
write = checkpoint.write_tensors
def slow(folder, *args):
    if "000000008" in str(folder):
        time.sleep(60)
    return write(folder, *args)
checkpoint.write_tensors = slow
draw = loop.BatchSource.__call__
loop.BatchSource.__call__ = lambda self, step: die() if step == 9 else draw(self, step)
""",
        4,
        "",
    ),
    "before a complete checkpoint gets its name": (
        """
os = module("os")
rename = os.rename
os.rename = lambda a, b: die() if str(b).endswith("step_000000008") else rename(a, b)
""",
        4,
        OPTIONS,
    ),
    "after a checkpoint, before the averaged model": (
        """
loop = module("scalelong_fast.training.loop")
save, saves = loop.RunFolder.save_ema, []
def last(self, model):
    saves.append(None)
    return die() if len(saves) == 2 else save(self, model)
loop.RunFolder.save_ema = last
""",
        8,
        OPTIONS,
    ),
}


@pytest.fixture(scope="module")
def reference(tiny, train, tmp_path_factory):
    """The folder of a run of 10 steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("uninterrupted")
    train(tiny(), out)
    return out


@pytest.fixture
def assert_equals_reference(reference, last_state, history, assert_same):
    def compare(out):
        assert_same(last_state(out), last_state(reference))
        assert history(out) == history(reference)
        for name in ("ema/model.safetensors", "samples.png"):
            assert (out / name).read_bytes() == (reference / name).read_bytes(), name

    return compare


def test_a_finished_run_can_be_lengthened_at_any_step(tiny, train, tmp_path, assert_equals_reference):
    before = 0
    for steps in (1, 3, 4, 5, 10):  # with a row there, with a checkpoint, with neither
        reached, said = train(tiny({"train.steps": steps}), tmp_path)
        assert reached == steps
        assert before == 0 or f"Going on from step {before} of {steps}" in said
        before = steps
    assert_equals_reference(tmp_path)


def test_after_a_signal(tiny, train, tmp_path, monkeypatch, assert_equals_reference):
    calls, original = [], objective_module.diffusion_loss

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(objective_module, "diffusion_loss", interrupted)
    assert train(tiny(), tmp_path)[0] == 5
    assert train(tiny(), tmp_path)[0] == 10
    assert_equals_reference(tmp_path)


@pytest.fixture(scope="module")
def killed(on_ranks, tmp_path_factory):
    """The folder of a killed run for every entry of SABOTAGE."""
    folders = {name: tmp_path_factory.mktemp("killed") for name in SABOTAGE}
    plan = [
        {"world": 0, "out": out, "sabotage": SABOTAGE[name][0], "arguments": SABOTAGE[name][2]}
        for name, out in folders.items()
    ]
    for ended in on_ranks(plan):
        assert ended.codes == [-signal.SIGKILL], ended.errors
    return folders


@pytest.mark.parametrize("name", SABOTAGE)
def test_after_kill_9(tiny, train, killed, assert_equals_reference, name):
    out, resumes_at = killed[name], SABOTAGE[name][1]
    reached, said = train(tiny(), out)
    assert reached == 10
    assert f"Going on from step {resumes_at} of 10" in said
    assert "damaged" not in said
    assert_equals_reference(out)
    assert not [path for path in out.rglob("*") if path.name.endswith((".tmp", ".old", ".gone"))]


def test_a_second_run_gives_the_same_numbers_also_with_samples_on_the_way(
    tiny, train, tmp_path, assert_equals_reference
):
    train(tiny({"train.sample_every": 2, "train.tensorboard": True}), tmp_path)
    assert_equals_reference(tmp_path)


def test_with_flips_clipping_and_compat(tiny, train, tmp_path, last_state, assert_same):
    options = {"data.flip": True, "train.grad_clip": 0.5, "train.compat": True, "model.scaling": "learnable"}
    train(tiny({**options, "train.steps": 6}), tmp_path / "whole")
    train(tiny({**options, "train.steps": 3}), tmp_path / "halves")
    train(tiny({**options, "train.steps": 6}), tmp_path / "halves")
    assert_same(last_state(tmp_path / "halves"), last_state(tmp_path / "whole"))
