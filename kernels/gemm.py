"""What the matrix products of the long skip share: order of tiles, κ by row, chunked stores, and facts for launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalelong_fast.kernels.common import dense, narrow


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column) of a tile, in bands of GROUP rows, so that neighbours in time share operands in L2."""
    per_band = GROUP * tiles_n
    first = tile // per_band * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % per_band % height, tile % per_band // height


@triton.jit
def load_kappa(kappa, row, tokens, batch_stride, token_stride):
    """κ of rows r = b · tokens + l in fp32, from a (B, L) view whose strides may be 0."""
    batch = (row // tokens).to(tl.int64)
    return tl.load(kappa + batch * batch_stride + row % tokens * token_stride).to(tl.float32)


@triton.jit
def halves(tile):
    """Left and right half of a tile's columns."""
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, half)), (0, 2, 1)))


@triton.jit
def store_tile(descriptor, tile, row, column, CHUNKS: tl.constexpr):
    """Round a tile and store it through a descriptor, in 1 or 2 column chunks: two need half the shared memory."""
    if CHUNKS == 1:
        descriptor.store([row, column], narrow(tile, descriptor.dtype))
    else:
        left, right = halves(tile)
        descriptor.store([row, column], narrow(left, descriptor.dtype))
        descriptor.store([row, column + tile.shape[1] // 2], narrow(right, descriptor.dtype))


#: Programs that a persistent or split kernel asks for in the interpreter, which has no processors to count.
INTERPRETER_PROGRAMS = 3


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU."""
    if not tensor.is_cuda:
        return INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def precision_of(tensor: Tensor) -> str:
    """``tf32`` where PyTorch's own fp32 products may use it, else ``ieee``."""
    allowed = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at a multiple of 16 bytes, as descriptors want it; a copy where it is not."""
    tensor = dense(tensor)
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
