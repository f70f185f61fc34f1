"""The training steps that are compared: the authors' recipe and ours, from equal weights."""

import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.authors_recipe import AuthorsStep, AuthorsUViT
from benchmarks.environment import source_hash
from benchmarks.op_variants import op_files
from scalelong_fast.data import ImageDataset, to_unit_range
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.integrations import load_uvit_checkpoint
from scalelong_fast.models import UViT, UViTConfig
from scalelong_fast.training.allocator import keep_freed_memory
from scalelong_fast.training.batches import BatchSource
from scalelong_fast.training.config import DataConfig, RunConfig, TrainConfig
from scalelong_fast.training.hardware import Execution, resolve_execution
from scalelong_fast.training.step import TrainStep

#: The model of the benchmark: the published CIFAR-10 U-ViT at half its width and depth.
MODEL = UViTConfig(img_size=32, patch_size=2, in_chans=3, embed_dim=256, depth=6, num_heads=8, scaling="ls")

SEED = 0
IMAGES = 2048

_AUTHORS = ("benchmarks/authors_recipe.py", "benchmarks/variants.py")
#: Ops that a fused U-ViT calls.
UVIT_OPS = ("add_layer_norm_gap", "layer_norm_gap", "ls_skip_linear", "scale_concat_linear", "se_gate")

#: What every step of ours runs, whatever its model.
COMMON_SOURCES = (
    "scalelong_fast/data/images.py",
    "scalelong_fast/data/order.py",
    "scalelong_fast/diffusion/loss.py",
    "scalelong_fast/diffusion/schedule.py",
    "scalelong_fast/models/attention.py",
    "scalelong_fast/models/cpu_attention.py",
    "scalelong_fast/models/cpu_linear.py",
    "scalelong_fast/models/embedding.py",
    "scalelong_fast/models/inputs.py",
    "scalelong_fast/models/long_skip.py",
    "scalelong_fast/plain.py",
    "scalelong_fast/scaling/base.py",
    "scalelong_fast/training/allocator.py",
    "scalelong_fast/training/ema.py",
    "scalelong_fast/training/hardware.py",
    "scalelong_fast/training/optim.py",
    "scalelong_fast/training/batches.py",
    "scalelong_fast/training/objective.py",
    "scalelong_fast/training/step.py",
)
#: What every step of a U-ViT runs, the ops apart.
STEP_SOURCES = (*COMMON_SOURCES, "scalelong_fast/models/layers.py", "scalelong_fast/models/uvit.py")
_OURS = ("benchmarks/variants.py", *STEP_SOURCES, *sorted({path for op in UVIT_OPS for path in op_files(op)}))
_OURS_LS = (*_OURS, "scalelong_fast/scaling/gates.py", "scalelong_fast/scaling/learnable.py")
_OURS_NONE = (*_OURS, "scalelong_fast/scaling/constant.py")

#: Hashes of the sources as they are imported: a file edited while a benchmark runs is not what it measures.
HASHES = {sources: source_hash(sources) for sources in (_AUTHORS, _OURS_LS, _OURS_NONE)}


@dataclass
class Variant:
    """One way to take a training step.

    Attributes:
        step: takes the next step, batch and randomness included.
        loss: ``(x0, t, noise)`` to the scalar loss, with the weights as they are now.
        scaling: of the long skips.
        dtype: fp32, bf16 or fp16, where mixed precision has it.
        compiled: whether torch.compile is used.
        sources: files whose code the step runs, relative to the repository.
    """

    step: Callable[[], Tensor]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    scaling: str
    dtype: str
    compiled: bool
    sources: tuple[str, ...]


class Workbench:
    """Builds variants on one device, from one set of weights and images.

    Args:
        device: where.
        model: size of the U-ViT; must be unconditional and have scaling ``ls``.
        batch_size: images a step.
    """

    def __init__(self, device: torch.device, model: UViTConfig = MODEL, batch_size: int = 32):
        self.device, self.config, self.batch_size = device, model, batch_size
        generator = torch.Generator().manual_seed(SEED)
        shape = (model.in_chans, model.img_size, model.img_size)
        images = torch.randint(0, 256, (IMAGES, *shape), dtype=torch.uint8, generator=generator)
        self.dataset = ImageDataset("random", images, None, 0, ())
        self.x0 = to_unit_range(images[:batch_size]).to(device)
        self.t = torch.rand(batch_size, generator=generator).to(device)
        self.noise = torch.randn(batch_size, *shape, generator=generator).to(device)
        torch.manual_seed(SEED)
        self.weights = AuthorsUViT(model).state_dict()

    def probe(self, variant: Variant) -> float:
        """The variant's loss on the fixed images, times and noise, with the weights as they are now."""
        return float(variant.loss(self.x0, self.t, self.noise).detach())

    def reference_loss(self, scaling: str) -> float:
        """The loss of the authors' recipe in float32, with LS or with plain skips."""
        step = AuthorsStep(self._authors_model(scaling))
        with torch.no_grad():
            return float(step.loss(self.x0, self.t, self.noise).mean())

    def authors(self, autocast: torch.dtype | None = None, compiled: bool = False) -> Variant:
        """The authors' recipe, with LS; their loader's work is not counted."""
        step = AuthorsStep(self._authors_model("ls"), autocast, compiled)
        images = to_unit_range(self.dataset.images).to(self.device).split(self.batch_size)[: IMAGES // self.batch_size]
        count = 0

        def take() -> Tensor:
            nonlocal count
            count += 1
            return step(images[count % len(images)])

        def loss(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
            return step.loss(x0, t, noise).mean()

        return Variant(take, loss, "ls", dtype_name(autocast), compiled, _AUTHORS)

    def ours(self, scaling: str = "ls", compiled: bool = True) -> Variant:
        """Our step with default settings, the drawing of the batch counted."""
        execution = self.execution(compiled)
        config = RunConfig(
            model=dataclasses.replace(self.config, scaling=scaling),
            data=DataConfig(name="cifar10", flip=True),
            train=self._train(compiled),
        )
        model = UViT(config.model)
        load_uvit_checkpoint(model, self._weights(scaling))
        step = TrainStep(model.to(self.device), create_schedule("vpsde").to(self.device), config, execution)
        batches = BatchSource(self.dataset, config, self.device)
        count = 0

        def take() -> Tensor:
            nonlocal count
            count += 1
            return step(count - 1, batches(count - 1))

        def loss(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
            return step.loss_fn(x0, noise, t, None)

        sources = _OURS_LS if scaling == "ls" else _OURS_NONE
        return Variant(take, loss, scaling, dtype_name(execution.autocast), execution.compiled, sources)

    def execution(self, compiled: bool = True) -> Execution:
        """How our default settings are carried out here."""
        return resolve_execution(self._train(compiled))

    def _train(self, compiled: bool) -> TrainConfig:
        return TrainConfig(
            batch_size=self.batch_size,
            betas=(0.99, 0.999),
            warmup_steps=2500,
            device=str(self.device),
            compile="on" if compiled else "off",
        )

    def _weights(self, scaling: str) -> dict[str, Tensor]:
        return {key: value for key, value in self.weights.items() if scaling == "ls" or not key.startswith("se.")}

    def _authors_model(self, scaling: str) -> AuthorsUViT:
        model = AuthorsUViT(dataclasses.replace(self.config, scaling=scaling))
        model.load_state_dict(copy.deepcopy(self._weights(scaling)))
        return model.to(self.device)


def as_trained(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Where the steps called ``name`` run: as our training loop has the memory, or, for the authors', left alone."""
    return nullcontext() if name.startswith("authors") else keep_freed_memory(device)


def dtype_name(autocast: torch.dtype | None) -> str:
    """fp32, bf16 or fp16."""
    return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[autocast]


#: Variants by the name they have in results and tables.
VARIANTS: dict[str, Callable[[Workbench], Variant]] = {
    "authors_fp32": lambda bench: bench.authors(),
    "authors_bf16": lambda bench: bench.authors(torch.bfloat16),
    "authors_compile_bf16": lambda bench: bench.authors(torch.bfloat16, compiled=True),
    "ours": lambda bench: bench.ours(),
    "ours_none": lambda bench: bench.ours("none"),
    "ours_eager": lambda bench: bench.ours(compiled=False),
}
