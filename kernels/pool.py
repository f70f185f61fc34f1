"""GAP, the mean over all positions that share a κ: of each token's features, or of each channel's pixels.

A feature is seen as (B, N, P): N gated tokens or channels of P positions each. Tokens and contiguous planes have their
positions side by side in memory, channels_last pixels have their channels side by side: two pairs of strides, one
kernel. Sums over a long P are cut into parts that are added in a fixed order, so that a single image fills a GPU and
the result is the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalelong_fast.kernels.common import INTERPRET, config_for, on_device
from scalelong_fast.kernels.configs import LaunchConfig

#: Programs that fill a GPU; below that a sum is cut into parts. Few in the interpreter, so that tests see long loops.
TARGET_PROGRAMS = 4 if INTERPRET.value else 1024


@triton.jit
def gap_kernel(
    feature,  # (B, N, P) with strides (N · P, stride_n, stride_p)
    gap,  # (PARTS, B, N) fp32, out: sums of the parts, already divided by P
    N,
    P,
    stride_n,
    stride_p,
    span,  # positions of a part, a multiple of BLOCK_P
    part_stride,  # B · N
    parts,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (sample, part, block of N), the last fastest."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    part = (pid // blocks) % parts
    sample = (pid // blocks // parts).to(tl.int64)
    n = (pid % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part.to(tl.int64) * span
    rows = feature + sample * N * P + n[:, None] * stride_n
    total = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in range(first, tl.minimum(first + span, P), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (n < N)[:, None] & (p < P)[None, :]
        total += tl.load(rows + p[None, :] * stride_p, mask=inside, other=0.0).to(tl.float32)
    tl.store(gap + part.to(tl.int64) * part_stride + sample * N + n, tl.sum(total, 1) / P, mask=n < N)


def parts_for(programs: int, steps: int) -> int:
    """Parts to cut a loop of ``steps`` steps into: a power of two, no more than it takes to fill a GPU."""
    parts = 1
    while programs * parts < TARGET_PROGRAMS and 2 * parts <= steps:
        parts *= 2
    return parts


def _gap(x: Tensor, batch: int, count: int, positions: int, strides: tuple[int, int], config: LaunchConfig) -> Tensor:
    block_n, block_p = config.meta["BLOCK_N"], config.meta["BLOCK_P"]
    steps, blocks = triton.cdiv(positions, block_p), triton.cdiv(count, block_n)
    parts = parts_for(batch * blocks, steps)
    gap = torch.empty(parts, batch, count, dtype=torch.float32, device=x.device)
    if gap.numel() == 0:
        return gap[0]
    with on_device(x):
        gap_kernel[(batch * parts * blocks,)](
            x, gap, count, positions, *strides, triton.cdiv(steps, parts) * block_p, batch * count, parts,
            **config.kwargs(),
        )  # fmt: skip
    return gap[0] if parts == 1 else gap.sum(0)


def gap_rows(x: Tensor) -> Tensor:
    """Mean of each row.

    Args:
        x: ``(R, W)``, contiguous: tokens ``(B·L, D)`` or planes ``(B·C, H·W)``.

    Returns:
        ``(R,)`` fp32.
    """
    rows, width = x.shape
    return _gap(x, 1, rows, width, (width, 1), config_for("gap_rows", x, width))[0]


def gap_columns(x: Tensor) -> Tensor:
    """Mean over the pixels of each channel.

    Args:
        x: ``(B, P, C)``, contiguous: the memory of a channels_last feature.

    Returns:
        ``(B, C)`` fp32.
    """
    batch, pixels, width = x.shape
    return _gap(x, batch, width, pixels, (1, width), config_for("gap_columns", x, width))
