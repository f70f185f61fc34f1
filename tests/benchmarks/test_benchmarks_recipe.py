"""The authors' recipe, as rebuilt for the benchmark, is our model's equal."""

import dataclasses

import pytest
import torch

from benchmarks.authors_recipe import AuthorsStep, AuthorsUViT
from scalelong_fast.diffusion import create_schedule, diffusion_loss
from scalelong_fast.integrations import load_uvit_checkpoint
from scalelong_fast.models import UViT, UViTConfig

CONFIG = UViTConfig(img_size=8, patch_size=2, embed_dim=32, depth=4, num_heads=4, reduction=4, scaling="ls")


@pytest.fixture(params=["ls", "none", "cs", "cs, labels"])
def pair(request):
    torch.manual_seed(0)
    scaling, _, labels = request.param.partition(", ")
    config = dataclasses.replace(CONFIG, scaling=scaling, num_classes=5 if labels else -1)
    authors = AuthorsUViT(config)
    with torch.no_grad():
        for parameter in authors.parameters():  # nothing zero: every weight has to land in its place
            parameter.add_(0.05 * torch.randn_like(parameter))
    return authors, load_uvit_checkpoint(UViT(config), authors.state_dict())


def batch(size=3):
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(size, 3, 8, 8, generator=generator) for _ in range(2))
    return x0, torch.rand(size, generator=generator), noise


def labels_of(model):
    return torch.tensor([4, 0, 2]) if model.config.num_classes > 0 else None


def test_the_networks_agree(pair):
    authors, ours = pair
    x0, t, _ = batch()
    y = labels_of(ours)
    torch.testing.assert_close(ours(x0, 999 * t, y), authors(x0, 999 * t, y), rtol=1e-5, atol=1e-5)


def test_loss_and_gradients_agree(pair):
    authors, ours = pair
    x0, t, noise = batch()
    theirs = AuthorsStep(authors).loss(x0, t, noise, labels_of(ours))
    assert theirs.shape == (3,)
    mine = diffusion_loss(ours, create_schedule("vpsde"), x0, noise, t, labels_of(ours))
    torch.testing.assert_close(mine, theirs.mean(), rtol=1e-5, atol=0)

    theirs.mean().backward()
    mine.backward()
    translated = {"scaling.gate.down": "se.layer1", "scaling.gate.up": "se.layer2"}
    gradients = {name: p.grad for name, p in authors.named_parameters()}
    assert len(gradients) == len(list(ours.parameters()))
    for name, parameter in ours.named_parameters():
        stem, _, leaf = name.rpartition(".")
        expected = gradients[f"{translated.get(stem, stem)}.{leaf}" if stem else leaf]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_moves_weights_and_average():
    torch.manual_seed(0)
    step = AuthorsStep(AuthorsUViT(CONFIG), warmup_steps=1, ema_rate=0.75)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step(batch()[0])  # the learning rate of the first step of a warm-up is zero
    for name, parameter in step.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    step(batch()[0])
    averages = dict(step.average.named_parameters())
    moved = 0
    for name, parameter in step.model.named_parameters():
        moved += not torch.equal(parameter, before[name])
        torch.testing.assert_close(averages[name], 0.75 * before[name] + 0.25 * parameter, rtol=1e-5, atol=1e-7)
    assert moved == len(before)


def test_fp16_scales_the_loss():
    """As on a GPU: the weights move although the loss is scaled, and a scale there is."""
    torch.manual_seed(0)
    step = AuthorsStep(AuthorsUViT(CONFIG), autocast=torch.float16, warmup_steps=1)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    losses = [float(step(batch()[0])) for _ in range(2)]
    assert step.scaler.is_enabled()
    assert step.scaler.get_scale() > 1
    assert all(0 < loss < 10 for loss in losses)
    assert all(p.isfinite().all() for p in step.model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in step.model.named_parameters())
