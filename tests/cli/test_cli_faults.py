"""Broken surroundings of a training: a full disk, odd environments, folders in use, checkpoints of other code."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

#: Commands, each with files that may not grow beyond so many bytes: the system itself refuses, in the midst of a write.
#: Each in a child, which spares it the imports; its messages go to a file of its name.
LIMITED = """
import json, os, resource, sys
from scalelong_fast.cli import main
import scalelong_fast.training
codes = {}
for name, (limit, command) in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.path.join(sys.argv[2], name), os.O_WRONLY | os.O_CREAT), 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        code = main(command)
        sys.stderr.flush()
        os._exit(code)
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print("codes", json.dumps(codes))
"""
#: What the disk is full for: options, largest file in bytes, what could not be written. The model's file has 48 kB, a
#: checkpoint's 800 kB; a snapshot comes before either.
FULL = {
    "checkpoint": (["--train.async-save"], 400_000, "checkpoints/step_000000006"),
    "snapshot": (
        ["--train.no-async-save", "--train.ema-profiles", "0.1", "--train.ema-snapshot-every", "3"],
        20_000,
        "posthoc/step_000000003",
    ),
}

SIX = ["--train.steps", "6", "--train.save-every", "2"]
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def steps(out):
    """Steps of which there is a checkpoint under its name."""
    return sorted(int(path.name[5:14]) for path in (out / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def begun(cli, tiny, tmp_path_factory):
    """A run stopped after 2 of 6 steps; to be copied."""
    out = tmp_path_factory.mktemp("begun") / "run"
    result = cli("train", "digits-uvit", *tiny, *SIX, "--train.steps", "2", "--out", out)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="module")
def whole(cli, tiny, tmp_path_factory):
    """The run that nothing happened to; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert cli("train", "digits-uvit", *tiny, *SIX, "--out", out).code == 0
    return out


@pytest.fixture(scope="module")
def full(cli, tiny, tmp_path_factory):
    """Name of :data:`FULL` → (command, folder, exit code, messages), of a run whose first 2 steps had room."""
    folder, commands = tmp_path_factory.mktemp("full"), {}
    for name, (options, limit, _) in FULL.items():
        command = ["train", "digits-uvit", *tiny, *SIX, *options, "--out", str(folder / f"run {name}")]
        assert cli(*command, "--train.steps", "2").code == 0
        commands[name] = (limit, command)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-c", LIMITED, json.dumps(commands), str(folder)]
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.split("codes ")[1])
    return {
        name: (command, folder / f"run {name}", codes[name], (folder / name).read_text())
        for name, (_, command) in commands.items()
    }


@pytest.mark.parametrize("name", FULL)
def test_full_disk(cli, whole, full, name):
    command, out, code, errors = full[name]
    assert code == 2, errors
    assert "Traceback" not in errors
    assert "scalelong-fast: error: out: " in errors
    assert str(out / FULL[name][2]) in errors
    assert "ree some space or make the folder writable, then run the same command again" in errors
    assert steps(out) == [2]
    assert cli(*command).code == 0
    name = "ema/model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"RANK": None}, ["RANK: not set", "WORLD_SIZE", "torchrun"]),
        ({"MASTER_PORT": None, "MASTER_ADDR": None}, ["MASTER_ADDR, MASTER_PORT: not set", "torchrun"]),
        ({"RANK": "zero"}, ["RANK: got 'zero'", "a whole number"]),
        ({"RANK": "-1"}, ["RANK: got '-1'", "a whole number"]),
        ({"RANK": "1"}, ["RANK: got 1", "below WORLD_SIZE = 1"]),
        ({"WORLD_SIZE": "0"}, ["RANK: got 0", "below WORLD_SIZE = 0"]),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, ["LOCAL_RANK: got 4", "below LOCAL_WORLD_SIZE = 4"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT: got 'http'", "65535"]),
        ({"MASTER_PORT": "70000"}, ["MASTER_PORT: got '70000'", "65535"]),
    ],
)
def test_wrong_environments(cli, tiny, tmp_path, monkeypatch, assert_refused, change, texts):
    for name, value in {**TORCHRUN, **change}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    result = cli("train", "digits-uvit", *tiny, "--out", tmp_path / "run")
    assert_refused(result, *texts)
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_come(cli, tiny, tmp_path, monkeypatch, assert_refused):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    for name, value in {**TORCHRUN, "WORLD_SIZE": "2", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    result = cli("train", "digits-uvit", *tiny, "--train.timeout", "1", "--out", tmp_path / "run")
    assert_refused(result, "did not find each other within 1 s", "MASTER_ADDR")


def test_two_trainings_in_a_folder(cli, tiny, begun, tmp_path, assert_refused):
    from scalelong_fast.training import RunFolder

    out = tmp_path / "run"
    shutil.copytree(begun, out)
    first = RunFolder(out)
    first.open_for_writing()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = cli("train", "digits-uvit", *tiny, *SIX, "--out", out)
    assert_refused(result, f"another process is training in {out}", "--out")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    first.close()
    assert cli("train", "digits-uvit", *tiny, *SIX, "--out", out).code == 0


def test_checkpoint_of_an_older_version(cli, tiny, begun, tmp_path, assert_refused):
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    shutil.rmtree(out / "checkpoints" / "step_000000002")
    (out / "checkpoints" / "step_000000002.pt").write_bytes(b"as format 1 was")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = cli("train", "digits-uvit", *tiny, *SIX, "--out", out)
    assert_refused(result, "step_000000002.pt", "format 1", "version", "--out")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
