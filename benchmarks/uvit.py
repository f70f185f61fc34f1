"""``python -m benchmarks uvit``: whole training steps of the published U-ViTs: what LS costs, fused and unfused."""

import argparse
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import model_check, model_command, step_bench
from benchmarks.authors_recipe import AuthorsUViT
from benchmarks.model_check import Built, Errors
from benchmarks.model_steps import Suite, preset_models
from benchmarks.op_variants import op_files
from benchmarks.report_models import model_rows
from benchmarks.step_bench import StepBench
from benchmarks.variants import STEP_SOURCES, UVIT_OPS
from scalelong_fast.integrations import load_uvit_checkpoint
from scalelong_fast.integrations.checkpoints import convert_uvit_keys
from scalelong_fast.models import UViT, UViTConfig
from scalelong_fast.models.registry import model_config
from scalelong_fast.training.hardware import fp32_products

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


#: Kinds of recipes: the model's option ``fused``, None for the authors' recipe, and whether torch.compile may be used.
#: Those that matter most come first: there may not be time for all.
KINDS = {
    "eager": (False, False),
    "compile": (False, True),
    "ours_compile": (True, True),
    "ours": (True, False),
    "authors": (None, False),
    "authors_compile": (None, True),
}
#: ``ours_compile_ls`` over ``ours_compile_none`` is the LS tax.
RECIPES = {
    f"{kind}_{scaling}": Recipe(scaling, fused, compiled)
    for scaling in ("none", "ls", "cs")
    for kind, (fused, compiled) in KINDS.items()
}


def training_flop(config: UViTConfig) -> int:
    """FLOP of one image's forward and backward: matrix products and attention, the backward twice the forward."""
    tokens, dim = config.num_tokens, config.embed_dim
    linear = 2 * tokens * dim * dim
    block = linear * (4 + 2 * config.mlp_ratio) + 4 * tokens * tokens * dim
    patches = 2 * 2 * tokens * dim * config.patch_size**2 * config.in_chans  # embedding and prediction
    return int(3 * ((config.depth + 1) * block + config.num_skips * 2 * linear + patches))


def waken(weights: Mapping[str, torch.Tensor], seed: int = step_bench.SEED) -> dict[str, torch.Tensor]:
    """Weights of a U-ViT, theirs or ours by name, of a size at which all that it computes shows in what it predicts.

    A fresh U-ViT's are small: its blocks add next to nothing, the means that gates pool are nearly zero, and so all
    their coefficients nearly one half.
    """
    generator = torch.Generator().manual_seed(seed)
    woken = {}
    for name, weight in weights.items():
        values = torch.randn(weight.shape, generator=generator)
        if name == "pos_embed":  # with a mean of its own for each token, which is what gates see
            values += torch.randn(weight.shape[1], 1, generator=generator)
        elif weight.dim() == 1:
            values = weight + 0.1 * values
        elif not name.startswith("label_emb"):
            values *= weight[0].numel() ** -0.5
        woken[name] = values
    return woken


class Bench(StepBench):
    """Builds recipes of one U-ViT; arguments as for :class:`~benchmarks.step_bench.StepBench`."""

    def __init__(self, config: UViTConfig, device: torch.device, batch_size: int, compiled: bool):
        super().__init__(config, device, batch_size, compiled)
        self.has_authors = config.clip_dim == 0 and not config.mlp_time_embed
        if self.has_authors:  # all start from the weights of the authors' recipe
            self._weights = waken(AuthorsUViT(dataclasses.replace(config, scaling="ls")).state_dict())
        else:
            self._weights = waken(UViT(dataclasses.replace(config, scaling="ls")).state_dict())

    def autocast(self, recipe: Recipe) -> torch.dtype | None:
        """See :meth:`StepBench.autocast`."""
        return self.authors_autocast() if recipe.fused is None else super().autocast(recipe)

    def build(self, recipe: Recipe) -> Built:
        """See :meth:`StepBench.build`."""
        if recipe.fused is not None:
            return super().build(recipe)
        return self._authors(recipe, self.autocast(recipe))

    def check(self, name: str, recipe: Recipe, built: Built) -> Errors:
        """See :meth:`StepBench.check`.

        The authors' recipe is held to the plain model in float32, and under autocast to itself, eager: its narrow
        features cost its gradients more digits than ours lose.
        """
        if recipe.fused is not None:
            return super().check(name, recipe, built)
        exact, autocast = self.exact(recipe.scaling), self.autocast(recipe)
        eager = dataclasses.replace(recipe, compiled=False)
        with fp32_products(self.device, tf32=False):
            full = model_check.errors(model_check.outcome(self._authors(eager, None), None), exact)
        model_check.check(f"{name} in float32", full, Errors(0.0, 0.0))
        usual = model_check.errors(model_check.outcome(self._authors(eager, autocast), autocast), exact)
        own = model_check.errors(model_check.outcome(built, autocast), exact)
        model_check.check(name, own, usual)
        return own

    def _authors(self, recipe: Recipe, autocast: torch.dtype | None) -> Built:
        model = AuthorsUViT(dataclasses.replace(self.config, scaling=recipe.scaling))
        model.load_state_dict(self._own_weights(recipe.scaling))
        built = self.authors(model.to(self.device), recipe, autocast)
        return built._replace(renamed=lambda gradients: convert_uvit_keys(gradients, self.config.num_skips))

    def model(self, recipe: Recipe) -> UViT:
        """See :meth:`StepBench.model`."""
        return self._model(recipe.scaling, recipe.fused)

    def plain_model(self, scaling: str) -> UViT:
        """See :meth:`StepBench.plain_model`."""
        return self._model(scaling, fused=False)

    def _model(self, scaling: str, fused: bool) -> UViT:
        model = UViT(dataclasses.replace(self.config, scaling=scaling, fused=fused))
        if self.has_authors:
            load_uvit_checkpoint(model, self._own_weights(scaling))
        else:
            own = model.state_dict().keys()
            model.load_state_dict({key: value for key, value in self._weights.items() if key in own})
        return model.to(self.device)

    def _own_weights(self, scaling: str) -> dict[str, torch.Tensor]:
        """The released parameter names of a scaling; only LS has a gate."""
        weights = copy.deepcopy(self._weights)
        return {key: value for key, value in weights.items() if scaling == "ls" or not key.startswith("se.")}


def recipe_sources(recipe: Recipe) -> tuple[str, ...]:
    """Files whose code a recipe's step runs, relative to the repository."""
    own = ("benchmarks/step_bench.py", "benchmarks/step_calls.py", "benchmarks/uvit.py")
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


def flop(config: UViTConfig, direction: str) -> int:
    """FLOP of one image in a direction of :data:`~benchmarks.step_calls.DIRECTIONS`."""
    return training_flop(config) // (3 if direction == "fwd" else 1)


def _models(device: torch.device) -> Mapping[str, UViTConfig]:
    return preset_models(MODELS, device, {"U-ViT-S/2, reduced": model_config("uvit_s2", **REDUCED)})


def _fields(bench: Bench, recipe: Recipe) -> dict[str, Any]:
    stream = "fp32" if recipe.fused is None else bench.config.residual_dtype
    return {"residual_dtype": stream, "fused": recipe.fused}


def _able(bench: Bench, recipe: Recipe) -> bool:
    # Where nothing is compiled, those that would be are the same as the eager ones.
    return (bench.has_authors or recipe.fused is not None) and (bench.compiled or not recipe.compiled)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--residual-dtype", choices=("fp32", "bf16"), default="fp32", help="default: fp32")


def _adjusted(label: str, config: UViTConfig, options: argparse.Namespace) -> tuple[str, UViTConfig]:
    stream = options.residual_dtype
    config = dataclasses.replace(config, residual_dtype=stream)
    return label if stream == "fp32" else f"{label}, bf16 stream", config


SUITE = Suite(
    command="uvit",
    description="Time whole training steps (forward, backward, AdamW, EMA) of the published U-ViTs: without scaling "
    "and with LS and CS; the authors' recipe, plain PyTorch and our ops, each eager and compiled, all recipes of a "
    "model interleaved; forward, with backward, and the whole step. On a CPU a small model stands in for all.",
    presets=MODELS,
    models=_models,
    batch_size=lambda label, device: BATCH[device.type],
    recipes=RECIPES,
    bench=Bench,
    flop=flop,
    sources=recipe_sources,
    fields=_fields,
    table=model_rows,
    able=_able,
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
    return model_command.run(SUITE, args, models=models, names=names)
