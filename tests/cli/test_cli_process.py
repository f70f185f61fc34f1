"""The command in a process of its own: exit codes and signals as a shell sees them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from scalelong_fast.training.checkpoint import CheckpointFolder

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
PATIENCE = 120.0


@pytest.fixture
def start():
    """``start(*arguments)``: the command in the background, killed after the test if it still runs."""
    processes = []

    def run(*arguments):
        command = [sys.executable, "-m", "scalelong_fast.cli", *map(str, arguments)]
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_until(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_running_command_keeps_others_out_and_a_signal_stops_it_to_go_on_later(
    start, cli, tiny, tmp_path, assert_refused
):
    endless = ["--train.steps", "1000000", "--train.save-every", "1000000", "--train.compile", "off"]
    runs = {number: tmp_path / number.name for number in (signal.SIGTERM, signal.SIGINT)}
    processes = {number: start("train", "digits-uvit", *tiny, *endless, "--out", out) for number, out in runs.items()}
    for number, process in processes.items():
        metrics = runs[number] / "metrics.jsonl"
        wait_until(lambda metrics=metrics: metrics.is_file() and metrics.read_text().count("\n") >= 2, process)
        second = cli("train", "digits-uvit", *tiny, "--out", runs[number])
        assert_refused(second, f"out: another process is training in {runs[number]}")
        process.send_signal(number)
    for number, process in processes.items():
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        (step,) = CheckpointFolder(runs[number] / "checkpoints").steps()
        assert f"{number.name}: saved step {step}. Run the same command to go on from there." in out
        result = cli("train", "digits-uvit", *tiny, "--train.steps", step + 1, "--out", runs[number])
        assert result.code == 0, result.err
        assert f"Going on from step {step} of {step + 1}" in result.out


def test_bad_input_is_exit_code_2_and_one_line(start, tmp_path):
    process = start("train", "digits-uvit", "--model.kappa", "-1", "--out", tmp_path / "run")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("scalelong-fast: error: kappa: got -1")
