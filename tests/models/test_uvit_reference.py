"""The U-ViT equals a second, functional implementation that reads weights by the authors' names."""

import math

import pytest
import torch

from scalelong_fast.integrations import load_uvit_checkpoint
from scalelong_fast.models import UViT


def authors_shapes(config, gates):
    """Names and shapes of a released checkpoint. ``gates``: prefixes of the SE gates."""
    dim, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    patches = (config.img_size // config.patch_size) ** 2
    tokens = patches + 1 + (1 if config.num_classes > 0 else 0) + (config.num_clip_token if config.clip_dim else 0)
    shapes = {"pos_embed": (1, tokens, dim)}

    def affine(name, fan_in, fan_out, bias=True):
        shapes[f"{name}.weight"] = (fan_out, fan_in)
        if bias:
            shapes[f"{name}.bias"] = (fan_out,)

    def norm(name):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (dim,)

    shapes["patch_embed.proj.weight"] = (dim, config.in_chans, config.patch_size, config.patch_size)
    shapes["patch_embed.proj.bias"] = (dim,)
    if config.mlp_time_embed:
        affine("time_embed.0", dim, 4 * dim)
        affine("time_embed.2", 4 * dim, dim)
    if config.num_classes > 0:
        shapes["label_emb.weight"] = (config.num_classes, dim)
    if config.clip_dim > 0:
        affine("context_embed", config.clip_dim, dim)
    half = config.depth // 2
    blocks = [f"{side}_blocks.{j}" for side in ("in", "out") for j in range(half)] + ["mid_block"]
    for block in blocks:
        norm(f"{block}.norm1")
        affine(f"{block}.attn.qkv", dim, 3 * dim, bias=config.qkv_bias)
        affine(f"{block}.attn.proj", dim, dim)
        norm(f"{block}.norm2")
        affine(f"{block}.mlp.fc1", dim, hidden)
        affine(f"{block}.mlp.fc2", hidden, dim)
        if block.startswith("out") and config.skip:
            affine(f"{block}.skip_linear", 2 * dim, dim)
    norm("norm")
    affine("decoder_pred", dim, config.patch_size**2 * config.in_chans)
    if config.conv:
        shapes["final_layer.weight"] = (config.in_chans, config.in_chans, 3, 3)
        shapes["final_layer.bias"] = (config.in_chans,)
    for gate in gates:
        affine(f"{gate}.layer1", tokens, tokens // config.reduction)
        affine(f"{gate}.layer2", tokens // config.reduction, tokens)
    return shapes


def random_weights(shapes):
    """Weights large enough that every part of the network shows in the output."""
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape)
        if name.startswith("se."):
            state[name] = values
        elif "norm" in name:
            state[name] = 0.3 * values + (1.0 if name.endswith("weight") else 0.0)
        elif len(shape) == 1:
            state[name] = 0.3 * values
        elif name in ("pos_embed", "label_emb.weight"):
            state[name] = values
        else:
            state[name] = values / math.sqrt(math.prod(shape[1:]))
    return state


def reference(w, config, x, timesteps, y=None):
    """Predicted noise, written from the papers' description."""
    dim, heads, p = config.embed_dim, config.num_heads, config.patch_size

    def affine(name, h):
        out = torch.einsum("...i,oi->...o", h, w[f"{name}.weight"])
        return out + w[f"{name}.bias"] if f"{name}.bias" in w else out

    def norm(name, h):
        centred = h - h.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(name, h):
        q, k, v = affine(f"{name}.qkv", h).split(dim, dim=-1)
        width = dim // heads
        outputs = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            logits = torch.einsum("bid,bjd->bij", q[..., part], k[..., part])
            logits = logits * (config.qk_scale or 1 / math.sqrt(width))
            weights = torch.exp(logits - logits.amax(-1, keepdim=True))
            weights = weights / weights.sum(-1, keepdim=True)
            outputs.append(torch.einsum("bij,bjd->bid", weights, v[..., part]))
        return affine(f"{name}.proj", torch.cat(outputs, dim=-1))

    def mlp(name, h):
        h = affine(f"{name}.fc1", h)
        return affine(f"{name}.fc2", h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))

    def block(name, h):
        h = h + attention(f"{name}.attn", norm(f"{name}.norm1", h))
        return h + mlp(f"{name}.mlp", norm(f"{name}.norm2", h))

    def gate(name, skip):
        hidden = torch.relu(affine(f"{name}.layer1", skip.mean(-1)))
        return (1 / (1 + torch.exp(-affine(f"{name}.layer2", hidden))))[:, :, None]

    def scale(skip, j, count):
        if config.scaling == "uniform":
            return skip * (1 / math.sqrt(2) if config.kappa is None else config.kappa)
        if config.scaling == "cs":
            return skip * config.kappa ** (count - 1 - j)
        if config.scaling == "ls":
            return skip * gate("se", skip)
        if config.scaling == "ls-individual":
            return skip * gate(f"se.{j}", skip)
        return skip

    def time_token():
        angles = [timesteps * 10000 ** (-k / (dim // 2)) for k in range(dim // 2)]
        token = torch.stack([a.cos() for a in angles] + [a.sin() for a in angles], dim=-1)
        if config.mlp_time_embed:
            token = affine("time_embed.0", token)
            token = affine("time_embed.2", token * torch.sigmoid(token))
        return token[:, None]

    patches = torch.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=p)
    patches = patches.flatten(2).transpose(1, 2)
    if config.num_classes > 0:
        tokens = [w["label_emb.weight"][y][:, None], time_token(), patches]
    elif config.clip_dim > 0:
        tokens = [time_token(), affine("context_embed", y), patches]
    else:
        tokens = [time_token(), patches]
    h = torch.cat(tokens, dim=1) + w["pos_embed"]

    stack, half = [], config.depth // 2
    for j in range(half):
        h = block(f"in_blocks.{j}", h)
        stack.append(h)
    h = block("mid_block", h)
    for j in range(half):
        if config.skip:
            h = affine(f"out_blocks.{j}.skip_linear", torch.cat([h, scale(stack.pop(), j, half)], dim=-1))
        h = block(f"out_blocks.{j}", h)

    flat = affine("decoder_pred", norm("norm", h))[:, -patches.shape[1] :]
    side = config.img_size // p
    image = torch.empty_like(x)
    for index in range(flat.shape[1]):
        row, column = divmod(index, side)
        tile = flat[:, index].view(-1, p, p, config.in_chans)
        image[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p] = tile.permute(0, 3, 1, 2)
    if config.conv:
        image = torch.conv2d(image, w["final_layer.weight"], w["final_layer.bias"], padding=1)
    return image


def compare(config, batch):
    # Three long skips: a wrong order cannot hide.
    gates = {"ls": ["se"], "ls-individual": [f"se.{j}" for j in range(config.depth // 2)]}
    weights = random_weights(authors_shapes(config, gates.get(config.scaling, [])))
    model = load_uvit_checkpoint(UViT(config), weights).eval()
    with torch.no_grad():
        expected = reference(weights, config, *batch)
        assert 0.1 < expected.std() < 10
        torch.testing.assert_close(model(*batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["unconditional", "class", "text"])
@pytest.mark.parametrize(
    ("scaling", "kappa"),
    [("none", None), ("uniform", None), ("uniform", 0.6), ("cs", 0.6), ("ls", None), ("ls-individual", None)],
)
def test_forward_equals_the_reference(tiny, batch_for, kind, scaling, kappa):
    config = tiny(kind, depth=6, scaling=scaling, kappa=kappa)
    compare(config, batch_for(config))


@pytest.mark.parametrize(
    "overrides",
    [
        {"mlp_time_embed": True},
        {"qkv_bias": True},
        {"qk_scale": 0.2},
        {"conv": False},
        {"skip": False, "scaling": "none"},
        {"patch_size": 4, "in_chans": 1},
        {"patch_size": 1, "in_chans": 4},
        {"mlp_ratio": 2.5, "num_heads": 8},
        {"reduction": 2, "num_classes": 3},
    ],
    ids=lambda overrides: ",".join(overrides),
)
@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_options_equal_the_reference(tiny, batch_for, overrides, attention):
    config = tiny(attention=attention, **overrides)
    compare(config, batch_for(config))


@pytest.mark.parametrize(
    "other", [{"scaling": "cs-reversed", "kappa": 0.6}, {"scaling": "none"}, {"scaling": "cs", "kappa": 0.7}]
)
def test_the_comparison_notices_other_coefficients(tiny, batch_for, other):
    config = tiny(depth=6, scaling="cs", kappa=0.6)
    weights = random_weights(authors_shapes(config, []))
    wrong = load_uvit_checkpoint(UViT(tiny(depth=6, **other)), weights)
    batch = batch_for(config)
    with torch.no_grad():
        assert (wrong(*batch) - reference(weights, config, *batch)).abs().max() > 1e-2
