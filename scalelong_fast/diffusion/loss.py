"""The denoising loss (Eq. 2 of ScaleLong) and the times at which it is evaluated."""

from collections.abc import Callable

import torch
from torch import Tensor

from scalelong_fast.diffusion.schedule import NoiseSchedule
from scalelong_fast.errors import check_range, invalid


def stratified_uniform(
    batch_size: int, *, generator: torch.Generator, device: torch.device | str | None = None
) -> Tensor:
    """Draw one uniform from each of B equal strata, in random order.

    Each entry alone is uniform on [0, 1), so the loss stays unbiased; together they cover the interval
    evenly, which lowers the variance of a batch's loss (Kingma et al. 2021, Sec. 4.3).

    Args:
        batch_size: number of strata B.
        generator: source of randomness; it must live on ``device``.
        device: device of the result; the generator's own by default.

    Returns:
        (B,) fp32 in [0, 1): a random permutation of one value from each [k/B, (k+1)/B).
    """
    check_range("batch_size", batch_size, low=1, integer=True)
    options = {"generator": generator, "device": generator.device if device is None else device}
    stratum = torch.randperm(batch_size, **options).double()
    u = ((stratum + torch.rand(batch_size, dtype=torch.float64, **options)) / batch_size).float()
    # Rounding to fp32 may reach the open end of a stratum (1.0 for the last): step back below it.
    end = ((stratum + 1) / batch_size).float()
    return torch.minimum(u, torch.nextafter(end, torch.zeros_like(end)))


def diffusion_loss(
    model: Callable[..., Tensor],
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: Tensor,
    u: Tensor,
    y: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the predicted noise, Eq. 2 of ScaleLong (with weight 1 at every time).

    A pure function of its inputs, to be compiled as one graph together with the model.

    Args:
        model: called as ``model(x_t, timesteps, y=y)`` with ``timesteps`` (B,) fp32 on the scale 0..999; it
            returns the predicted noise (B, C, H, W) in any float dtype.
        schedule: the forward process.
        x0: clean images or latents (B, C, H, W) fp32.
        noise: standard normal (B, C, H, W) fp32.
        u: uniforms (B,) fp32 in [0, 1), e.g. from :func:`stratified_uniform`.
        y: class labels (B,) int64, context features (B, L, D), or None.

    Returns:
        Scalar fp32, the mean over batch, channels and pixels.

    Raises:
        UserError: if the model's output has another shape than the noise.
    """
    t = schedule.times(u)
    alpha, sigma = schedule.alpha_sigma(t)
    x_t = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise
    predicted = model(x_t, schedule.model_timesteps(t), y=y)
    if predicted.shape != noise.shape:
        # A single output channel would broadcast without a sound.
        raise invalid("model", tuple(predicted.shape), f"an output of shape {tuple(noise.shape)}")
    return (noise.float() - predicted.float()).square().mean()
