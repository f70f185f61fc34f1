"""Judging a digits run: one result file keeps the last run of each network."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import digits, report
from scalelong_fast.data import load_images
from scalelong_fast.errors import UserError
from scalelong_fast.training import Trainer, get_preset

MODEL = {
    "digits-uvit": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "digits-unet": {"model_channels": 8, "num_res_blocks": 1, "num_groups": 4},
}


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    measured = digits.environment.ceilings
    monkeypatch.setattr(digits.environment, "ceilings", lambda device: measured(device, seconds=0.01))


@pytest.fixture(scope="module", params=MODEL)
def run(request, tmp_path_factory):
    """(preset, folder of a run of two steps)."""
    preset = get_preset(request.param)
    config = dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, **MODEL[request.param]),
        train=dataclasses.replace(
            preset.train, steps=2, batch_size=8, log_every=1, device="cpu", precision="fp32", tensorboard=False
        ),
        sample=dataclasses.replace(preset.sample, steps=1, grid=1),
    )
    out = tmp_path_factory.mktemp(request.param)
    Trainer(config, out, request.param).run()
    return request.param, out


def record(model, **changes):
    return {"model": model, "variant": "ls", "steps": 7, **changes}


def judged(out, *before, environment=None):
    """Records of the result file after ``digits.main`` wrote it, with ``before`` in it."""
    if before:
        where = digits.environment.describe(digits.torch.device("cpu")) | {"date": "2000-01-01"} | (environment or {})
        out.parent.mkdir(parents=True)
        out.write_text(json.dumps({"environment": where, "ceilings": {}, "records": list(before)}))
    return lambda run: (digits.main([str(run), "--out", str(out)]), json.loads(out.read_text())["records"])


def test_a_record_says_what_was_judged(run, tmp_path):
    preset, folder = run
    code, (found,) = judged(tmp_path / "results" / "machine" / "digits.json")(folder)
    assert code == 0
    model = preset.removeprefix("digits-") + "_digits"
    assert (found["model"], found["variant"], found["steps"], found["guidance"]) == (model, "ls", 2, 2.0)
    assert found["shape"] == [200, 8, 8, 1]
    assert 0 <= found["recognised"] <= 1
    assert found["nearest_ratio"] > 0
    assert f"scalelong_fast/models/{model.removesuffix('_digits')}.py" in found["sources"]
    assert found["source_sha256"] == digits.environment.source_hash(found["sources"])
    assert f"| `{model}` | ls | 2 |" in report.render("digits", tmp_path / "results")


def test_the_other_networks_record_is_kept_and_the_own_one_replaced(run, tmp_path):
    _, records = judged(tmp_path / "m" / "digits.json", record("unet_digits"), record("uvit_digits"))(run[1])
    assert [found["model"] for found in records] == ["uvit_digits", "unet_digits"]
    assert [found["steps"] for found in records] == ([2, 7] if run[0] == "digits-uvit" else [7, 2])


@pytest.mark.parametrize("other", [{"cpu_model": "another"}, {"torch": "1.0"}])
def test_records_of_another_machine_or_version_are_not_mixed_in(run, tmp_path, other):
    before = [record("unet_digits"), record("uvit_digits")]
    _, records = judged(tmp_path / "m" / "digits.json", *before, environment=other)(run[1])
    assert [found["steps"] for found in records] == [2]


def test_a_torn_result_file_is_written_anew(run, tmp_path):
    out = tmp_path / "digits.json"
    out.write_text('{"records": [')
    assert digits.main([str(run[1]), "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["records"]) == 1


def test_real_digits_are_recognised_and_copies_are_seen():
    dataset = load_images("digits")
    images = dataset.images[:200].permute(0, 2, 3, 1).contiguous().numpy()
    labels = dataset.labels[:200].numpy()
    copies = digits.judge(images, labels)
    assert copies["recognised"] > 0.99
    assert copies["nearest_ratio"] < 0.05
    noise = digits.judge(np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8), labels)
    assert noise["recognised"] < 0.3
    assert noise["nearest_ratio"] > 1.5


def test_a_run_on_other_images_is_refused(run, tmp_path):
    (tmp_path / "config.json").write_text(
        (run[1] / "config.json").read_text().replace('"name": "digits"', '"name": "cifar10"')
    )
    with pytest.raises(UserError, match="trained on 'cifar10'"):
        digits.main([str(tmp_path)])
