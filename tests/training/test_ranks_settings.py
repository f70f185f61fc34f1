"""What is refused before a run on several processes starts, and what the scripts for clusters are made of."""

import subprocess
from pathlib import Path

import pytest

from scalelong_fast.errors import UserError
from scalelong_fast.training.config import TrainConfig
from scalelong_fast.training.parallel import check_batch, strategy
from scalelong_fast.training.ranks import Ranks, connect, environment

DOCS = Path(__file__).parents[2] / "docs"
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def torchrun(monkeypatch):
    """``torchrun(RANK="1", …)``: exactly these variables."""

    def setenv(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return setenv


ALL = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "x",
    "MASTER_PORT": "1",
}


def test_torchruns_environment(torchrun):
    torchrun(**ALL)
    assert environment() == {"RANK": 3, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "x"}])
def test_a_run_of_one_process(torchrun, given):
    torchrun(**given)
    with connect(TrainConfig(parallel="fsdp")) as ranks:
        assert ranks == Ranks()
        assert ranks.is_main
        assert not ranks.several
        assert strategy(TrainConfig(parallel="fsdp"), ranks) == "none"
        assert ranks.gather("x") == ["x"]
        assert ranks.broadcast("x") == "x"
        assert ranks.any(True)
        assert not ranks.any(False)


def test_half_an_environment(torchrun):
    torchrun(RANK="0", WORLD_SIZE="2")
    with pytest.raises(UserError, match=r"^MASTER_ADDR, MASTER_PORT: not set .* RANK and WORLD_SIZE are\. .*torchrun"):
        environment()


def test_words_for_numbers(torchrun):
    torchrun(**{**ALL, "RANK": "first"})
    with pytest.raises(UserError, match=r"^RANK: got 'first', expected a whole number"):
        environment()


@pytest.mark.parametrize(("batch", "world", "parts", "fits"), [(8, 4, 2, True), (8, 3, 1, False), (8, 4, 4, False)])
def test_the_batch_is_shared_equally(batch, world, parts, fits):
    train = TrainConfig(batch_size=batch, accumulate=parts)
    if fits:
        check_batch(train, Ranks(world=world))
        return
    expected = rf"^train\.batch_size: got {batch}, expected a multiple of {world * parts} = {world} processes × {parts}"
    with pytest.raises(UserError, match=expected):
        check_batch(train, Ranks(world=world))


@pytest.mark.parametrize(("field", "value"), [("parallel", "zero"), ("accumulate", 0), ("timeout", 0.0)])
def test_settings_are_checked(field, value):
    with pytest.raises(UserError, match=rf"^train\.{field}: got {value!r}"):
        TrainConfig(**{field: value})


def test_several_processes_take_the_gpus_in_order(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    several = Ranks(rank=5, world=8, local_rank=1, local_world=4, control=object())
    assert several.device_name("auto") == several.device_name("cuda") == "cuda:1"
    assert several.device_name("cpu") == "cpu"
    with pytest.raises(
        UserError, match=r"^train\.device: got 'cuda:0', expected auto, cpu or cuda in a run of several"
    ):
        several.device_name("cuda:0")
    several.local_rank = 2
    with pytest.raises(UserError, match=r"^train\.device: 4 processes on this machine, but 2 GPUs are visible"):
        several.device_name("auto")


def test_a_gpu_set_apart_for_each_process_is_refused_with_its_usual_reason(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    first, second = (Ranks(rank=n, world=4, local_rank=n, local_world=4, control=object()) for n in (0, 1))
    assert first.device_name("auto") == "cuda:0"
    with pytest.raises(UserError, match=r"sees a single GPU, .*--gpus-per-node instead of --gpus-per-task"):
        second.device_name("auto")


@pytest.mark.parametrize("name", ["slurm.sh", "slurm-torchrun.sh"])
def test_the_scripts_for_slurm_are_sound(name):
    done = subprocess.run(["bash", "-n", str(DOCS / name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
