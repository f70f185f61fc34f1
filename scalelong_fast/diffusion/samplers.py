"""Generating images: names of the samplers, and the loop over batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scalelong_fast.diffusion.guidance import NoisePredictor, check_conditioning
from scalelong_fast.diffusion.schedule import GRID_SIZE, NoiseSchedule
from scalelong_fast.diffusion.seeds import NoiseStreams
from scalelong_fast.diffusion.solvers import ddim, dpm_solver_plus_plus, euler_maruyama
from scalelong_fast.errors import check_range, invalid, unknown_name

_SOLVERS = {"ddim": ddim, "dpm-solver++": dpm_solver_plus_plus, "euler-maruyama": euler_maruyama}
_DEFAULT_STEPS = {"ddim": 50, "dpm-solver++": 50, "euler-maruyama": 1000}
_ALIASES = {
    "dpmpp": "dpm-solver++",
    "dpmsolver": "dpm-solver++",
    "dpm++": "dpm-solver++",
    "em": "euler-maruyama",
    "euler": "euler-maruyama",
}


def list_samplers() -> list[str]:
    """Return the names of the samplers."""
    return sorted(_SOLVERS)


def resolve_sampler(name: str) -> str:
    """Return the canonical name of a sampler.

    Case, hyphens, underscores and spaces do not matter; ``dpmpp``, ``dpm-solver`` and ``dpm++`` stand for
    ``dpm-solver++``, ``em`` and ``euler`` for ``euler-maruyama``.

    Raises:
        UserError: for an unknown name.
    """
    known = {_squeeze(canonical): canonical for canonical in _SOLVERS} | _ALIASES
    canonical = known.get(_squeeze(str(name)))
    if canonical is None:
        raise unknown_name("sampler", name, list_samplers())
    return canonical


def _squeeze(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def default_steps(sampler: str) -> int:
    """Return the number of steps which a sampler takes unless told otherwise."""
    return _DEFAULT_STEPS[resolve_sampler(sampler)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; afterwards each submodule has its own former flag again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def sample_images(
    model: nn.Module,
    schedule: NoiseSchedule,
    *,
    image_shape: Sequence[int],
    seeds: Sequence[int],
    y: Tensor | None = None,
    null_y: int | Tensor | None = None,
    guidance: float = 1.0,
    sampler: str = "dpm-solver++",
    steps: int | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    clip_denoised: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Generate one image (or latent) per seed.

    The noise of an image comes from its own seed alone, so a sample does not depend on ``batch_size`` or on
    the other images (apart from the rounding of the model's own kernels).

    Args:
        model: predicts noise, called as ``model(x, timesteps, y=y)`` with ``x`` (B, C, H, W) fp32 and
            ``timesteps`` (B,) fp32 on the scale 0..999. It runs in eval mode and gets its flags back.
        schedule: the forward process the model was trained with.
        image_shape: (C, H, W).
        seeds: N ints, see :func:`scalelong_fast.diffusion.seeds.image_seeds`; N may be 0.
        y: int64 labels (N,), float context features (N, L, D), or None.
        null_y: the label, or the features (L, D), that stand for "no condition"; needed unless
            ``guidance`` is 1.
        guidance: weight w >= 0 in eps_null + w (eps_cond - eps_null); 1 uses the condition alone. Other
            weights call the model once per step with 2B images.
        sampler: ``ddim``, ``dpm-solver++`` or ``euler-maruyama`` (schedule ``vpsde`` only).
        steps: calls of the model per batch, 1..1000; by default 50, 50 and 1000.
        batch_size: images per batch B.
        device: where to compute; by default the device of the model's first parameter, else the CPU.
        clip_denoised: clip the predicted x_0 to [-1, 1] at every step. Turn it off for latents. Without
            effect on ``euler-maruyama``, which predicts no x_0.
        progress: called as ``progress(done, total)`` after each step, counted over all batches.

    Returns:
        (N, C, H, W) fp32 on the CPU.

    Raises:
        UserError: for an argument out of its range, conditioning that does not fit, a sampler that is unknown
            or does not suit the schedule, or diffusers missing.
    """
    solve = _SOLVERS[resolve_sampler(sampler)]
    steps = default_steps(sampler) if steps is None else steps
    check_range("--steps", steps, low=1, high=GRID_SIZE, integer=True)
    check_range("--batch-size", batch_size, low=1, integer=True)
    check_conditioning(y, null_y, guidance, len(seeds))
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise invalid("image_shape", tuple(image_shape), "(channels, height, width), each >= 1")
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    starts = range(0, len(seeds), batch_size)
    done, total = 0, steps * len(starts)

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    images = torch.empty(len(seeds), *image_shape, dtype=torch.float32)
    with torch.inference_mode(), _evaluating(model):
        for start in starts:
            batch = slice(start, start + batch_size)
            streams = NoiseStreams(seeds[batch])
            predict = NoisePredictor(model, None if y is None else y[batch].to(device), null_y, guidance)
            noise = streams.normal(image_shape, device)
            images[batch] = solve(predict, schedule, noise, streams, steps, clip_denoised, tick)
    return images
