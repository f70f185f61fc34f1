"""Recomputing a block's activations in the backward instead of keeping them: all, or all but the costly ones."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

#: Ops whose results are kept under ``selective``: matrix products, attention and convolutions, which are most of a
#: block's time and less than half of its memory. Norms, activations and additions are cheap to make again. Attention by
#: ``xformers`` is no op of PyTorch's and is made again.
KEPT = {
    "aten": (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ),
    "scalelong_fast": ("ls_skip_linear", "scale_concat_linear", "cpu_linear", "cpu_attention"),
}


@functools.cache
def _kept_ops() -> frozenset[Any]:
    """The ops of :data:`KEPT`; those of this package are there once the networks are imported."""
    return frozenset(
        getattr(getattr(torch.ops, namespace), name).default for namespace, names in KEPT.items() for name in names
    )


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _kept_ops() else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def maybe_recomputed(block: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, recomputed in the backward where gradients are recorded.

    Args:
        block: whose ``use_checkpoint`` says what: False: nothing; True: all of it; ``selective``: all but the results
            of :data:`KEPT`.
        function: what of the block lies between what is kept.
        *args: its arguments, which are kept.
    """
    how = block.use_checkpoint
    if not how or not torch.is_grad_enabled():
        return function(*args)
    options: dict[str, Any] = {"context_fn": _contexts} if how == "selective" else {}
    # To draw the same random numbers again, the generators' states are copied to and fro: only where any are drawn.
    options["preserve_rng_state"] = any(_drops(layer) for layer in block.modules())
    return checkpoint(function, *args, use_reentrant=False, **options)


def _drops(layer: nn.Module) -> bool:
    return isinstance(layer, _DropoutNd) and layer.training and layer.p > 0
