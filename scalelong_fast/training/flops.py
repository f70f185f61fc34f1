"""Floating-point operations of a training step, counted, and what a device could do in that time: MFU."""

import copy
import dataclasses
import functools
import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from scalelong_fast.models import ModelConfig, build_model


@functools.cache
def flops_per_image(config: ModelConfig) -> int:
    """FLOP of one image's forward and backward: matrix products, attention and convolutions, a multiply-add as two.

    Counted by PyTorch while the network runs on the meta device, where nothing is computed. These are the operations
    of the model: what is recomputed in the backward (by activation checkpointing, or by flash attention) does not
    count, nor do norms, activations and optimiser.

    Args:
        config: of a U-ViT or a UNet.
    """
    # Explicit attention has two products forward and four backward, and nothing that is computed twice.
    config = dataclasses.replace(config, attention="math", use_checkpoint=False)
    with torch.device("meta"):
        return count_flops(build_model(config))


def count_flops(model: torch.nn.Module) -> int:
    """FLOP of forward and backward of one image as the network runs them, custom ops and recomputation included.

    Args:
        model: a U-ViT or a UNet; a copy of it is moved to the meta device.
    """
    config = model.config
    model = copy.deepcopy(model).to("meta")
    x, times = torch.empty(1, *model.input_shape, device="meta"), torch.empty(1, device="meta")
    y = None
    if config.clip_dim > 0:
        y = torch.empty(1, config.num_clip_token, config.clip_dim, device="meta")
    elif config.num_classes > 0:
        y = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(x, times, y).sum().backward()
    return counter.get_total_flops()


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peak rates of a GPU, 10^12 FLOP/s of dense products (without structured sparsity) with sums in float32.

    Attributes:
        half: bf16 and fp16.
        tf32: float32 products rounded to TF32.
        fp32: float32 products.
        bf16: whether ``half`` holds for bf16 too.
    """

    half: float
    tf32: float
    fp32: float
    bf16: bool = True


#: From NVIDIA's data sheets and architecture whitepapers, by the part of the name that CUDA reports; the first match
#: counts. The sheets from Hopper and Ada on give rates with 2:4 sparsity, some of them no others; those are halved.
PEAKS: dict[str, Peak] = {
    "GB200": Peak(2500, 1250, 80),
    "B200": Peak(2250, 1125, 75),
    "GH200": Peak(990, 495, 67),
    "H200 NVL": Peak(835, 418, 60),
    "H200": Peak(989, 494, 67),
    "H100 PCIe": Peak(756, 378, 51),
    "H100 NVL": Peak(835, 418, 60),
    "H100": Peak(989, 494, 67),
    "H800 PCIe": Peak(756, 378, 51),
    "H800": Peak(989, 494, 67),
    "A100": Peak(312, 156, 19.5),
    "A800": Peak(312, 156, 19.5),
    "A40": Peak(150, 75, 37.4),
    "A30": Peak(165, 82, 10.3),
    "A10G": Peak(70, 35, 31.5),
    "A10": Peak(125, 62.5, 31.2),
    "A6000": Peak(155, 77.4, 38.7),
    "L40S": Peak(362, 183, 91.6),
    "L40": Peak(181, 90.5, 90.5),
    "L4": Peak(121, 60, 30.3),
    "RTX 5090": Peak(209.5, 104.8, 104.8),
    "RTX 4090": Peak(165.2, 82.6, 82.6),
    "RTX 3090": Peak(71, 35.6, 35.6),
    "V100 PCIe": Peak(112, 14, 14, bf16=False),
    "V100": Peak(125, 15.7, 15.7, bf16=False),
    "T4": Peak(65, 8.1, 8.1, bf16=False),
}

#: What else may stand in the name of a GPU with the rates of :data:`PEAKS`: words before them, form and memory after.
#: Anything else is another GPU (Laptop, Ti, D) or a slice of one (MIG, vGPU).
_BEFORE = r"(NVIDIA |Tesla |GRID |Quadro |GeForce |RTX )*"
_AFTER = r"( (SXM\d|PCIe|\d+GB?|HBM\d[a-z]?))*"


def peak_flops(device: torch.device | str, autocast: torch.dtype | None = None, tf32: bool = True) -> float | None:
    """Peak FLOP/s of a device in the dtype that a run's products have.

    Args:
        device: a CUDA device, or the name of a GPU.
        autocast: dtype of autocast, or None for float32.
        tf32: whether float32 products are rounded to TF32.

    Returns:
        FLOP/s, or None where it is not known: of CPUs, of GPUs that are not in :data:`PEAKS`, and of slices of one.
    """
    name = device
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(device)
    words = name.replace("-", " ").replace("_", " ")
    peak = next((peak for key, peak in PEAKS.items() if re.fullmatch(_BEFORE + key + _AFTER, words, re.I)), None)
    if peak is None or (autocast == torch.bfloat16 and not peak.bf16):
        return None
    rate = (peak.tf32 if tf32 else peak.fp32) if autocast is None else peak.half
    return rate * 1e12


def model_flops_utilisation(flop: int, images_per_second: float, peak: float | None, devices: int = 1) -> float | None:
    """MFU: the share of the devices' peak rate that the model's operations took; None where the peak is not known.

    Args:
        flop: of one image, see :func:`flops_per_image`.
        images_per_second: of all devices together.
        peak: FLOP/s of one device.
        devices: their number.
    """
    return None if peak is None else flop * images_per_second / (peak * devices)
