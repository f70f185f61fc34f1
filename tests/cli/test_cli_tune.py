"""``scalelong-fast tune``."""

import json

import pytest

from scalelong_fast.cli.tune import TuneArguments, shape_for, shapes_to_tune
from scalelong_fast.ops.tables import RULES

QUICK = ["--device", "cpu", "--rounds", "1", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SCALELONG_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = dict(RULES)
    yield tmp_path / "plans"
    RULES.clear()
    RULES.update(before)


def test_times_the_plans_and_stores_the_fastest(cli, cache):
    result = cli("tune", "--op", "layer_norm_gap", "scale_concat", "--shape", "2,6,8", "2,4,6,3,3", *QUICK)
    assert result.code == 0, result.err
    (file,) = cache.iterdir()
    plans = json.loads(file.read_text())["plans"]
    assert {op: len(entries) for op, entries in plans.items()} == {"layer_norm_gap": 1, "scale_concat": 2}
    assert all(len(entry["ms"]) >= 2 for entries in plans.values() for entry in entries)
    assert str(file) in result.out.replace("\n", "")
    for text in ("2×6×8", "2×4×6×3×3", "native", "not timed: triton"):
        assert text in result.out


def test_all_ops_by_default(cli, cache):
    result = cli("tune", "--shape", "2,6,8", *QUICK)
    assert result.code == 0, result.err
    for op in ("se_gate", "scale_concat_linear", "ls_skip_linear", "ls_scale_concat", "add_layer_norm_gap"):
        assert op in result.out


def test_default_shapes_are_those_of_training():
    import torch

    digits = ((64, 18, 64), 4)
    assert shapes_to_tune(TuneArguments(), torch.device("cpu")) == [digits]
    on_gpu = shapes_to_tune(TuneArguments(), torch.device("cuda"))
    assert digits in on_gpu
    assert ((128, 257, 512), 16) in on_gpu
    assert len(set(on_gpu)) == len(on_gpu)


def test_shapes_that_do_not_concern_an_op():
    assert shape_for("se_gate", (2, 6, 8)) == (2, 6)
    assert shape_for("se_gate", (2, 4, 6, 3, 3)) == (2, 6)
    assert shape_for("ls_skip_linear", (2, 4, 6, 3, 3)) is None
    assert shape_for("ls_scale_concat", (2, 4, 6, 3, 3)) == (2, 4, 6, 3, 3)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--op", "layer_norm"), ("--op: got 'layer_norm'", "'layer_norm_gap'")),
        (("--shape", "2,6"), ("--shape: got '2,6'", "128,257,512")),
        (("--shape", "2,0,8"), ("--shape: got '2,0,8'",)),
        (("--shape", "a,b,c"), ("--shape: got 'a,b,c'",)),
        (("--dtype", "fp8"), ("--dtype: got 'fp8'", "bf16")),
        (("--stream", "auto"), ("--stream: got 'auto'",)),
        (("--rounds", "0"), ("--rounds: got 0",)),
        (("--reduction", "0"), ("--reduction: got 0",)),
        (("--device", "tpu"), ("--device: got 'tpu'",)),
        (("--op", "layer_norm_gap", "--shape", "2,4,6,3,3"), ("none of the ops",)),
    ],
)
def test_wrong_options(cli, assert_refused, options, texts):
    assert_refused(cli("tune", *options), *texts)


def test_the_interpreter_is_refused(cli, assert_refused, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert_refused(cli("tune", "--shape", "2,6,8", *QUICK), "TRITON_INTERPRET=1")
