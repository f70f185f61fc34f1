"""‖b_i ∘ a_i‖ of a U-ViT, block by block (ScaleLong Fig. 11)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalelong_fast.analysis.training import Watched
from scalelong_fast.models import UViT


def composition_norms(watched: Watched, steps: int = 10) -> list[float]:
    """The largest ‖b_i ∘ a_i‖, i = 1 … N, at the tokens of the probe batch.

    a_i is encoder block i and b_i the decoder block that its long skip ends in, as a function of the skip, unscaled and
    with the decoder's own stream held fixed. The norm is that of the Jacobian with respect to one image's tokens, by
    power iteration; the blocks are no global Lipschitz functions (attention), so that this is the paper's M_0 as far as
    the data go.

    Args:
        watched: a network on the plain path.
        steps: of the iteration, which comes from below.

    Returns:
        One number per skip, outermost first; none of a UNet, whose blocks are of different sizes.
    """
    model = watched.model
    if not isinstance(model, UViT) or model.scaling is None:
        return []
    inputs = _inputs(watched)
    norms = []
    for i, encoder in enumerate(model.in_blocks, start=1):
        decoder = model.out_blocks[len(model.out_blocks) - i]
        stream = inputs[decoder]

        def composed(tokens: Tensor, a: nn.Module = encoder, b: nn.Module = decoder, h: Tensor = stream) -> Tensor:
            return b(h, a(tokens))

        norms.append(jacobian_norm(composed, inputs[encoder], steps).max().item())
    return norms


def _inputs(watched: Watched) -> dict[nn.Module, Tensor]:
    """The stream that comes into every encoder and decoder block on the probe batch."""
    found: dict[nn.Module, Tensor] = {}
    blocks = [*watched.model.in_blocks, *watched.model.out_blocks]
    hooks = [
        b.register_forward_pre_hook(lambda block, args: found.__setitem__(block, args[0].detach())) for b in blocks
    ]
    try:
        watched.predict()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def jacobian_norm(function: Callable[[Tensor], Tensor], x: Tensor, steps: int = 10) -> Tensor:
    """Largest ‖J v‖ / ‖v‖ of the Jacobian of each sample, ``(B,)``, by power iteration with JᵀJ.

    Args:
        function: of ``(B, ...)``, sample by sample.
        x: where, ``(B, ...)``.
        steps: of the iteration; the result comes from below.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator).to(x)
    # Flash attention has no forward derivative.
    with sdpa_kernel(SDPBackend.MATH):
        _, pull_back = torch.func.vjp(function, x)
        for _ in range(steps):
            v = v / _norms(v).clamp_min(torch.finfo(v.dtype).tiny)
            _, pushed = torch.func.jvp(function, (x,), (v,))
            (v,) = pull_back(pushed)
    return _norms(pushed).flatten()


def _norms(x: Tensor) -> Tensor:
    """Norm of each sample, ``(B, 1, …)``."""
    return x.flatten(1).norm(dim=1).view(-1, *(1,) * (x.dim() - 1))
