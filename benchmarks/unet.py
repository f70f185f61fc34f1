"""``python -m benchmarks unet``: training steps of the UNets: plain, compiled and fused, and what scaling costs."""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import model_command, step_bench
from benchmarks.model_check import Built
from benchmarks.model_steps import Suite, preset_models
from benchmarks.op_variants import op_files
from benchmarks.report_models import model_rows
from benchmarks.step_bench import StepBench
from benchmarks.unet_skips import UNET_BATCH
from benchmarks.variants import COMMON_SOURCES
from scalelong_fast.models import UNet, UNetConfig
from scalelong_fast.models.registry import model_config

#: Presets by the name they have in results.
MODELS = {preset: preset for preset in UNET_BATCH}
#: What a CPU is given instead: unet_imagenet64 at half its image, two levels and a fifth of its width.
REDUCED = {"img_size": 32, "model_channels": 32, "channel_mult": (1, 2), "attention_resolutions": (16,)}
REDUCED_BATCH = 8

#: Ops that a fused UNet calls.
UNET_OPS = ("channel_stats", "group_norm_gap", "scale_concat", "scale_concat_conv1x1", "scale_concat_group_norm")

_UNET_SOURCES = (
    *COMMON_SOURCES,
    "scalelong_fast/models/unet.py",
    "scalelong_fast/models/unet_attention.py",
    "scalelong_fast/models/unet_blocks.py",
    "scalelong_fast/models/unet_norm.py",
)
_SCALING_SOURCES = {
    "ls": (
        "scalelong_fast/scaling/gates.py",
        "scalelong_fast/scaling/learnable.py",
        "scalelong_fast/scaling/width_adapters.py",
    ),
    "none": ("scalelong_fast/scaling/constant.py",),
    "cs": ("scalelong_fast/scaling/constant.py",),
}


@dataclass(frozen=True)
class Recipe:
    """A way to train one of the models.

    Attributes:
        kind: authors, authors_compile, eager, channels_last, compile, ours or ours_compile.
        scaling: of the long skips.
    """

    kind: str
    scaling: str

    @property
    def fused(self) -> bool:
        """The model's option."""
        return self.kind.startswith("ours")

    @property
    def compiled(self) -> bool:
        """Whether torch.compile may be used."""
        return self.kind.endswith("compile")

    @property
    def memory_format(self) -> torch.memory_format:
        """Of features and weights: the plain eager model is contiguous, as most are, and so is the authors'."""
        last = self.fused or self.kind in ("channels_last", "compile")
        return torch.channels_last if last else torch.contiguous_format


#: Plain, contiguous or in channels_last, in the authors' training step or in ours; compiled; and ours, eager and
#: compiled. ``ours_compile_ls`` over ``compile_none`` is the LS tax. The kinds that matter most come first: there may
#: not be time for all.
RECIPES = {
    f"{kind}_{scaling}": Recipe(kind, scaling)
    for scaling in ("none", "ls", "cs")
    for kind in ("eager", "compile", "ours_compile", "ours", "channels_last", "authors", "authors_compile")
}


def training_flop(config: UNetConfig) -> int:
    """FLOP of one image's forward and backward, as PyTorch counts them in the plain model."""
    return flop(config, "step")


@functools.cache
def flop(config: UNetConfig, direction: str) -> int:
    """FLOP of one image in a direction of :data:`~benchmarks.step_calls.DIRECTIONS`, as PyTorch counts them."""
    with torch.device("meta"):
        model = UNet(dataclasses.replace(config, scaling="none", fused=False, attention="math", use_checkpoint=False))
        x, times = torch.empty(1, *model.input_shape), torch.empty(1)
        y = torch.zeros(1, dtype=torch.int64) if config.num_classes > 0 else None
        if config.clip_dim > 0:
            y = torch.empty(1, config.num_clip_token, config.clip_dim)
        with FlopCounterMode(display=False) as counter:
            out = model(x, times, y)
            if direction != "fwd":
                out.sum().backward()
    return counter.get_total_flops()


def waken(model: nn.Module, seed: int = step_bench.SEED) -> nn.Module:
    """Give weights that start at zero random values of the size that the others have.

    A fresh UNet's last layers are zero: its output would be zero whatever happened before them, and nearly all of its
    gradients too.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and not weight.any():
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
    return model


class Bench(StepBench):
    """Builds recipes of one UNet; arguments as for :class:`~benchmarks.step_bench.StepBench`.

    Dropout is 0: its draws differ between a compiled and an eager model.
    """

    def __init__(self, config: UNetConfig, device: torch.device, batch_size: int, compiled: bool):
        super().__init__(dataclasses.replace(config, dropout=0.0), device, batch_size, compiled)
        self._weights = waken(UNet(dataclasses.replace(self.config, scaling="ls"))).state_dict()

    def model(self, recipe: Recipe) -> UNet:
        """See :meth:`StepBench.model`."""
        model = UNet(dataclasses.replace(self.config, scaling=recipe.scaling, fused=recipe.fused))
        own = model.state_dict().keys()
        model.load_state_dict(copy.deepcopy({key: value for key, value in self._weights.items() if key in own}))
        model.memory_format = recipe.memory_format
        return model.to(self.device, memory_format=recipe.memory_format)

    def autocast(self, recipe: Recipe) -> torch.dtype | None:
        """See :meth:`StepBench.autocast`."""
        return self.authors_autocast() if recipe.kind.startswith("authors") else super().autocast(recipe)

    def build(self, recipe: Recipe) -> Built:
        """See :meth:`StepBench.build`."""
        return (
            self.authors(self.model(recipe), recipe, self.autocast(recipe))
            if recipe.kind.startswith("authors")
            else super().build(recipe)
        )

    def plain_model(self, scaling: str) -> UNet:
        """See :meth:`StepBench.plain_model`."""
        return self.model(Recipe("eager", scaling))


def recipe_sources(recipe: Recipe) -> tuple[str, ...]:
    """Files whose code a recipe's step runs, relative to the repository."""
    own = ("benchmarks/step_bench.py", "benchmarks/step_calls.py", "benchmarks/unet.py")
    files = {*_UNET_SOURCES, *_SCALING_SOURCES[recipe.scaling], *own}
    if recipe.kind.startswith("authors"):
        files.add("benchmarks/authors_recipe.py")
    if recipe.fused:
        files |= {path for op in UNET_OPS for path in op_files(op)}
    return tuple(sorted(files))


def _fields(bench: Bench, recipe: Recipe) -> dict[str, Any]:
    last = recipe.memory_format == torch.channels_last
    return {"fused": recipe.fused, "memory_format": "channels_last" if last else "contiguous"}


def _models(device: torch.device) -> Mapping[str, UNetConfig]:
    reduced = {"unet_imagenet64, reduced": model_config("unet_imagenet64", **REDUCED)}
    return preset_models(MODELS, device, reduced)


SUITE = Suite(
    command="unet",
    description="Time whole training steps (forward, backward, AdamW, EMA) of the UNets: the plain model, contiguous "
    "and under autocast; the same in channels_last, eager and compiled; and ours, eager and compiled; each without "
    "scaling, with CS and with LS, all recipes of a model interleaved; forward, with backward, and the whole step. On "
    "a CPU a small model stands in for all.",
    presets=MODELS,
    models=_models,
    batch_size=lambda label, device: UNET_BATCH.get(label, REDUCED_BATCH) if device.type == "cuda" else REDUCED_BATCH,
    recipes=RECIPES,
    bench=Bench,
    flop=flop,
    sources=recipe_sources,
    fields=_fields,
    table=model_rows,
    # Where nothing is compiled, those that would be are the same as eager ones.
    able=lambda bench, recipe: bench.compiled or not recipe.compiled,
)


def main(
    args: Sequence[str],
    *,
    models: Mapping[str, UNetConfig] | None = None,
    names: Sequence[str] | None = None,
) -> int:
    """Run the command; returns the exit code. The keywords shrink the benchmark for tests."""
    return model_command.run(SUITE, args, models=models, names=names)
