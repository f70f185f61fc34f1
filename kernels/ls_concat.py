"""LS as one op: GAP of the skip, SE gate, κ ⊙ skip and concat, and the backward of the chain.

Layouts and the view (B, N, P) are those of concat.py. Three forward forms share all device functions:

- two launches: the GAP of pool.py, then a kernel in which every program computes the hidden layer of its sample anew
  (H · N products, weights from L2) and scales its own tile;
- one launch, one program per sample, whose second read of the skip comes from L2;
- one cooperative launch, several programs per sample, which meet once the sample is pooled.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalelong_fast.kernels.common import ACTIVATION_IDS, INTERPRET, config_for, dense, narrow, on_device
from scalelong_fast.kernels.concat import config_name, contiguous_width, copy_tile, skip_backward, tiles, x_blocks
from scalelong_fast.kernels.configs import LaunchConfig
from scalelong_fast.kernels.layouts import Half, concat_shape, empty_in, halves, in_layout
from scalelong_fast.kernels.pool import gap_columns, gap_rows, parts_for
from scalelong_fast.kernels.se import se_backward, se_blocks, se_hidden, se_kappa, se_weight_grad


@triton.jit
def scale_rows(
    skip, out, k, n, first, last, sample, N, P, stride_n, stride_p, out_b, out_n, out_p, offset, BLOCK_P: tl.constexpr
):  # fmt: skip
    """κ ⊙ skip of the channels or tokens ``n``, κ in ``k``, for positions from ``first`` to ``last``."""
    rows = skip + sample * N * P + n[:, None] * stride_n
    out_rows = out + sample * out_b + offset + n[:, None] * out_n
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (n < N)[:, None] & (p < P)[None, :]
        value = tl.load(rows + p[None, :] * stride_p, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_rows + p[None, :] * out_p, narrow(value * k[:, None], out.dtype.element_ty), mask=inside)


@triton.jit
def row_means(skip, n, sample, N, P, stride_n, stride_p, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """GAP of the channels or tokens ``n``."""
    rows = skip + sample * N * P + n[:, None] * stride_n
    total = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = (n < N)[:, None] & (p < P)[None, :]
        total += tl.load(rows + p[None, :] * stride_p, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(total, 1) / P


@triton.jit
def gated_concat_kernel(
    x,
    skip,
    pooled,  # (B, N)
    w_down,  # (H, N)
    b_down,  # (H)
    w_up,  # (N, H)
    b_up,  # (N)
    out,
    kappa,  # (B, N) fp32, out
    hidden,  # (B, H) fp32, out: pre-activation z
    N,
    P,
    stride_n,
    stride_p,
    out_b,
    out_n,
    out_p,
    offset,
    x_N,
    x_P,
    x_stride_n,
    x_stride_p,
    x_out_n,
    x_out_p,
    x_offset,
    H,
    span,  # positions of a part, a multiple of BLOCK_P
    parts,
    skip_programs,
    ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SE_BLOCK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    X_BLOCK_N: tl.constexpr,
    X_BLOCK_P: tl.constexpr,
):
    """Gate, scale and concat from the pooled skip.

    First come the programs (sample, part of P, block of N) of the skip, then one per tile of x.
    """
    pid = tl.program_id(0)
    if pid < skip_programs:
        blocks = tl.cdiv(N, BLOCK_N)
        block = pid % blocks
        part = (pid // blocks) % parts
        sample = (pid // blocks // parts).to(tl.int64)
        z = se_hidden(pooled, w_down, b_down, sample, N, H, BLOCK_H, SE_BLOCK_N)
        n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = se_kappa(z, w_up, b_up, n, N, H, ACTIVATION, BLOCK_H)
        if part == 0:
            tl.store(kappa + sample * N + n, k, mask=n < N)
            if block == 0:
                h = tl.arange(0, BLOCK_H)
                tl.store(hidden + sample * H + h, z, mask=h < H)
        first = part.to(tl.int64) * span
        scale_rows(
            skip, out, k, n, first, tl.minimum(first + span, P), sample, N, P, stride_n, stride_p, out_b, out_n, out_p,
            offset, BLOCK_P,
        )  # fmt: skip
    else:
        copy_tile(
            pid - skip_programs, x, out, kappa, x_N, x_P, x_stride_n, x_stride_p, out_b, x_out_n, x_out_p, x_offset,
            0, 0, False, X_BLOCK_N, X_BLOCK_P,
        )  # fmt: skip


@triton.jit
def sample_concat_kernel(
    x,
    skip,
    w_down,  # (H, N)
    b_down,  # (H)
    w_up,  # (N, H)
    b_up,  # (N)
    out,
    gap,  # (B, N) fp32, out
    kappa,  # (B, N) fp32, out
    hidden,  # (B, H) fp32, out: pre-activation z
    N,
    P,
    stride_n,
    stride_p,
    out_b,
    out_n,
    out_p,
    offset,
    x_N,
    x_P,
    x_stride_n,
    x_stride_p,
    x_out_n,
    x_out_p,
    x_offset,
    H,
    ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    X_BLOCK_N: tl.constexpr,
    X_BLOCK_P: tl.constexpr,
):
    """The whole chain of one sample; the hidden layer grows block by block while the skip is pooled."""
    sample = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    z = tl.load(b_down + h, mask=h < H, other=0.0).to(tl.float32)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mean = row_means(skip, n, sample, N, P, stride_n, stride_p, BLOCK_N, BLOCK_P)
        mean = tl.where(n < N, mean, 0.0)
        tl.store(gap + sample * N + n, mean, mask=n < N)
        inside = (h < H)[:, None] & (n < N)[None, :]
        w = tl.load(w_down + h[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
        z += tl.sum(w * mean[None, :], 1)
    tl.store(hidden + sample * H + h, z, mask=h < H)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        k = se_kappa(z, w_up, b_up, n, N, H, ACTIVATION, BLOCK_H)
        tl.store(kappa + sample * N + n, k, mask=n < N)
        scale_rows(
            skip, out, k, n, sample * 0, P, sample, N, P, stride_n, stride_p, out_b, out_n, out_p, offset, BLOCK_P
        )
    x_tiles = tl.cdiv(x_N, X_BLOCK_N) * tl.cdiv(x_P, X_BLOCK_P)
    for tile in range(0, x_tiles):
        copy_tile(
            tl.program_id(0) * x_tiles + tile, x, out, kappa, x_N, x_P, x_stride_n, x_stride_p, out_b, x_out_n,
            x_out_p, x_offset, 0, 0, False, X_BLOCK_N, X_BLOCK_P,
        )  # fmt: skip


@triton.jit
def cooperative_concat_kernel(
    x,
    skip,
    w_down,  # (H, N)
    b_down,  # (H)
    w_up,  # (N, H)
    b_up,  # (N)
    out,
    gap,  # (B, N) fp32, out
    kappa,  # (B, N) fp32, out
    hidden,  # (B, H) fp32, out: pre-activation z
    arrived,  # (B) int32, zero: programs that have pooled their share of a sample
    N,
    P,
    stride_n,
    stride_p,
    out_b,
    out_n,
    out_p,
    offset,
    x_N,
    x_P,
    x_stride_n,
    x_stride_p,
    x_out_n,
    x_out_p,
    x_offset,
    H,
    B,
    members,  # programs per sample
    slots,  # samples in flight
    ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SE_BLOCK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    X_BLOCK_N: tl.constexpr,
    X_BLOCK_P: tl.constexpr,
):
    """The whole chain, ``members`` programs per sample, all of them resident at once.

    A program pools its blocks of a sample, copies its tiles of x while the others pool theirs, waits, and scales the
    blocks it has just read.
    """
    slot = tl.program_id(0) // members
    member = tl.program_id(0) % members
    h = tl.arange(0, BLOCK_H)
    x_tiles = tl.cdiv(x_N, X_BLOCK_N) * tl.cdiv(x_P, X_BLOCK_P)
    for b in range(slot, B, slots):
        sample = tl.cast(b, tl.int64)
        for start in range(member * BLOCK_N, N, members * BLOCK_N):
            n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            mean = row_means(skip, n, sample, N, P, stride_n, stride_p, BLOCK_N, BLOCK_P)
            tl.store(gap + sample * N + n, mean, mask=n < N)
        # Every warp's stores come before the one thread's atomic that publishes them.
        tl.debug_barrier()
        tl.atomic_add(arrived + sample, 1, sem="release", scope="gpu")
        for tile in range(member, x_tiles, members):
            copy_tile(
                b * x_tiles + tile, x, out, kappa, x_N, x_P, x_stride_n, x_stride_p, out_b, x_out_n, x_out_p,
                x_offset, 0, 0, False, X_BLOCK_N, X_BLOCK_P,
            )  # fmt: skip
        while tl.atomic_add(arrived + sample, 0, sem="acquire", scope="gpu") < members:
            pass
        tl.debug_barrier()
        z = se_hidden(gap, w_down, b_down, sample, N, H, BLOCK_H, SE_BLOCK_N)
        if member == 0:
            tl.store(hidden + sample * H + h, z, mask=h < H)
        for start in range(member * BLOCK_N, N, members * BLOCK_N):
            n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            k = se_kappa(z, w_up, b_up, n, N, H, ACTIVATION, BLOCK_H)
            tl.store(kappa + sample * N + n, k, mask=n < N)
            scale_rows(
                skip, out, k, n, sample * 0, P, sample, N, P, stride_n, stride_p, out_b, out_n, out_p, offset, BLOCK_P
            )


def gap_of(skip: Tensor, layout: str) -> Tensor:
    """GAP ``(B, N)`` fp32 of a skip that lies densely in ``layout``."""
    batch, count = skip.shape[:2]
    if layout == "pixels":
        # The memory of channels_last is (B, pixels, C).
        return gap_columns(skip.movedim(1, -1).reshape(batch, -1, count))
    return gap_rows(skip.reshape(batch * count, -1)).view(batch, count)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def resident_programs(tensor: Tensor) -> int:
    """Programs that are on the GPU at once whatever they need: one per multiprocessor.

    The interpreter runs one program after the other, so that none may wait for another: each is a sample's only one.
    """
    if INTERPRET.value:
        return 1
    return _multiprocessors(tensor.get_device()) if tensor.is_cuda else 128


def _blocks(config: LaunchConfig, hidden: int) -> tuple[int, int]:
    """Tile of the skip, with no more tokens or channels than keep the gate's weights in registers."""
    return min(config.meta["BLOCK_N"], se_blocks(hidden)[1]), config.meta["BLOCK_P"]


def ls_concat_forward(
    x: Tensor,
    skip: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    pooled: Tensor | None,
    activation: str,
    layout: str,
    skip_first: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Launch the forward.

    Args:
        x, skip, layout, skip_first: as in :func:`scalelong_fast.kernels.concat.scale_concat_forward`.
        w_down, b_down, w_up, b_up: ``(H, N)``, ``(H)``, ``(N, H)``, ``(N)``.
        pooled: ``(B, N)``, or None: the skip is pooled here. Where it is given all forms are one launch, the same.
        form: ``two_launch``, ``single_launch`` or ``cooperative``.

    Returns:
        The concat, κ ``(B, N)``, the GAP ``(B, N)`` (None where it was given), and the pre-activation z ``(B, H)``;
        fp32 but for the concat.
    """
    batch, count = skip.shape[:2]
    hidden = w_down.shape[0]
    out = empty_in(concat_shape(x, skip, layout), layout, x)
    kappa = torch.empty(batch, count, dtype=torch.float32, device=x.device)
    z = torch.empty(batch, hidden, dtype=torch.float32, device=x.device)
    if batch == 0:
        return out, kappa, None if pooled is not None else torch.empty_like(kappa), z
    x, skip = in_layout(x, layout), in_layout(skip, layout)
    weights = dense(w_down), dense(b_down), dense(w_up), dense(b_up)
    of_x, of_skip = halves(x, skip, layout, skip_first)
    if pooled is None and form != "two_launch":
        gap = torch.empty_like(kappa)
        _one_launch(x, skip, weights, out, gap, kappa, z, of_x, of_skip, activation, layout, form)
        return out, kappa, gap, z

    gap = gap_of(skip, layout) if pooled is None else None
    config = config_for(config_name("ls_concat", layout), skip, contiguous_width(of_skip))
    block_n, block_p = _blocks(config, hidden)
    blocks_of_x = x_blocks(layout, block_n, block_p)
    steps, blocks = triton.cdiv(of_skip.positions, block_p), triton.cdiv(count, block_n)
    parts = parts_for(batch * blocks, steps)
    skip_programs = batch * parts * blocks
    block_h, se_block = se_blocks(hidden)
    with on_device(x):
        gated_concat_kernel[(skip_programs + tiles(of_x, batch, *blocks_of_x),)](
            x, skip, dense(pooled) if gap is None else gap, *weights, out, kappa, z,
            *_places(of_x, of_skip), hidden, triton.cdiv(steps, parts) * block_p, parts, skip_programs,
            ACTIVATION=ACTIVATION_IDS[activation], BLOCK_H=block_h, SE_BLOCK_N=se_block,
            X_BLOCK_N=blocks_of_x[0], X_BLOCK_P=blocks_of_x[1], **{**config.kwargs(), "BLOCK_N": block_n},
        )  # fmt: skip
    return out, kappa, gap, z


def _places(of_x: Half, of_skip: Half) -> tuple[int, ...]:
    """The kernels' arguments from N to x_offset."""
    return (
        of_skip.count, of_skip.positions, *of_skip.strides, *of_skip.out_strides, of_skip.offset,
        of_x.count, of_x.positions, *of_x.strides, *of_x.out_strides[1:], of_x.offset,
    )  # fmt: skip


def _one_launch(
    x: Tensor,
    skip: Tensor,
    weights: tuple[Tensor, ...],
    out: Tensor,
    gap: Tensor,
    kappa: Tensor,
    z: Tensor,
    of_x: Half,
    of_skip: Half,
    activation: str,
    layout: str,
    form: str,
) -> None:
    batch, hidden = z.shape
    config = config_for(config_name("ls_sample", layout), skip, contiguous_width(of_skip))
    block_n, block_p = _blocks(config, hidden)
    blocks_of_x = x_blocks(layout, block_n, block_p)
    block_h, se_block = se_blocks(hidden)
    tensors = (x, skip, *weights, out, gap, kappa, z)
    meta = {
        **config.kwargs(), "BLOCK_N": block_n, "BLOCK_H": block_h, "ACTIVATION": ACTIVATION_IDS[activation],
        "X_BLOCK_N": blocks_of_x[0], "X_BLOCK_P": blocks_of_x[1],
    }  # fmt: skip
    with on_device(x):
        if form == "single_launch":
            sample_concat_kernel[(batch,)](*tensors, *_places(of_x, of_skip), hidden, **meta)
            return
        resident = resident_programs(x)
        members = min(triton.cdiv(of_skip.count, block_n), resident)
        slots = min(batch, resident // members)
        arrived = torch.zeros(batch, dtype=torch.int32, device=x.device)
        if not INTERPRET.value:
            # Programs that wait for each other must all be running: the launch fails where they cannot.
            meta["launch_cooperative_grid"] = True
        cooperative_concat_kernel[(slots * members,)](
            *tensors, arrived, *_places(of_x, of_skip), hidden, batch, members, slots, SE_BLOCK_N=se_block, **meta
        )


def ls_concat_backward(
    grad_out: Tensor,
    grad_kappa: Tensor | None,
    skip: Tensor,
    kappa: Tensor,
    hidden: Tensor,
    pooled: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    pooled_given: bool,
    activation: str,
    layout: str,
    skip_first: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward of all but x, whose gradient is a slice of ``grad_out``.

    Where the skip was pooled here, its gradient κ · g + dgap / P needs dκ of the whole sample first. Two passes then
    read g, s (for dκ) and g again, and write once: 4 units of the skip's size. Writing κ · g in the first pass and
    adding dgap / P in a second would take 5, and round twice. Where pooled was given, one pass does both.

    Args:
        grad_out: gradient of the concat, any strides.
        grad_kappa: ``(B, N)`` fp32: gradient of the κ that was returned, or None.
        skip, w_down, b_down, w_up, b_up, activation, layout, skip_first: as in the forward.
        kappa, hidden, pooled: κ, z and GAP as the forward had them.
        pooled_given: the GAP was an argument.

    Returns:
        Gradients of the skip, of pooled (fp32, None where it was not given), and of w_down, b_down, w_up, b_up.
    """
    grad_out, skip = in_layout(grad_out, layout), in_layout(skip, layout)
    grad_gate = None if grad_kappa is None else dense(grad_kappa)
    grad_skip, partial = skip_backward(
        grad_out, skip, layout, skip_first, kappa=kappa if pooled_given else None, grad_gate=grad_gate
    )
    # The kernel adds a few parts itself; it is compiled anew for every number of them.
    partial = partial if partial.shape[0] <= 8 else partial.sum(0)
    grad_logit, grad_hidden, grad_pooled = se_backward(partial, kappa, hidden, w_down, w_up, activation)
    if not pooled_given:
        grad_skip, _ = skip_backward(
            grad_out, skip, layout, skip_first, kappa=kappa, reduce=False, grad_pooled=grad_pooled
        )
    dtypes = (w_down.dtype, b_down.dtype, w_up.dtype, b_up.dtype)
    grads = se_weight_grad(pooled, hidden, grad_logit, grad_hidden, activation, dtypes)
    return grad_skip, grad_pooled if pooled_given else None, *grads
