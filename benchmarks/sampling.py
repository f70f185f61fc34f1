"""What ``python -m benchmarks inference`` times: networks of equal weights, and a whole sampling with one of them."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import unet, uvit
from benchmarks.model_check import ERROR_FACTOR, ERROR_FLOOR, LossMismatchError
from benchmarks.timing import synchronize
from scalelong_fast.diffusion import create_schedule, sample_images
from scalelong_fast.models.registry import model_config

SAMPLERS = ("dpm-solver++", "ddim")
KINDS = ("eager", "compile", "ours", "ours_compile")
SCALINGS = ("none", "ls")
STEPS = 50

_SOURCES = (
    "benchmarks/sampling.py",
    "scalelong_fast/diffusion/guidance.py",
    "scalelong_fast/diffusion/samplers.py",
    "scalelong_fast/diffusion/seeds.py",
    "scalelong_fast/diffusion/solvers.py",
)
#: Models of a GPU by preset; what a CPU is given instead; and the larger of the two batches on each.
PRESETS = {"uvit_s2": uvit.REDUCED, "unet_cifar10": {"model_channels": 32, "num_res_blocks": 1}}
BATCHES = {"cuda": (1, 128), "cpu": (1, 2)}


def mixed(device: torch.device, autocast: torch.dtype | None) -> torch.autocast:
    """Autocast as ``scalelong-fast sample`` has it: on a GPU alone."""
    return torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None)


def models(device: torch.device) -> dict[str, Any]:
    """Configurations by their name in results; a CPU has small ones."""
    if device.type == "cuda":
        return {preset: model_config(preset) for preset in PRESETS}
    return {f"{preset}, reduced": model_config(preset, **options) for preset, options in PRESETS.items()}


def build(config: Any, kind: str, scaling: str, device: torch.device) -> nn.Module:
    """A model of a kind; all of one configuration have the same weights, none of them zero throughout.

    Args:
        config: of a U-ViT or a UNet; its scaling and ``fused`` are replaced.
        kind: ``eager``, the plain model (a UNet contiguous); ``compile``, the same compiled (a UNet channels_last);
            ``ours`` and ``ours_compile``, with our ops.
        scaling: of the long skips.
        device: where.
    """
    if isinstance(config, uvit.UViTConfig):
        bench, recipe = uvit.Bench(config, device, 1, False), uvit.Recipe(scaling, fused=kind.startswith("ours"))
    else:
        bench, recipe = unet.Bench(config, device, 1, False), unet.Recipe(kind, scaling)
    model = bench.model(recipe).eval()
    return torch.compile(model, dynamic=False) if kind.endswith("compile") else model


def sources(config: Any, kind: str, scaling: str) -> tuple[str, ...]:
    """Files whose code the sampling runs, relative to the repository."""
    if isinstance(config, uvit.UViTConfig):
        own = uvit.recipe_sources(uvit.Recipe(scaling, fused=kind.startswith("ours")))
    else:
        own = unet.recipe_sources(unet.Recipe(kind, scaling))
    # Of a training step's files, those that sampling runs.
    steps = (
        "benchmarks/step_calls.py",
        "scalelong_fast/training/",
        "scalelong_fast/data/",
        "scalelong_fast/diffusion/loss.py",
    )
    return tuple(sorted({*_SOURCES, *(path for path in own if not path.startswith(steps))}))


def predict(network: nn.Module, inputs: tuple[Tensor | None, ...], autocast: torch.dtype | None) -> Tensor:
    """The noise that a network predicts, in float32; arguments as for :func:`noise_error`."""
    with torch.inference_mode(), mixed(inputs[0].device, autocast):
        return network(*inputs).float()


def noise_error(
    name: str, model: nn.Module, plain: nn.Module, inputs: tuple[Tensor | None, ...], autocast: torch.dtype | None
) -> float:
    """‖difference‖ / ‖plain‖ of a model's noise prediction and the plain model's in float32, checked.

    Args:
        name: in the message.
        model, plain: in eval mode, from equal weights.
        inputs: images, times and labels or None.
        autocast: dtype that the model is used with.

    Raises:
        LossMismatchError: it is more than the plain model's own under the same autocast, times a factor.
    """

    exact = predict(plain, inputs, None)
    own, usual = (float((predict(net, inputs, autocast) - exact).norm() / exact.norm()) for net in (model, plain))
    limit = max(ERROR_FACTOR * usual, ERROR_FLOOR)
    if not own < limit:
        raise LossMismatchError(
            f"{name}: with equal weights, images and times its noise differs by {own:.2g} from the plain model's in "
            f"float32; the limit is {limit:.2g}."
        )
    return own


def labels_of(config: Any, batch_size: int, device: torch.device) -> Tensor | None:
    """Labels ``(B,)`` of a batch; None for an unconditional model."""
    return torch.arange(batch_size, device=device) % config.num_classes if config.num_classes > 0 else None


def sample(
    model: nn.Module,
    config: Any,
    device: torch.device,
    *,
    sampler: str,
    batch_size: int,
    steps: int,
    autocast: torch.dtype | None,
) -> None:
    """Draw a batch of images, and wait for them; arguments as for :func:`measure`."""
    with mixed(device, autocast):
        sample_images(
            model,
            create_schedule("vpsde").to(device),
            image_shape=(config.in_chans, config.img_size, config.img_size),
            seeds=range(batch_size),
            y=labels_of(config, batch_size, device),
            sampler=sampler,
            steps=steps,
            batch_size=batch_size,
            device=device,
        )
    synchronize(device)
