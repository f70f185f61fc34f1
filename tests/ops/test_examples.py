"""Example arguments: every op has some, and takes them."""

import pytest
import torch

from scalelong_fast import ops
from scalelong_fast.errors import UserError
from scalelong_fast.ops import explain_plan, force_plan
from scalelong_fast.ops.examples import SHAPES, example_arguments, example_gradients
from scalelong_fast.ops.plans import _OWNERS

#: A shape of each kind.
KINDS = {
    "[B, N]": (2, 5),
    "[B, L, D]": (2, 5, 8),
    "[B, C, *spatial]": (2, 6, 3, 3),
    "[B, C_x, C_skip, *spatial]": (2, 6, 4, 3, 3),
}
CASES = [(op, shape) for op, kinds in SHAPES.items() for kind, shape in KINDS.items() if kind in kinds]


def test_every_op_has_examples():
    assert set(SHAPES) == set(_OWNERS)


@pytest.mark.parametrize(("op", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_op_takes_them_and_every_tensor_gets_a_gradient(op, shape, dtype):
    args, kwargs = example = example_arguments(op, shape, dtype, "cpu")
    assert explain_plan(op, *args, **kwargs).op == op
    with force_plan("eager"):
        outputs = getattr(ops, op)(*args, **kwargs)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    outputs = tuple(out for out in outputs if out.requires_grad)
    assert len(example.tensors()) == sum(isinstance(a, torch.Tensor) for a in args)
    for grad in torch.autograd.grad(outputs, example.tensors(), example_gradients(outputs)):
        assert torch.isfinite(grad).all()
        assert grad.any()


@pytest.mark.parametrize("op", SHAPES)
def test_the_same_seed_gives_the_same_numbers(op):
    shape = dict(CASES)[op]
    first, second, third = (example_arguments(op, shape, torch.float32, "cpu", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first.tensors(), third.tensors(), strict=True))


def test_channels_last():
    x, skip, kappa = example_arguments("scale_concat", (2, 6, 4, 3, 3), torch.float32, "cpu", channels_last=True).args
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert skip.is_contiguous(memory_format=torch.channels_last)
    assert kappa.shape == (2, 4)


def test_a_stream_of_another_dtype():
    args, kwargs = example_arguments(
        "add_layer_norm_gap", (2, 5, 8), torch.bfloat16, "cpu", stream_dtype=torch.float32
    )  # fmt: skip
    y, mean, total, skip = ops.add_layer_norm_gap(*args, **kwargs)
    assert [t.dtype for t in (y, mean, total, skip)] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert args[1].dtype == torch.bfloat16


def test_the_mean_may_be_given():
    args, kwargs = example_arguments("ls_skip_linear", (2, 5, 8), torch.float32, "cpu", pooled=True)
    torch.testing.assert_close(kwargs["pooled"], args[1].mean(-1))


def test_the_reduction_sets_the_gates_width():
    assert example_arguments("se_gate", (2, 20), torch.float32, "cpu", reduction=4).args[1].shape == (5, 20)


@pytest.mark.parametrize(
    ("op", "shape", "options", "message"),
    [
        ("se_gates", (2, 5), {}, "op: got 'se_gates'"),
        ("se_gate", (2, 5, 8), {}, r"shape: got \[2, 5, 8\], expected \[B, N\] for se_gate"),
        ("layer_norm_gap", (2, 5), {}, r"expected \[B, L, D\]"),
        ("scale_concat", (2, 0, 8), {}, "all at least 1"),
        ("ls_skip_linear", (2, 6, 4, 3, 3), {}, "for ls_skip_linear"),
        ("scale_concat", (2, 5, 8), {"channels_last": True}, "channels_last: got True"),
    ],
)
def test_wrong_shapes_are_named(op, shape, options, message):
    with pytest.raises(UserError, match=message):
        example_arguments(op, shape, torch.float32, "cpu", **options)
