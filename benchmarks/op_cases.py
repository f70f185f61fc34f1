"""The calls that ``python -m benchmarks ops`` and ``pytest benchmarks/`` time: op, shape, dtype, layout."""

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.unet_baselines import BASELINES
from benchmarks.unet_skips import UNET_BATCH, decoder_skips, unet_config
from scalelong_fast.models.unet_config import UNetConfig
from scalelong_fast.ops.examples import Example, example_arguments, example_gradients

#: In the order of what is wanted first, should time run out.
OPS = (
    "ls_skip_linear",
    "ls_scale_concat",
    "add_layer_norm_gap",
    "scale_concat_linear",
    "scale_concat",
    "layer_norm_gap",
    "se_gate",
    "scale_concat_group_norm",
    "scale_concat_conv1x1",
    "group_norm_gap",
    "channel_stats",
)
#: Of them, those that a UNet is made of, on images alone; and those that take one image, (B, C, H, W).
UNET_OPS = ("scale_concat_group_norm", "scale_concat_conv1x1", "group_norm_gap", "channel_stats")
ONE_IMAGE_OPS = ("group_norm_gap", "channel_stats")

#: (B, L, D) of U-ViT-S/2, M/4, L/4 and the text-to-image model.
GPU_ROWS = ((128, 257, 512), (128, 258, 768), (128, 258, 1024), (256, 334, 512))
#: (B, C_x, C_skip, H, W) of two decoder levels of the DDPM UNet for CIFAR-10.
GPU_IMAGES = ((128, 256, 128, 16, 16), (128, 128, 128, 32, 32))
#: What a CPU, or ``--reduced``, is given instead.
REDUCED_ROWS = ((16, 257, 256),)
REDUCED_IMAGES = ((16, 128, 64, 16, 16),)
#: (B, C_x, C_skip, H, W) for the ops of a UNet, a decoder level each of its ImageNet64 and CIFAR-10 presets; every
#: concat of their decoders is a case of :func:`decoder_cases` besides.
GPU_UNET_IMAGES = ((64, 320, 160, 64, 64), (128, 256, 128, 16, 16))
#: The UNet whose decoder a CPU is given: two levels, four long skips.
REDUCED_UNET = UNetConfig(img_size=16, model_channels=64, channel_mult=(1, 2), num_res_blocks=1)
REDUCED_UNET_BATCH = 8

_IMAGE_OPS = ("scale_concat", "ls_scale_concat")
_PRODUCT_OPS = ("scale_concat_linear", "ls_skip_linear")
_NORM_OPS = ("layer_norm_gap", "add_layer_norm_gap")
_POOLED_OPS = ("ls_scale_concat", "ls_skip_linear", "scale_concat_group_norm")
#: Outputs a loss depends on in the networks, where those are not all: κ is only looked at, m2 has no gradient.
_GRADED = {"ls_scale_concat": (0,), "ls_skip_linear": (0,), "group_norm_gap": (0, 1), "channel_stats": (0,)}


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        op: public name in :mod:`scalelong_fast.ops`.
        shape: as :data:`scalelong_fast.ops.examples.SHAPES` says.
        dtype: of the features, and of a Linear's weight and product.
        layout: ``rows``, ``planes`` (contiguous images) or ``pixels`` (channels_last).
        pooled: the GAP of the skip is handed over, as a U-ViT does, whose LayerNorm has it already; in
            ``scale_concat_group_norm`` the statistics of the skip, which a UNet's encoder has.
        stream: dtype of the residual stream where it differs: the product ops then run under autocast to ``dtype``,
            on inputs of dtype ``stream``, and the LayerNorm ops return ``dtype``.
        raw: ``scale_concat_group_norm`` returns the raw concat too, as a 1×1 shortcut reads it.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "rows"
    pooled: bool = False
    stream: torch.dtype | None = None
    raw: bool = False

    @property
    def name(self) -> str:
        """The op's name in results."""
        return self.op + "_pooled" * self.pooled + "_raw" * self.raw

    @property
    def dtype_name(self) -> str:
        """E.g. ``bfloat16``, or ``float32_to_bfloat16`` for a float32 stream and bfloat16 products."""
        names = [str(dtype).removeprefix("torch.") for dtype in (self.stream, self.dtype) if dtype is not None]
        return "_to_".join(names)

    @property
    def key(self) -> tuple[str, tuple[int, ...], str, str]:
        """What tells the case from others in results."""
        return self.name, self.shape, self.dtype_name, self.layout

    def __str__(self) -> str:
        shape = " × ".join(map(str, self.shape))
        layout = "" if self.layout == "rows" else f" {self.layout}"
        return f"{self.name} {shape}{layout} {self.dtype_name}"

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of the autocast that the call is made under, or None."""
        return self.dtype if self.stream is not None and self.op in _PRODUCT_OPS else None

    @property
    def graded(self) -> tuple[int, ...] | None:
        """Positions of the outputs that get a gradient; None: all."""
        return _GRADED.get(self.op)

    def example(self, device: torch.device, batch: int | None = None) -> Example:
        """Random arguments; ``batch`` replaces B."""
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        options: dict[str, Any] = {"channels_last": self.layout == "pixels"}
        dtype = self.dtype if self.autocast is None else self.stream
        if self.op in _NORM_OPS:
            options["stream_dtype"] = self.stream
        if self.op in _POOLED_OPS:
            options["pooled"] = self.pooled
        example = example_arguments(self.op, shape, dtype, device, **options)
        if self.raw:
            example.kwargs["return_concat"] = True
        return example

    def grade(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs that get a gradient."""
        return outputs if self.graded is None else tuple(outputs[i] for i in self.graded)

    def cotangents(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Random gradients of the outputs that get one."""
        return example_gradients(self.grade(outputs))

    def public(self) -> Callable[..., Any]:
        """The function of :mod:`scalelong_fast.ops`."""
        return getattr(importlib.import_module(f"scalelong_fast.ops.{self.op}"), self.op)

    def reference(self) -> Callable[..., Any]:
        """The op's definition in PyTorch."""
        return getattr(importlib.import_module(f"scalelong_fast.ops.{self.op}"), f"{self.op}_reference")

    def baseline(self) -> Callable[..., Any]:
        """What a user would write: the definition, or, where that does more than he would, a function of its own.

        It may return the first outputs alone.
        """
        return BASELINES.get(self.op) or self.reference()


def decoder_cases(device: torch.device, reduced: bool = False) -> dict[str, Counter[Case]]:
    """The concats of a UNet's decoder, norm and SiLU included, by model; each case with how often it occurs.

    The statistics of the skip are handed over and the raw concat is asked for, as in the networks.

    Args:
        device, reduced: as for :func:`cases`.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if device.type == "cpu" or reduced:
        models = {"UNet, reduced": (REDUCED_UNET, REDUCED_UNET_BATCH)}
    else:
        models = {name: (unet_config(name), batch) for name, batch in UNET_BATCH.items()}
    return {
        f"{name}, B {batch}": Counter(
            Case("scale_concat_group_norm", skip.shape(batch), dtype, "pixels", pooled=True, raw=True)
            for skip in decoder_skips(config)
        )
        for name, (config, batch) in models.items()
    }


def _unet_cases(op: str, images: tuple, dtype: torch.dtype) -> list[Case]:
    """Cases of one of :data:`UNET_OPS`, the decoders of whole models apart."""
    if op in ONE_IMAGE_OPS:  # of the skip: the encoder's feature
        images = tuple((batch, skip, *spatial) for batch, _, skip, *spatial in images)
    layouts = [(shape, "pixels") for shape in images] + [(images[-1], "planes")]
    found = [Case(op, shape, dtype, layout) for shape, layout in layouts]
    if op == "scale_concat_group_norm":
        found += [Case(op, images[0], dtype, "pixels", pooled=True)]
        found += [Case(op, images[-1], dtype, "planes", pooled=True, raw=True)]
    return found


def _cases_of(op: str, rows: tuple, images: tuple, dtype: torch.dtype, mixed: bool) -> list[Case]:
    if op == "se_gate":
        sizes = dict.fromkeys(shape[:2] for shape in rows)
        return [Case(op, shape, torch.float32) for shape in sizes]
    cases = [Case(op, shape, dtype) for shape in rows]
    if op == "ls_skip_linear":
        cases += [Case(op, shape, dtype, pooled=True) for shape in rows]
    if mixed and op in ("ls_skip_linear", "add_layer_norm_gap"):
        cases.append(Case(op, rows[0], torch.bfloat16, stream=torch.float32))
    if op in _IMAGE_OPS:
        cases += [Case(op, shape, dtype, "pixels") for shape in images]
        cases.append(Case(op, images[0], dtype, "planes"))
    return cases


def cases(device: torch.device, reduced: bool = False, ops: tuple[str, ...] = OPS) -> list[Case]:
    """What is timed on a device.

    Args:
        device: a CPU gets the reduced shapes in any case, in float32, and the product ops in bfloat16 too.
        reduced: small shapes on a GPU as well.
        ops: names of ops.
    """
    gpu = device.type == "cuda"
    small = reduced or not gpu
    dtype = torch.bfloat16 if gpu else torch.float32
    rows, images = (REDUCED_ROWS, REDUCED_IMAGES) if small else (GPU_ROWS, GPU_IMAGES)
    found = []
    for op in ops:
        if op in UNET_OPS:
            if op == "scale_concat_group_norm":
                found += [case for group in decoder_cases(device, reduced).values() for case in group]
            found += _unet_cases(op, REDUCED_IMAGES if small else GPU_UNET_IMAGES, dtype)
            continue
        found += _cases_of(op, rows, images, dtype, mixed=gpu)
        if not gpu and op in _PRODUCT_OPS:
            found.append(Case(op, REDUCED_ROWS[0], torch.bfloat16))
    return found
