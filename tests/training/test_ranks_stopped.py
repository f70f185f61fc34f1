"""Runs on several processes that end before their time: all stop at the same step, or with one message."""

import json

import pytest

SABOTAGE = {
    "at the start": """
if rank == 1:
    loop, os = module("scalelong_fast.training.loop"), module("os")
    load = loop.open_training_set
    def told(*args, **options):
        os.kill(os.getpid(), 10)
        return load(*args, **options)
    loop.open_training_set = told
""",
    "sigterm": """
if rank == 1:
    loop, os = module("scalelong_fast.training.loop"), module("os")
    draw = loop.BatchSource.__call__
    def told(self, step):
        if step == 3:
            os.kill(os.getpid(), 15)
        return draw(self, step)
    loop.BatchSource.__call__ = told
""",
    "in the last grid": """
if rank == 1:
    outputs, os = module("scalelong_fast.training.outputs"), module("os")
    draw = outputs.Outputs.draw_grid
    def told(self):
        os.kill(os.getpid(), 15)
        return draw(self)
    outputs.Outputs.draw_grid = told
""",
    "stalled disk": """
if rank == 1:
    files, time = module("torch.distributed.checkpoint.filesystem"), module("time")
    files._write_item = lambda *args, **options: time.sleep(1000)
""",
    "ctrl-c": """
loop, os = module("scalelong_fast.training.loop"), module("os")
draw = loop.BatchSource.__call__
def told(self, step):
    if step == 4:
        os.kill(os.getpid(), 2)
    return draw(self, step)
loop.BatchSource.__call__ = told
""",
    "nan": """
if rank == 1:
    loop = module("scalelong_fast.training.loop")
    draw = loop.BatchSource.__call__
    def broken(self, step):
        found = draw(self, step)
        if step == 5:
            found.x0[0, 0, 0, 0] = float("nan")
        return found
    loop.BatchSource.__call__ = broken
""",
    "hang": """
if rank == 1:
    loop, time = module("scalelong_fast.training.loop"), module("time")
    draw = loop.BatchSource.__call__
    def stuck(self, step):
        while step == 6:
            time.sleep(1)
        return draw(self, step)
    loop.BatchSource.__call__ = stuck
""",
    "full disk": """
if rank == 1:
    loop, resource = module("scalelong_fast.training.loop"), module("resource")
    save = loop.CheckpointFolder.save
    def full(self, step, *args, **options):
        if step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return save(self, step, *args, **options)
    loop.CheckpointFolder.save = full
""",
    "other data": """
if rank == 1:
    loop, dataclasses = module("scalelong_fast.training.loop"), module("dataclasses")
    load = loop.open_training_set
    def other(*args, **options):
        found = load(*args, **options)
        return dataclasses.replace(found, images=255 - found.images)
    loop.open_training_set = other
""",
    "other options": """
if rank == 1:
    loop, dataclasses = module("scalelong_fast.training.loop"), module("dataclasses")
    init = loop.Trainer.__init__
    def other(self, config, *args, **options):
        init(self, dataclasses.replace(config, train=dataclasses.replace(config.train, lr=1e-3)), *args, **options)
    loop.Trainer.__init__ = other
""",
    "an error of one": """
if rank == 1:
    loop = module("scalelong_fast.training.loop")
    draw = loop.BatchSource.__call__
    loop.BatchSource.__call__ = lambda self, step: 1 // 0 if step == 6 else draw(self, step)
""",
}
ARGUMENTS = {"hang": "--train.timeout 2", "stalled disk": "--train.timeout 2"}
#: Which runs go on in the folder of another one.
AFTER = {"none": "at the start", "in the last grid": "sigterm", "finished": "in the last grid", "resumed": "full disk"}


@pytest.fixture(scope="module")
def runs(on_ranks, tmp_path_factory):
    """Name → the run that was stopped, or that nobody stopped: ``"none"``, ``"finished"`` and ``"resumed"``."""
    plan = {}
    for name in ("at the start", "none", "sigterm", "in the last grid", "finished", "full disk", "resumed", *SABOTAGE):
        if name not in plan:
            out = plan[AFTER[name]]["out"] if name in AFTER else tmp_path_factory.mktemp("stopped")
            plan[name] = {"world": 2, "out": out, "arguments": ARGUMENTS.get(name, "")}
            # Between two of them, the folder is looked at.
            plan[name]["sabotage"] = f"""
if rank == 0 and {name in AFTER}:
    shutil = module("shutil")
    shutil.copytree({str(out)!r}, {str(out / "..")!r} + "/before {name}")
{SABOTAGE.get(name, "")}
"""
    plan["no folder"] = {"world": 2, "out": tmp_path_factory.mktemp("file") / "file" / "run"}
    (plan["no folder"]["out"].parent).touch()
    return dict(zip(plan, on_ranks(list(plan.values())), strict=True))


def left(runs, name):
    """What a run left that another one went on with."""
    later = next((after for after, first in AFTER.items() if first == name), None)
    return runs[name].out if later is None else runs[name].out.parent / f"before {later}"


@pytest.mark.parametrize(
    ("name", "step", "said", "mark"),
    [
        ("at the start", 0, "SIGUSR1: stopped before the first step. Run the same command to begin.", "SIGUSR1"),
        # Received in the fourth and fifth step, voted on after it, agreed on after the next.
        ("sigterm", 5, "SIGTERM: saved step 5. Run the same command to go on from there.", "SIGTERM"),
        ("ctrl-c", 6, "SIGINT: saved step 6. Run the same command to go on from there.", None),
        ("in the last grid", 10, "SIGTERM: saved step 10, the last one, but did not draw the samples.", "SIGTERM"),
    ],
)
def test_a_signal_stops_all_at_the_same_step(runs, name, step, said, mark):
    stopped = runs[name]
    assert stopped.codes == [0, 0], stopped.errors
    assert said in stopped.said
    out = left(runs, name)
    assert (out / "checkpoints" / f"step_{step:09d}").is_dir() is (step > 0)
    assert (out / "REQUEUE").exists() is (mark is not None)
    if mark is not None:
        assert json.loads((out / "REQUEUE").read_text()) == {"step": step, "signal": mark}
    assert not (out / "samples.png").exists()


@pytest.mark.parametrize(("name", "step"), [("none", 0), ("finished", 10), ("resumed", 4)])
def test_the_run_goes_on_to_the_same_numbers(runs, name, step, last_state, history, assert_same):
    resumed, reference = runs[name], runs["none"]
    assert resumed.codes == [0, 0], resumed.errors
    assert "Done: 10 steps." in resumed.said
    assert step in (0, 10) or f"Going on from step {step} of 10" in resumed.said
    assert not (resumed.out / "REQUEUE").exists()
    assert_same(last_state(resumed.out), last_state(reference.out))
    assert [row[0] for row in history(resumed.out)] == [3, 6, 9, 10]
    assert history(resumed.out) == history(reference.out)
    for file in ("ema/model.safetensors", "samples.png"):
        assert (resumed.out / file).read_bytes() == (reference.out / file).read_bytes(), file


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("nan", 1, "The loss became NaN or infinite at step 6. The last good checkpoint is step 4"),
        ("full disk", 2, "The checkpoint of step 4 is untouched"),
        ("no folder", 2, "out: cannot write to "),
        ("other data", 2, "data.path: process 1 has other data"),
        ("other options", 2, "train.lr: process 1 was given 0.001, process 0 0.003"),
    ],
)
def test_what_all_know_is_said_once(runs, name, code, message):
    stopped = runs[name]
    assert stopped.codes == [code, code], stopped.errors
    assert stopped.errors.count("scalelong-fast: error:") == 1
    assert message in stopped.errors
    assert "Traceback" not in stopped.errors


def test_a_process_that_hangs_is_named(runs):
    stopped = runs["hang"]
    assert stopped.codes == [1, 1], stopped.errors
    assert stopped.errors.count("scalelong-fast: error:") == 1
    assert "no progress for 2 s (train.timeout). Probably waited for: rank 1 at " in stopped.errors
    assert "Checkpoints written before are untouched." in stopped.errors
    assert (stopped.out / "checkpoints" / "step_000000004").is_dir()


def test_a_disk_that_stalls_under_one_process_is_named(runs):
    stopped = runs["stalled disk"]
    assert stopped.codes == [1, 1], stopped.errors
    assert stopped.errors.count("scalelong-fast: error:") == 1
    assert (
        "no progress for 2 s (train.timeout). Probably waited for: rank 1 at scalelong_fast/training/ch"
        in stopped.errors
    )
    assert "(write_data)" in stopped.errors
    assert list((stopped.out / "checkpoints").glob("step_*")) == []


def test_a_defect_in_one_process_leaves_its_traceback_alone(runs):
    stopped = runs["an error of one"]
    assert stopped.codes == [1, 1]
    assert stopped.errors.count("Traceback") == 1
    assert "ZeroDivisionError" in stopped.errors
    assert "scalelong-fast: error:" not in stopped.errors
