"""Processes that are killed: the others end with one message, and the run goes on bit for bit."""

import signal

import pytest

RUN = "--train.parallel fsdp"

#: How a process is killed, which one, and the step from which the run goes on (0: from the start). Rows come every 3
#: steps, checkpoints every 4.
KILLED = {
    "between two checkpoints": (
        """
if rank == 1:
    loop = module("scalelong_fast.training.loop")
    draw = loop.BatchSource.__call__
    def dying(self, step):
        if step == 6:
            trainer.checkpoints.wait()
            die()
        return draw(self, step)
    init = loop.Trainer.__init__
    def noted(self, *args, **options):
        global trainer
        trainer = self
        init(self, *args, **options)
    loop.BatchSource.__call__, loop.Trainer.__init__ = dying, noted
""",
        1,
        4,
    ),
    "halfway through the tensors of a checkpoint": (
        """
if rank == 1:
    loop, files = module("scalelong_fast.training.loop"), module("torch.distributed.checkpoint.filesystem")
    save, write, saved, written = loop.CheckpointFolder.save, files._write_item, [], []
    def noted(self, step, *args, **options):
        saved.append(step)
        return save(self, step, *args, **options)
    def torn(*args, **options):
        result = write(*args, **options)
        written.append(saved[-1])
        return die() if written.count(8) == 20 else result
    loop.CheckpointFolder.save, files._write_item = noted, torn
""",
        1,
        4,
    ),
    "rank 0, before a complete checkpoint gets its name": (
        """
os = module("os")
rename = os.rename
os.rename = lambda a, b: die() if str(b).endswith("step_000000008") else rename(a, b)
""",
        0,
        4,
    ),
    "after they have met, before they are connected": (
        """
if rank == 1:
    module("torch.distributed").init_process_group = lambda *args, **options: die()
""",
        1,
        0,
    ),
}
RESUMED = [name for name, (_, _, step) in KILLED.items() if step > 0]
ARGUMENTS = {"after they have met, before they are connected": " --train.timeout 2"}


@pytest.fixture(scope="module")
def runs(on_ranks, tmp_path_factory):
    """Name → (the run that was killed, the run that went on); and that of nobody under ``"none"``."""
    plan = [{"world": 2, "arguments": RUN, "out": tmp_path_factory.mktemp("none")}]
    for name, (sabotage, *_) in KILLED.items():
        killed = {"world": 2, "arguments": RUN + ARGUMENTS.get(name, ""), "out": tmp_path_factory.mktemp("killed")}
        plan.append({**killed, "sabotage": sabotage})
        if name in RESUMED:
            plan.append(killed)
    none, *others = on_ranks(plan)
    assert none.codes == [0, 0], none.errors
    ended = iter(others)
    runs = {name: (next(ended), next(ended) if name in RESUMED else None) for name in KILLED}
    return {"none": (none, none), **runs}


@pytest.mark.parametrize("name", KILLED)
def test_the_others_end_with_one_message(runs, name):
    killed, rank = runs[name][0], KILLED[name][1]
    assert killed.codes[rank] == -signal.SIGKILL
    assert killed.codes[1 - rank] == 1
    assert killed.errors.count("scalelong-fast: error:") == 1
    assert f"rank {rank} died" in killed.errors
    assert ("GLOO_SOCKET_IFNAME" in killed.errors) is (KILLED[name][2] == 0)  # it may be the network
    assert "Traceback" not in killed.errors


@pytest.mark.parametrize("name", RESUMED)
def test_the_run_goes_on_to_the_same_numbers(runs, name, last_state, history, assert_same):
    (_, resumed), (reference, _) = runs[name], runs["none"]
    assert resumed.codes == [0, 0], resumed.errors
    assert f"Going on from step {KILLED[name][2]} of 10" in resumed.said
    assert "damaged" not in resumed.said
    assert_same(last_state(resumed.out), last_state(reference.out))
    assert history(resumed.out) == history(reference.out)
    for file in ("ema/model.safetensors", "samples.png"):
        assert (resumed.out / file).read_bytes() == (reference.out / file).read_bytes(), file
    leftovers = [path.name for path in (resumed.out / "checkpoints").iterdir() if path.name.startswith(".")]
    assert leftovers == []
