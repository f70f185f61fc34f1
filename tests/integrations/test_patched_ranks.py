"""Patched networks on several processes: the gates get gradients, and all gradients are those of one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASES = [
    "ddp", "ddp, graph kept", "ddp, deferred", "fsdp", "fsdp, deferred", "fsdp, gates apart",
    "fsdp, gates apart, deferred", "fsdp of a copy",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    driver = Path(__file__).with_name("patched_ranks_driver.py")
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(driver), str(folder)],
        capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_gradients(results, case):
    assert results[case]["difference"] < 1e-4
    assert results[case]["gates"] == 1.0


def test_every_case_ran(results):
    assert sorted(results) == sorted(CASES)
