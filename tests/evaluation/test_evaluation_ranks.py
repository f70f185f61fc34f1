"""Several processes: shares, gathered features, merged moments, and the same result as of one."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from scalelong_fast.errors import UserError
from scalelong_fast.evaluation.sharing import own_batches
from scalelong_fast.evaluation.steps import check_same_weights
from scalelong_fast.training.ranks import Ranks

#: Features of two processes, once one of them without any: against those of one process.
SCRIPT = """
import pathlib
import sys

import torch
from scalelong_fast.evaluation import RunningMoments, moments_of, pool
from scalelong_fast.evaluation.sharing import own_batches
from scalelong_fast.training.config import TrainConfig
from scalelong_fast.training.ranks import connect

features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 1e4
with connect(TrainConfig(device="cpu")) as ranks:
    assert ranks.world == 2
    for batch_size, pool.KEPT in ((7, 50), (50, 50), (7, 20)):
        running, kept = RunningMoments(4), pool.FeaturePool(50)
        for indices in own_batches(50, batch_size, ranks):
            running.add(features[indices])
            kept.add(indices, features[indices])
        running.merge_across_ranks()
        moments, whole = running.result(), moments_of(features)
        assert moments.count == 50
        torch.testing.assert_close(moments.mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(moments.covariance, whole.covariance, rtol=1e-9, atol=1e-12)
        gathered = kept.gather(ranks)
        assert (gathered is None) if not ranks.is_main else torch.equal(gathered, features[kept.images])
    pathlib.Path(sys.argv[1], f"agreed-{ranks.rank}").touch()
"""


def torchrun(processes, *arguments):
    port = 20000 + os.getpid() % 20000
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", port]
    return subprocess.run(
        [str(part) for part in (*command, *arguments)], env=env, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize(("total", "batch_size", "world"), [(50, 7, 3), (50, 50, 2), (1, 4, 3), (0, 4, 2), (12, 4, 1)])
def test_shares_are_all_images_once(total, batch_size, world):
    shares = [list(own_batches(total, batch_size, Ranks(rank, world))) for rank in range(world)]
    everything = [index for share in shares for batch in share for index in batch.tolist()]
    assert sorted(everything) == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_that_read_different_weights_are_refused():
    class Two(Ranks):
        def gather(self, value):
            return [value, "newer"]

    with pytest.raises(UserError, match="RUN: the processes read different weights"):
        check_same_weights("older", Two(0, 2))
    check_same_weights("older", Ranks())


def test_features_and_moments_of_two_processes(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = torchrun(2, tmp_path / "script.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("agreed-*")) == ["agreed-0", "agreed-1"]


@pytest.mark.usefixtures("digits")
def test_two_processes_give_the_result_of_one(cli, trained, tmp_path):
    """The command itself, the reference measured by both and the kernel distance computed by one."""
    pytest.importorskip("torchmetrics")
    run = shutil.copytree(trained, tmp_path / "run")
    options = ("evaluate", run, "--fid", "50", "--batch-size", "8", "--labels", "random", "--kid", "--device", "cpu")
    alone = cli(*options)
    assert alone.code == 0, alone.err
    both = torchrun(2, "-m", "scalelong_fast.cli", *options)
    assert both.returncode == 0, both.stderr[-3000:]
    assert both.stdout.count("Fréchet distance") == 1
    one, two = json.loads((run / "evaluation.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["fid"] == pytest.approx(one["fid"], rel=1e-6)
    assert two["kid"]["mean"] == pytest.approx(one["kid"]["mean"], rel=1e-5)
    for key in ("extractor", "reference", "n"):
        assert one[key] == two[key]
