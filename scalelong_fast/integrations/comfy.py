"""Scaled long skips in ComfyUI, and whatever else calls output-block patches as ``(h, hsp, options) -> (h, hsp)``."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from scalelong_fast.errors import invalid
from scalelong_fast.scaling import LongSkipScaling, create_scaling

OutputBlockPatch = Callable[[Tensor, Tensor, dict[str, Any]], tuple[Tensor, Tensor]]


def output_block_patch(scaling: LongSkipScaling) -> OutputBlockPatch:
    """A patch that multiplies the long skip ``hsp`` of output block j = 0 … N−1 by κ_i, i = N − j.

    Args:
        scaling: of as many skips as the network has output blocks. Gates follow the features to their device.

    Returns:
        A function for ``set_model_output_block_patch``. It raises :class:`UserError` where the options do not say which
        output block it is, or one that ``scaling`` has no skip for.
    """

    def patch(h: Tensor, hsp: Tensor, transformer_options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        block = transformer_options.get("block")
        if not isinstance(block, tuple) or block[0] != "output" or not 0 <= block[1] < scaling.num_skips:
            raise invalid(
                "transformer_options['block']",
                block,
                f"('output', j) with j from 0 to {scaling.num_skips - 1}",
                "Build the scaling with num_skips = len(output_blocks).",
            )
        parameter = next(scaling.parameters(), None)
        if parameter is not None and parameter.device != hsp.device:
            scaling.to(hsp.device)
        return h, scaling(hsp, scaling.num_skips - block[1])

    return patch


def patch_model(model: Any, scaling: str = "cs", kappa: float | None = None) -> Any:
    """A clone of a ComfyUI model (``ModelPatcher``) whose long skips are scaled by constants.

    Args:
        model: what ComfyUI's loaders give; its UNet must have ``output_blocks``.
        scaling, kappa: a constant scaling, see :func:`~scalelong_fast.scaling.create_scaling`. Gates belong to one
            network, by their widths and by what they learned: hand them to :func:`output_block_patch`.

    Raises:
        UserError: a model without output blocks, or a scaling that is not constant.
    """
    blocks = getattr(getattr(model.model, "diffusion_model", None), "output_blocks", None)
    if not blocks:
        raise invalid("model", type(model.model).__name__, "a model with a UNet that has output_blocks")
    if scaling not in ("none", "uniform", "cs", "cs-reversed"):
        raise invalid("scaling", scaling, "none, uniform, cs or cs-reversed", "Gates: output_block_patch(scaling).")
    patched = model.clone()
    patched.set_model_output_block_patch(
        output_block_patch(create_scaling(scaling, num_skips=len(blocks), widths=1, kappa=kappa))
    )
    return patched
