"""The noise prediction that a sampler sees: conditioning and classifier-free guidance."""

import torch
from torch import Tensor, nn

from scalelong_fast.errors import UserError, check_range, invalid


def check_conditioning(y: Tensor | None, null_y: int | Tensor | None, guidance: float, count: int) -> None:
    """Raise :class:`UserError` unless the conditioning fits itself, the weight and ``count`` images."""
    check_range("--guidance", guidance, low=0.0)
    if y is not None:
        is_labels = y.ndim == 1 and not y.is_floating_point() and y.dtype != torch.bool
        if not is_labels and not (y.ndim == 3 and y.is_floating_point()):
            raise invalid(
                "y",
                f"{y.dtype} of shape {tuple(y.shape)}",
                "int64 labels (N,) or float context features (N, L, D)",
            )
        if y.shape[0] != count:
            raise invalid("y", tuple(y.shape), f"one entry per seed, that is {count}")
    if guidance == 1:
        return
    if y is None:
        raise invalid(
            "--guidance",
            guidance,
            "1 for an unconditional model",
            "Pass labels or features as y, or leave it at 1.",
        )
    if null_y is None:
        raise UserError(
            f"null_y: got None with --guidance {guidance:g}, expected the label or the features that stand "
            "for 'no condition'. Pass null_y, or set --guidance 1."
        )
    if y.ndim == 1:
        check_range("null_y", null_y, low=0, integer=True)
    elif not isinstance(null_y, Tensor) or null_y.shape != y.shape[1:]:
        got = tuple(null_y.shape) if isinstance(null_y, Tensor) else null_y
        raise invalid("null_y", got, f"a tensor (L, D) of shape {tuple(y.shape[1:])}, as the features in y")


class NoisePredictor:
    """Predicts the noise in a batch: eps = eps_null + w (eps_cond - eps_null) (Ho & Salimans 2022).

    Args:
        model: backbone, called as ``model(x, timesteps, y=y)``. Of twice as many channels as ``x`` has, as models with
            learned variances return them, the first half is the noise.
        y: labels (B,) or features (B, L, D) on the model's device, or None.
        null_y: label or features (L, D) of the unconditional branch.
        guidance: the weight w; 1 calls the conditional branch alone.
    """

    def __init__(self, model: nn.Module, y: Tensor | None, null_y: int | Tensor | None, guidance: float) -> None:
        self._model = model
        self._guidance = guidance
        self._y = y
        if guidance != 1:
            null = torch.as_tensor(null_y, dtype=y.dtype, device=y.device).expand_as(y)
            self._y = torch.cat([null, y])

    def __call__(self, x: Tensor, timestep: float) -> Tensor:
        """Return the noise in ``x`` (B, C, H, W) fp32 at ``timestep`` (scale 0..999), same shape, fp32."""
        if self._guidance == 1:
            return self._predict(x, timestep)
        # One forward of 2B rather than two of B: fewer launches and better filled matrix products.
        eps_null, eps_cond = self._predict(torch.cat([x, x]), timestep).chunk(2)
        return eps_null + self._guidance * (eps_cond - eps_null)

    def _predict(self, x: Tensor, timestep: float) -> Tensor:
        timesteps = torch.full((x.shape[0],), timestep, dtype=torch.float32, device=x.device)
        eps = self._model(x, timesteps, y=self._y)
        if eps.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
            eps = eps[:, : x.shape[1]]
        if eps.shape != x.shape:
            raise invalid("model", tuple(eps.shape), f"an output of shape {tuple(x.shape)}")
        return eps.float()
