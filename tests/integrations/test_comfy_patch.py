"""Output-block patches, called as ComfyUI's UNet calls them."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.comfy import output_block_patch, patch_model
from scalelong_fast.scaling import create_scaling

WIDTHS = (4, 6, 8)  # of the skips, outermost first


class Net(nn.Module):
    """The calling convention: features on a stack, patches in turn before the concat, options that say which block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        widths = [3, *WIDTHS]
        self.input_blocks = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, WIDTHS, strict=False))
        self.output_blocks = nn.ModuleList(nn.Conv2d(8 + width, 8, 1) for width in reversed(WIDTHS))

    def forward(self, x, patches=()):
        skips, options = [], {}
        for block in self.input_blocks:
            x = block(x).tanh()
            skips.append(x)
        for number, block in enumerate(self.output_blocks):
            options["block"] = ("output", number)
            skip = skips.pop()
            for patch in patches:
                x, skip = patch(x, skip, options)
            x = block(torch.cat([x, skip], 1)).tanh()
        return x


class Patcher:
    """What a node is given: clones share the network and have patches of their own."""

    def __init__(self, model, patches=()):
        self.model, self.patches = model, list(patches)

    def clone(self):
        return Patcher(self.model, self.patches)

    def set_model_output_block_patch(self, patch):
        self.patches.append(patch)

    def __call__(self, x):
        return self.model.diffusion_model(x, self.patches)


@pytest.fixture
def model():
    return Patcher(SimpleNamespace(diffusion_model=Net()))


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def by_hand(net, x, kappas):
    """The network with the factors of the skips, outermost first, written into it."""
    skips = []
    for block in net.input_blocks:
        x = block(x).tanh()
        skips.append(x)
    for block, kappa in zip(net.output_blocks, reversed(kappas), strict=True):
        x = block(torch.cat([x, kappa * skips.pop()], 1)).tanh()
    return x


@pytest.mark.parametrize(
    ("scaling", "kappas"), [("cs", (1, 0.5, 0.25)), ("uniform", (0.5, 0.5, 0.5)), ("cs-reversed", (0.125, 0.25, 0.5))]
)
def test_constants(model, x, scaling, kappas):
    patched = patch_model(model, scaling, kappa=0.5)
    torch.testing.assert_close(patched(x), by_hand(model.model.diffusion_model, x, kappas), rtol=0, atol=0)
    assert not torch.equal(patched(x), model(x))
    assert not model.patches  # the model that came is as it was


def test_one_is_free(model, x):
    assert torch.equal(patch_model(model, "none")(x), model(x))


def test_other_patches_run_too(model, x):
    model.set_model_output_block_patch(lambda h, hsp, options: (2 * h, hsp))
    patched = patch_model(model, "cs", kappa=0.5)
    assert len(patched.patches) == 2
    assert not torch.equal(patched(x), patch_model(Patcher(model.model), "cs", kappa=0.5)(x))


def test_the_node_of_the_docs(model, x):
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text()
    names = {}
    exec(re.search(r"```python\n([^`]*class ScaleLongSkips.*?)```", page, re.S).group(1), names)
    node = names["ScaleLongSkips"]
    kappa = node.INPUT_TYPES()["required"]["kappa"][1]["default"]
    (patched,) = getattr(node(), node.FUNCTION)(model, kappa)
    assert torch.equal(patched(x), patch_model(model, "cs", kappa)(x))


def test_gates(model, x):
    scaling = create_scaling("ls-individual", num_skips=3, widths=WIDTHS, reduction=2)
    out = model.model.diffusion_model(x, [output_block_patch(scaling)])
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in scaling.parameters())
    with scaling.recording() as kappas:
        model.model.diffusion_model(x, [output_block_patch(scaling)])
    assert {i: kappa.shape[1] for i, kappa in kappas.items()} == {1: 4, 2: 6, 3: 8}
    scaling.to("meta")
    with pytest.raises(NotImplementedError, match="meta"):  # gates are moved to where the features are
        model.model.diffusion_model(x, [output_block_patch(scaling)])


def test_what_does_not_fit_is_refused(model, x):
    net = model.model.diffusion_model
    with pytest.raises(UserError, match=r"\('output', 2\), expected \('output', j\) with j from 0 to 1.*num_skips"):
        net(x, [output_block_patch(create_scaling("cs", num_skips=2, widths=1))])
    with pytest.raises(UserError, match=r"transformer_options.*got None"):
        output_block_patch(create_scaling("cs", num_skips=2, widths=1))(x, x, {})
    with pytest.raises(UserError, match=r"scaling: got 'ls'.*output_block_patch"):
        patch_model(model, "ls")
    with pytest.raises(UserError, match="model: got 'Linear', expected a model with a UNet"):
        patch_model(Patcher(nn.Linear(2, 2)))
