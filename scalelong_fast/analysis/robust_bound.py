"""Theorem 3.4 of ScaleLong: how far a perturbed input can move the output, as the paper has it and rigorously."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalelong_fast.analysis.matrix_unet import MatrixUNet, apply_block


def lipschitz_bound(
    kappas: Sequence[float], encoders: Sequence[float], decoders: Sequence[float], middle: float
) -> float:
    """A Lipschitz constant of f_0, given those of its blocks: rigorous.

    |f_{i−1}(x) − f_{i−1}(x')| ≤ ‖b_i‖ (κ_i ‖a_i‖ + L(f_i) ‖a_i‖) |x − x'|, from f_N inwards out: Theorem 3.4 with every
    ‖b_i‖‖a_i‖ in the place of M_0.

    Args:
        kappas: κ_1 … κ_N.
        encoders, decoders: Lipschitz constants of a_1 … a_N and b_1 … b_N.
        middle: that of f_N.
    """
    constant = middle
    for kappa, encoder, decoder in zip(reversed(kappas), reversed(encoders), reversed(decoders), strict=True):
        constant = decoder * encoder * (abs(kappa) + constant)
    return constant


def paper_bound(kappas: Sequence[float], compositions: Sequence[float], middle: float) -> float:
    """Σ_i κ_i M_0^i + c_0 with M_0 = max_i ‖b_i ∘ a_i‖ and c_0 = M_0^N L_0: Theorem 3.4 as it stands.

    Not rigorous: the path through f_i meets b_i and a_i with f_i between them, which ‖b_i ∘ a_i‖ does not bound.

    Args:
        kappas: κ_1 … κ_N.
        compositions: ‖b_i ∘ a_i‖, i = 1 … N.
        middle: L_0, the Lipschitz constant of f_N.
    """
    largest = max(compositions)
    return sum(kappa * largest**i for i, kappa in enumerate(kappas, start=1)) + largest ** len(kappas) * middle


@torch.no_grad()
def block_lipschitz(matrices: Tensor) -> Tensor:
    """Product of spectral norms, ``(T,)``, of blocks ``(T, l, m, m)``: a Lipschitz constant, since ReLU's is 1."""
    return torch.linalg.matrix_norm(matrices, ord=2).prod(dim=1)


@torch.no_grad()
def composition_norm(encoder: Tensor, decoder: Tensor, x: Tensor, steps: int = 50) -> Tensor:
    """Largest ‖J v‖ / ‖v‖ of the Jacobian J of b ∘ a at the points ``x``, by power iteration with JᵀJ.

    Where the blocks are linear this is ‖b ∘ a‖. Where they are not it is the norm of the piece in which x lies; the
    largest over many points is the paper's ‖b_i ∘ a_i‖ as far as the data go.

    Args:
        encoder, decoder: matrices of a and b, ``(T, l, m, m)``.
        x: ``(T, B, m)``.
        steps: of the iteration; the result comes from below.

    Returns:
        ``(T, B)``.
    """
    # ReLU's derivative at these points; with it, J is a product of matrices that goes both ways.
    chain: list[tuple[Tensor, Tensor | None]] = []
    for matrices in (encoder, decoder):
        for number, matrix in enumerate(matrices.unbind(1)):
            mask = (x > 0).to(x.dtype) if number else None
            x = (x if mask is None else x * mask) @ matrix.mT
            chain.append((matrix, mask))
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    norm = torch.zeros(x.shape[:2], dtype=x.dtype)
    for _ in range(steps):
        v = v / v.norm(dim=2, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
        for matrix, mask in chain:
            v = (v if mask is None else v * mask) @ matrix.mT
        norm = v.norm(dim=2)
        for matrix, mask in reversed(chain):
            v = v @ matrix if mask is None else (v @ matrix) * mask
    return norm


@dataclass(frozen=True)
class BoundCheck:
    """Theorem 3.4 of one network at some inputs.

    Attributes:
        measured: largest |UNet(x + δ) − UNet(x)| / |δ| found.
        rigorous: :func:`lipschitz_bound`.
        paper: :func:`paper_bound`, with M_0 = ``largest_composition``.
        largest_composition: M_0, the largest ‖b_i ∘ a_i‖ at the inputs.
        largest_product: the largest ‖b_i‖‖a_i‖.
    """

    measured: float
    rigorous: float
    paper: float
    largest_composition: float
    largest_product: float

    @property
    def paper_is_violated(self) -> bool:
        return self.measured > self.paper


@torch.no_grad()
def check_bound(
    net: MatrixUNet, x: Tensor, generator: torch.Generator, sizes: Sequence[float] = (1e-3, 0.1, 1.0)
) -> BoundCheck:
    """Theorem 3.4 for one network (``trials`` = 1).

    Perturbations are Gaussian, of several sizes, and the worst direction at each input, which power iteration finds by
    the network's own Jacobian.

    Args:
        net: of one trial.
        x: inputs ``(1, B, m)``.
        generator: of the perturbations.
        sizes: norms of the perturbations relative to that of x.
    """
    count = net.num_skips
    encoders = [block_lipschitz(net.encoder(i)).item() for i in range(1, count + 1)]
    decoders = [block_lipschitz(net.decoder(i)).item() for i in range(1, count + 1)]
    middle = block_lipschitz(net.middle).item()
    compositions, inner = [], x
    for i in range(1, count + 1):
        compositions.append(composition_norm(net.encoder(i), net.decoder(i), inner).max().item())
        inner = apply_block(net.encoder(i), inner)
    return BoundCheck(
        measured_amplification(net, x, generator, sizes),
        lipschitz_bound(net.kappas, encoders, decoders, middle),
        paper_bound(net.kappas, compositions, middle),
        max(compositions),
        max(encoder * decoder for encoder, decoder in zip(encoders, decoders, strict=True)),
    )


def measured_amplification(net: MatrixUNet, x: Tensor, generator: torch.Generator, sizes: Sequence[float]) -> float:
    """Largest |UNet(x + δ) − UNet(x)| / |δ| over Gaussian and worst-direction perturbations of the given sizes."""
    clean, best = net(x), 0.0
    directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype), _worst_direction(net, x, generator)]
    for direction in directions:
        for size in sizes:
            delta = direction / direction.norm(dim=2, keepdim=True) * size * x.norm(dim=2, keepdim=True)
            moved = (net(x + delta) - clean).norm(dim=2) / delta.norm(dim=2)
            best = max(best, moved.max().item())
    return best


def _worst_direction(net: MatrixUNet, x: Tensor, generator: torch.Generator, steps: int = 20) -> Tensor:
    """First right singular vector of the network's Jacobian at each x, ``(1, B, m)``."""
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    _, pull_back = torch.func.vjp(net, x)
    for _ in range(steps):
        v = v / v.norm(dim=2, keepdim=True)
        (v,) = pull_back(torch.func.jvp(net, (x,), (v,))[1])
    return v
