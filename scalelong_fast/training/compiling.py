"""What of the step torch.compile turns into one graph: nothing, each block, or forward and loss as a whole."""

import torch
from torch import nn

from scalelong_fast.errors import invalid
from scalelong_fast.training.blocks import repeated_blocks
from scalelong_fast.training.config import Compile

#: From how many parameters on ``auto`` compiles block by block. The time to compile the whole graph grows with the
#: depth, minutes for the deepest networks; that of the blocks does not.
BLOCKWISE_PARAMETERS = 60_000_000

#: Kinds of block that a process may compile. PyTorch's own limit of 8 is meant for one function whose inputs vary;
#: the stages of a UNet are a kind each wherever their widths differ.
KINDS_OF_BLOCK = 64


def choose_mode(compile_setting: Compile, model: nn.Module, sharded: bool = False, several: bool = False) -> Compile:
    """Resolve ``train.compile`` for a network; whether to compile at all is decided already.

    Args:
        compile_setting: what the run says; ``off`` stays.
        model: the network.
        sharded: whether the parameters are sharded block by block, which one graph of the whole cannot see through.
        several: whether several processes exchange gradients: those of one graph would all come at its end, while those
            of blocks are on their way as the backward goes on.

    Returns:
        ``off``, ``block``, ``whole`` or ``graphs``.

    Raises:
        UserError: ``whole`` or ``graphs`` of a sharded network, ``block`` of one without blocks.
    """
    blocks = bool(repeated_blocks(model))
    if compile_setting == "auto":
        big = sum(p.numel() for p in model.parameters()) >= BLOCKWISE_PARAMETERS
        return "block" if blocks and (big or sharded or several) else "whole"
    mode: Compile = "whole" if compile_setting == "on" else compile_setting
    if mode == "block" and not blocks:
        raise invalid("train.compile", mode, "whole or off for a network without repeated blocks")
    if sharded and mode in ("whole", "graphs"):
        raise invalid(
            "train.compile", mode, "block or off where the parameters are sharded", "Set --train.compile block."
        )
    return mode


def compile_objective(objective: nn.Module, mode: Compile) -> nn.Module:
    """Compile forward and loss; the backward comes with them.

    Nothing is compiled before the first call. Shapes are static: a batch of another shape compiles anew.

    Args:
        objective: a module with the network as ``model``; returns the loss.
        mode: ``off``; ``block``: each of :func:`repeated_blocks` that is more than a convolution in place, equal ones
            sharing one compilation, and what lies between them eagerly; ``whole``: one graph of everything; ``graphs``:
            the same, replayed as CUDA graphs, whose steps the caller announces with
            ``torch.compiler.cudagraph_mark_step_begin``.

    Returns:
        The module to call. Parameters keep their names in ``objective``.
    """
    if mode == "off":
        return objective
    if mode == "block":
        # Per process, since the limit is of the code that all blocks of a kind share.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, KINDS_OF_BLOCK)
        for block in repeated_blocks(objective.model):
            # A stage that is one convolution has nothing to be fused with: compiling it would take time alone.
            if len(list(block.parameters())) > 2:
                block.compile(fullgraph=True, dynamic=False)
        return objective
    if mode == "whole":
        return torch.compile(objective, fullgraph=True, dynamic=False)
    return torch.compile(objective, fullgraph=True, dynamic=False, mode="reduce-overhead")


def make_eager(model: nn.Module) -> None:
    """Undo what ``block`` did to the blocks of ``model``."""
    for block in repeated_blocks(model):
        block._compiled_call_impl = None
