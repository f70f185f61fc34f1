"""``python -m benchmarks uvit``: whole training steps of the published U-ViTs: what LS costs, fused and unfused."""

import argparse
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import model_steps
from benchmarks.authors_recipe import AuthorsStep, AuthorsUViT
from benchmarks.model_steps import StepBench, Suite
from benchmarks.op_variants import op_files
from benchmarks.report_uvit import REFERENCES, uvit_rows
from benchmarks.variants import STEP_SOURCES, UVIT_OPS
from scalelong_fast.integrations import load_uvit_checkpoint
from scalelong_fast.models import UViT, UViTConfig
from scalelong_fast.models.registry import model_config

#: Presets by the name they have in results.
MODELS = {"U-ViT-S/2": "uvit_s2", "U-ViT-M/4": "uvit_m4", "U-ViT-L/4": "uvit_l4"}
#: What a CPU is given instead: U-ViT-S/2 at a quarter of its width and depth.
REDUCED = {"embed_dim": 128, "depth": 4, "num_heads": 4}
BATCH = {"cuda": 128, "cpu": 16}


@dataclass(frozen=True)
class Recipe:
    """A way to train one of the models.

    Attributes:
        scaling: of the long skips.
        fused: the model's option; None: the authors' recipe.
        compiled: whether torch.compile may be used.
    """

    scaling: str
    fused: bool | None
    compiled: bool = True


#: ``none_cat`` is the price of a U-ViT without LS; ``ls_fused`` over it, and over ``none_fused``, is the LS tax.
RECIPES = {
    "none_cat": Recipe("none", fused=False),
    "ls_cat": Recipe("ls", fused=False),
    "none_fused": Recipe("none", fused=True),
    "ls_fused": Recipe("ls", fused=True),
    "authors": Recipe("ls", fused=None, compiled=False),
    "authors_compile": Recipe("ls", fused=None),
}


def training_flop(config: UViTConfig) -> int:
    """FLOP of one image's forward and backward: matrix products and attention, the backward twice the forward."""
    tokens, dim = config.num_tokens, config.embed_dim
    linear = 2 * tokens * dim * dim
    block = linear * (4 + 2 * config.mlp_ratio) + 4 * tokens * tokens * dim
    patches = 2 * 2 * tokens * dim * config.patch_size**2 * config.in_chans  # embedding and prediction
    return int(3 * ((config.depth + 1) * block + config.num_skips * 2 * linear + patches))


class Bench(StepBench):
    """Builds recipes of one U-ViT; arguments as for :class:`~benchmarks.model_steps.StepBench`."""

    def __init__(self, config: UViTConfig, device: torch.device, batch_size: int, compiled: bool):
        super().__init__(config, device, batch_size, compiled)
        self.unconditional = config.num_classes <= 0 and config.clip_dim == 0
        if self.unconditional:  # the authors' recipe can be built: all start from its weights
            self._weights = AuthorsUViT(dataclasses.replace(config, scaling="ls")).state_dict()
        else:
            self._weights = UViT(dataclasses.replace(config, scaling="ls")).state_dict()

    def build(self, recipe: Recipe) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """See :meth:`StepBench.build`."""
        return self._authors(recipe) if recipe.fused is None else super().build(recipe)

    def _authors(self, recipe: Recipe) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        model = AuthorsUViT(dataclasses.replace(self.config, scaling=recipe.scaling))
        model.load_state_dict(copy.deepcopy(self._weights))
        execution = self.execution(recipe.compiled)
        step = AuthorsStep(model.to(self.device), execution.autocast, execution.compiled)
        first = self.draws[0]
        count = 0

        def take() -> Tensor:
            nonlocal count
            count += 1
            return step(self.draws[count % len(self.draws)].x0)

        return take, lambda: step.loss(first.x0, first.u, first.noise).mean()

    def model(self, recipe: Recipe) -> UViT:
        """See :meth:`StepBench.model`."""
        return self._model(recipe.scaling, recipe.fused)

    def plain_model(self, scaling: str) -> UViT:
        """See :meth:`StepBench.plain_model`."""
        return self._model(scaling, fused=False)

    def _model(self, scaling: str, fused: bool) -> UViT:
        model = UViT(dataclasses.replace(self.config, scaling=scaling, fused=fused))
        weights = copy.deepcopy(self._weights)
        if self.unconditional:
            weights = {key: value for key, value in weights.items() if scaling == "ls" or not key.startswith("se.")}
            load_uvit_checkpoint(model, weights)
        else:
            own = model.state_dict().keys()
            model.load_state_dict({key: value for key, value in weights.items() if key in own})
        return model.to(self.device)


def recipe_sources(recipe: Recipe) -> tuple[str, ...]:
    """Files whose code a recipe's step runs, relative to the repository."""
    own = ("benchmarks/model_steps.py", "benchmarks/uvit.py")
    if recipe.fused is None:
        return ("benchmarks/authors_recipe.py", *own)
    files = {*STEP_SOURCES, *own}
    if recipe.scaling == "ls":
        files |= {"scalelong_fast/scaling/gates.py", "scalelong_fast/scaling/learnable.py"}
    else:
        files.add("scalelong_fast/scaling/constant.py")
    if recipe.fused:
        files |= {path for op in UVIT_OPS for path in op_files(op)}
    return tuple(sorted(files))


def _models(device: torch.device) -> Mapping[str, UViTConfig]:
    return model_steps.preset_models(MODELS, device, {"U-ViT-S/2, reduced": model_config("uvit_s2", **REDUCED)})


def _fields(bench: Bench, recipe: Recipe) -> dict[str, Any]:
    stream = "fp32" if recipe.fused is None else bench.config.residual_dtype
    return {"residual_dtype": stream, "fused": recipe.fused}


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--residual-dtype", choices=("fp32", "bf16"), default="fp32", help="default: fp32")


def _adjusted(label: str, config: UViTConfig, options: argparse.Namespace) -> tuple[str, UViTConfig]:
    stream = options.residual_dtype
    config = dataclasses.replace(config, residual_dtype=stream)
    return label if stream == "fp32" else f"{label}, bf16 stream", config


SUITE = Suite(
    command="uvit",
    description="Time whole training steps (forward, backward, AdamW, EMA) of the published U-ViTs: without scaling "
    "and with LS, with torch.cat and fused, all recipes of a model interleaved. On a CPU a small model stands in for "
    "all.",
    presets=MODELS,
    models=_models,
    batch_size=lambda label, device: BATCH[device.type],
    recipes=RECIPES,
    bench=Bench,
    flop=training_flop,
    sources=recipe_sources,
    references=lambda name: {reference: reference for reference in REFERENCES},
    fields=_fields,
    table=uvit_rows,
    # The authors' recipe as it is here is unconditional.
    able=lambda bench, recipe: bench.unconditional or recipe.fused is not None,
    add_options=_add_options,
    adjusted=_adjusted,
)


def main(
    args: Sequence[str],
    *,
    models: Mapping[str, UViTConfig] | None = None,
    names: Sequence[str] | None = None,
) -> int:
    """Run the command; returns the exit code. The keywords shrink the benchmark for tests."""
    return model_steps.run(SUITE, args, models=models, names=names)
