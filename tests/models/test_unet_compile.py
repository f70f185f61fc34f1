"""One graph of a UNet, forward and backward."""

import pytest
import torch

from scalelong_fast.models import UNet
from scalelong_fast.ops import force_plan


def loss_and_gradients(model, batch):
    model.zero_grad()
    out = model(*batch)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def compile_afresh(model, backend="eager"):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


ONE_LEVEL = {"channel_mult": (1,), "img_size": 4}


# AOTAutograd, which takes long, sees one network; of the others it matters that they are one graph.
@pytest.mark.parametrize(
    ("kind", "overrides", "backend"),
    [
        ("class", {"scaling": "ls", "fused": True, "use_scale_shift_norm": True, **ONE_LEVEL}, "aot_eager"),
        ("class", {"scaling": "ls", "fused": True, "use_scale_shift_norm": True}, "eager"),
        ("class", {"scaling": "ls", "fused": False}, "eager"),
        ("text", {"scaling": "cs", "fused": True, "use_checkpoint": True, **ONE_LEVEL}, "eager"),
    ],
    ids=["fused, differentiated", "fused", "plain", "text, checkpointed"],
)
def test_compiled_outputs_and_gradients_equal_eager_ones(tiny_unet, batch_for, randomised, kind, overrides, backend):
    model = randomised(UNet(tiny_unet(kind, **overrides)))
    batch = batch_for(model.config, 2)
    expected, actual = loss_and_gradients(model, batch), loss_and_gradients(compile_afresh(model, backend), batch)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_kernels_stay_in_the_graph(tiny_unet, batch_for, randomised):
    config = tiny_unet(scaling="ls", fused=True, channel_mult=(1,), img_size=4)
    model, batch = randomised(UNet(config)), batch_for(config, 2)
    with torch.no_grad(), force_plan("triton"):
        compiled = compile_afresh(model)
        torch.testing.assert_close(compiled(*batch), model(*batch), rtol=1e-5, atol=1e-6)


def test_a_compiled_model_records_when_asked_later(tiny_unet, batch_for):
    config = tiny_unet(scaling="ls-individual", channel_mult=(1,), img_size=4)
    model, batch = UNet(config), batch_for(config)
    compiled = compile_afresh(model)  # what is recorded is Dynamo's to see
    with torch.no_grad():
        compiled(*batch)
        with model.scaling.recording() as kappas:
            compiled(*batch)
        with model.scaling.recording() as expected:
            model(*batch)
    assert sorted(kappas) == [1, 2]
    torch.testing.assert_close(kappas, expected)
