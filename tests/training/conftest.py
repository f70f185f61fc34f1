"""Tiny runs on the digits, and comparisons that several files share."""

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console

import scalelong_fast.training.outputs as outputs
from scalelong_fast.data import ImageDataset
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.models import build_model
from scalelong_fast.training import Trainer, get_preset
from scalelong_fast.training.checkpoint import CheckpointFolder
from scalelong_fast.training.hardware import resolve_execution
from scalelong_fast.training.metrics import read_metrics
from scalelong_fast.training.step import TrainStep

#: Each preset's model at toy size.
TINY_MODEL = {
    "digits-uvit": {"model.embed_dim": 16, "model.depth": 2, "model.num_heads": 2},
    "digits-unet": {
        "model.model_channels": 8,
        "model.num_res_blocks": 1,
        "model.num_groups": 4,
        "model.num_heads": 2,
    },
}
TINY = {
    "train.steps": 10,
    "train.batch_size": 8,
    "train.warmup_steps": 3,
    "train.decay_steps": 12,
    "train.ema_decay": 0.9,
    "train.log_every": 3,
    "train.save_every": 4,
    "train.device": "cpu",
    "train.precision": "fp32",
    "train.compile": "off",
    "train.tensorboard": False,
    "train.async_save": False,
    "sample.sampler": "ddim",
    "sample.steps": 1,
    "sample.grid": 1,
}


@pytest.fixture(scope="session")
def tiny():
    """``tiny({"train.steps": 4})``: the digits preset (of the U-ViT) at toy size, with dotted overrides."""

    def build(overrides=None, preset="digits-uvit"):
        sections = {}
        for name, value in {**TINY_MODEL[preset], **TINY, **(overrides or {})}.items():
            section, field = name.split(".")
            sections.setdefault(section, {})[field] = value
        config = get_preset(preset)
        replaced = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
        return dataclasses.replace(config, **replaced)

    return build


@pytest.fixture(scope="session")
def unet(tiny):
    """``unet({"model.dropout": 0.1})``: a toy run of a UNet."""
    return lambda overrides=None: tiny(overrides, preset="digits-unet")


@pytest.fixture(scope="session")
def train():
    """``train(config, out)``: run a Trainer and return (step reached, what it said).

    The picture of the loss curve takes longer than such a run and is an empty file, unless ``curve`` is set.
    """

    def run(config, out, name="digits-uvit", curve=False):
        said = io.StringIO()
        draw = outputs.save_loss_curve if curve else lambda path, rows, title: path.write_bytes(b"")
        with mock.patch.object(outputs, "save_loss_curve", draw):
            reached = Trainer(config, out, name, Console(file=said, width=80)).run()
        return reached, said.getvalue()

    return run


@pytest.fixture(scope="session")
def last_state():
    """``last_state(out)``: (step, state) of the newest checkpoint of a run folder."""

    def read(out):
        folder = CheckpointFolder(out / "checkpoints")
        step = folder.steps()[-1]
        return step, folder.load(step)

    return read


@pytest.fixture(scope="session")
def assert_same():
    """Assert that two nests of dicts, lists and tensors agree bit for bit."""

    def compare(a, b, where="state"):
        assert type(a) is type(b), where
        if isinstance(a, dict):
            assert list(a) == list(b), where
            for key in a:
                compare(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), where
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                compare(x, y, f"{where}[{index}]")
        elif isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, where
            assert torch.equal(a, b), where
        else:
            assert a == b, where

    return compare


@pytest.fixture(scope="session")
def history():
    """``history(out)``: (step, loss, lr) of every row of ``metrics.jsonl``, partial rows marked."""

    def rows(out):
        return [
            (row["step"], row["loss"], row["lr"], row.get("partial", False))
            for row in read_metrics(out / "metrics.jsonl")
        ]

    return rows


@pytest.fixture(scope="session")
def tree():
    """``tree(folder)``: every file below a folder with its bytes, to see that nothing changed."""

    def read(folder):
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read


@pytest.fixture(scope="session")
def make_step():
    """``make_step(config)``: a TrainStep on a fresh model, always from the same weights."""

    def build(config, execution=None):
        torch.manual_seed(config.train.seed)
        model = build_model(config.model)
        return TrainStep(
            model, create_schedule(config.diffusion.schedule), config, execution or resolve_execution(config.train)
        )

    return build


@pytest.fixture(scope="session")
def toy_images():
    """97 images of 1×8×8 whose pixels say which image they are (and which way round), with labels 0 … 9."""
    count = 97
    images = torch.arange(8).repeat(count, 1, 8, 1) + torch.arange(count).view(-1, 1, 1, 1)
    labels = torch.arange(count) % 10
    return ImageDataset("toy", images.to(torch.uint8).contiguous(), labels, 10, tuple("0123456789"))


@pytest.fixture(scope="session")
def python():
    """``python(code, *args)``: run code in a process of its own, with this process's number of threads."""

    def run(code, *args):
        env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture
def alone(monkeypatch):
    """torchrun's environment for a run of one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**values, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))


#: The digits' toy run as arguments of the command line.
RANKS_RUN = (
    "digits-uvit --model.embed-dim 16 --model.depth 2 --model.num-heads 2 --train.steps 10 --train.batch-size 8 "
    "--train.warmup-steps 3 --train.decay-steps 12 --train.ema-decay 0.9 --train.log-every 3 --train.save-every 4 "
    "--train.device cpu --train.precision fp32 --train.compile off --train.no-tensorboard --train.timeout 20 "
    "--sample.sampler ddim --sample.steps 1 --sample.grid 1"
)


@dataclasses.dataclass
class Ended:
    """How a run on several processes ended: exit codes by rank, and what all of them printed."""

    out: Path
    codes: list[int]
    said: str
    errors: str


@pytest.fixture(scope="session")
def ranks_driver(tmp_path_factory):
    """The process of ``ranks_driver.py``, which has all imports behind it."""
    # PyTorch's own log of connections that the other end has closed, which depends on who ends first, is left out.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    said = tmp_path_factory.mktemp("driver") / "stderr"
    with open(said, "w") as errors:
        driver = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ranks_driver.py"))],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

    def ask(plan):
        print(json.dumps(plan), file=driver.stdin, flush=True)
        answer = driver.stdout.readline()
        assert answer, said.read_text()
        return json.loads(answer)

    yield ask
    driver.communicate()


@pytest.fixture(scope="session")
def on_ranks(ranks_driver, tmp_path_factory):
    """``on_ranks([{"world": 2, "arguments": "--train.parallel fsdp", "out": folder}, …])``: a list of :class:`Ended`.

    ``world`` 0 is a run without torchrun's environment; ``sabotage`` is code that every rank runs before.
    """

    def run(runs):
        plan, logs = [], []
        for entry in runs:
            logs.append(tmp_path_factory.mktemp("logs"))
            base = entry.get("run", RANKS_RUN)
            arguments = [*base.split(), *entry.get("arguments", "").split(), "--out", str(entry["out"])]
            plan.append({**entry, "arguments": arguments, "out": str(entry["out"]), "logs": str(logs[-1])})
        endings = ranks_driver(plan)
        texts = [["".join(p.read_text() for p in sorted(log.glob(f"{n}.*"))) for n in ("out", "err")] for log in logs]
        return [
            Ended(Path(entry["out"]), codes, said, errors)
            for entry, codes, (said, errors) in zip(runs, endings, texts, strict=True)
        ]

    return run
