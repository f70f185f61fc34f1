"""The model of bytes and FLOP against figures derived by hand, and the floor that is made of it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.floors import Limits, Product, passes, total_bytes, total_flop
from benchmarks.op_cases import ONE_IMAGE_OPS, OPS, UNET_OPS, Case

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = (128, 257, 512)
ELEMENTS = 128 * 257 * 512

#: Bytes per element of one (B, L, D) feature, in bf16: (op, pooled) to (forward, backward). Backward without the
#: joining of the skip's gradient with the next block's, which is 6 more in eager and 2 more in the joined LayerNorm.
BY_HAND = {
    ("scale_concat", False): (8, 6),  # x, s → cat; g, s → ds
    ("ls_scale_concat", False): (10, 8),  # s; x, s → cat; g, s; g → ds
    ("scale_concat_linear", False): (6, 14),  # x, s → y; dy, s → dx, ds; dy, x, s
    ("ls_skip_linear", False): (8, 18),  # s; x, s → y; the same, and ds → ds
    ("ls_skip_linear", True): (6, 14),
    ("layer_norm_gap", False): (4, 6),  # x → y; dy, x → dx
    ("add_layer_norm_gap", False): (8, 10),  # x, branch → s, y; dy, s, two gradients of s → dx
}


@pytest.mark.parametrize(("op", "pooled"), BY_HAND)
def test_bytes_per_element(op, pooled):
    case = Case(op, ROWS, BF16, pooled=pooled)
    forward, backward = BY_HAND[op, pooled]
    # What is left over: weights, κ's, statistics.
    assert forward <= total_bytes(case, "fwd") / ELEMENTS < forward + 0.15
    assert backward <= total_bytes(case, "bwd") / ELEMENTS < backward + 0.25
    assert total_bytes(case, "fwd_bwd") == total_bytes(case, "fwd") + total_bytes(case, "bwd")


def test_a_float32_stream_moves_four_bytes_where_the_stream_is_touched():
    case = Case("ls_skip_linear", ROWS, BF16, stream=FP32)
    assert total_bytes(case, "fwd") / ELEMENTS == pytest.approx(4 + 4 + 4 + 2, abs=0.15)
    norm = Case("add_layer_norm_gap", ROWS, BF16, stream=FP32)  # x, branch → s, its bf16 copy, y
    assert total_bytes(norm, "fwd") / ELEMENTS == pytest.approx(4 + 2 + 4 + 2 + 2, abs=0.15)
    # dy, s, two gradients of s (the skip's in bf16) → dx, and the branch's in bf16
    assert total_bytes(norm, "bwd") / ELEMENTS == pytest.approx(2 + 4 + 4 + 2 + 4 + 2, abs=0.15)


@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_bytes_of_images(layout):
    case = Case("scale_concat", (128, 256, 128, 16, 16), BF16, layout)
    pixels = 128 * 16 * 16
    assert total_bytes(case, "fwd") == 2 * 2 * pixels * (256 + 128) + 4 * 128 * 128
    assert total_bytes(case, "bwd") == 3 * 2 * pixels * 128 + 8 * 128 * 128


#: Bytes per pixel in bf16 as multiples of (C, C2, C_out), C the channels of the concat and C2 those of the skip;
#: forward and backward, of (op, pooled, raw).
BY_HAND_OF_UNET = {
    ("scale_concat_group_norm", False, False): ((6, 0, 0), (10, 0, 0)),  # x, s; x, s → y; dy, x, s; dy, x, s → dx, ds
    ("scale_concat_group_norm", True, False): ((6, -2, 0), (10, 0, 0)),  # of s nothing but its statistics
    ("scale_concat_group_norm", True, True): ((8, -2, 0), (12, 2, 0)),  # → concat too; its gradient, of s twice
    ("scale_concat_conv1x1", False, False): ((2, 0, 2), (4, 2, 4)),  # x, s → y; dy, s → dx, ds; dy, x, s
}


@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize(("op", "pooled", "raw"), BY_HAND_OF_UNET)
def test_bytes_of_a_decoder_block(op, pooled, raw, layout):
    batch, channels_x, channels_skip = 64, 320, 160
    case = Case(op, (batch, channels_x, channels_skip, 64, 64), BF16, layout, pooled=pooled, raw=raw)
    for direction, (of_all, of_skip, of_out) in zip(("fwd", "bwd"), BY_HAND_OF_UNET[op, pooled, raw], strict=True):
        pixel = of_all * (channels_x + channels_skip) + of_skip * channels_skip + of_out * channels_x
        # What is left over: weights, κ's, statistics.
        assert pixel <= total_bytes(case, direction) / (batch * 64 * 64) < 1.01 * pixel


def test_bytes_of_one_image():
    shape, elements = (64, 160, 64, 64), 64 * 160 * 64 * 64
    norm, stats = Case("group_norm_gap", shape, BF16, "pixels"), Case("channel_stats", shape, BF16, "pixels")
    assert total_bytes(norm, "fwd") / elements == pytest.approx(6, abs=0.01)  # x; x → y
    assert total_bytes(norm, "bwd") / elements == pytest.approx(10, abs=0.01)  # dy, x; dy, x → dx
    assert total_bytes(stats, "fwd") / elements == pytest.approx(2, abs=0.01)
    assert total_bytes(stats, "bwd") == 64 * 160 * (4 + 2), "an expanded tensor fills no memory"


@pytest.mark.parametrize("op", ["se_gate", "scale_concat_linear", "ls_skip_linear", "scale_concat_conv1x1"])
def test_flop_are_those_that_pytorch_counts(op):
    shape = {"se_gate": (3, 37), "scale_concat_conv1x1": (3, 20, 12, 5, 7)}.get(op, (3, 37, 20))
    case = Case(op, shape, FP32, "planes" if op == "scale_concat_conv1x1" else "rows")
    example = case.example(torch.device("cpu"))
    with FlopCounterMode(display=False) as forward:
        outputs = case.reference()(*example.args, **example.kwargs)
    outputs = case.grade(outputs if isinstance(outputs, tuple) else (outputs,))
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad([o.sum() for o in outputs], example.tensors())
    assert total_flop(case, "fwd") == forward.get_total_flops()
    assert total_flop(case, "bwd") == backward.get_total_flops()


def test_every_op_has_a_model():
    for op in OPS:
        shape = (4, 33) if op == "se_gate" else (4, 33, 16)
        if op in UNET_OPS:
            shape = (4, 16, 3, 5) if op in ONE_IMAGE_OPS else (4, 16, 8, 3, 5)
        case = Case(op, shape, FP32, "pixels" if op in UNET_OPS else "rows")
        for direction in ("fwd", "bwd"):
            assert all(step.bytes > 0 for step in passes(case, direction))


def test_a_pass_takes_the_longer_of_its_two_times():
    limits = object.__new__(Limits)
    limits.ceilings = {"copy_gb_s": 100.0}
    case = Case("ls_skip_linear", (2, 30, 16), FP32)
    pool, gate, product = passes(case, "fwd")
    limits.rate = lambda shape, dtype: 1e6
    assert product.product == Product("nt", 60, 16, 32)
    slow = product.flop / 1e6
    assert limits.floor(case, "fwd") == pytest.approx((pool.bytes + gate.bytes) / 1e11 + slow)
    limits.rate = lambda shape, dtype: 1e18
    assert limits.floor(case, "fwd") == pytest.approx((pool.bytes + gate.bytes + product.bytes) / 1e11)


def test_rates_are_measured_once_for_each_shape_and_written_down():
    limits = Limits(torch.device("cpu"), seconds=0.005)
    for kind in ("nt", "nn", "tn"):
        product = Product(kind, 8, 12, 16)
        assert limits.rate(product, FP32) == limits.rate(product, FP32) > 0
    shapes = limits.as_json()["products"]
    assert [(shape["kind"], shape["m_n_k"]) for shape in shapes] == [(k, [8, 12, 16]) for k in ("nt", "nn", "tn")]
    assert limits.as_json()["copy_gb_s"] > 0
