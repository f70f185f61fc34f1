"""``scalelong-fast plan``."""

import json

import pytest

QUICK = ["--model", "uvit_digits", "--recompute", "none"]


def test_prints_ways_memory_time_and_assumptions(cli):
    result = cli("plan", *QUICK, "--gpus", "16", "--batch", "1024", "--gpu", "h100")
    assert result.code == 0, result.err
    text = " ".join(result.out.split())
    for part in ("batch 1,024 on 16 × NVIDIA H100", "64 a GPU", "ddp", "fsdp", "hsdp", "Fastest that fits", "images/s"):
        assert part in text
    for part in ("moments", "activations and work", "forward", "exchange that nothing hides", "assumed", "data sheet"):
        assert part in text
    assert "for 3,000 steps" in text


def test_json_says_the_same_to_programs(cli):
    result = cli("plan", *QUICK[1:], "--gpus", "2", "--batch", "64", "--accumulate", "2", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["request"]["batch"] == 64
    assert plan["request"]["accumulate"] == 2
    assert [option["parallel"] for option in plan["options"]] == ["ddp", "fsdp"]
    for option in plan["options"]:
        assert option["bytes"] == sum(option["memory"].values())
        assert option["fits"] == (option["bytes"] <= option["limit"])
    assert plan["best"] in plan["options"]
    assert plan["assumptions"]["gpu"]["name"] == "h200"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["uvit_digit"], ["--model: got 'uvit_digit'"]),
        (["--model", "uvit_digit"], ["--model: got 'uvit_digit'", "'uvit_digits'"]),
        ([*QUICK, "--gpu", "h20"], ["--gpu: got 'h20'", "'h200'"]),
        ([*QUICK, "--gpus", "12"], ["--gpus: got 12", "--gpus-per-node = 8"]),
        ([*QUICK, "--gpus", "4", "--batch", "6"], ["--batch: got 6", "a multiple of 4"]),
        ([*QUICK, "--parallel", "tensor"], ["--parallel: got 'tensor'"]),
        (["--model", "uvit_h2"], ["--batch: got None", "Give --batch"]),
    ],
)
def test_bad_requests_are_explained(cli, assert_refused, options, parts):
    assert_refused(cli("plan", *options), *parts)
