"""Everything a run is made of, as typed dataclasses; the command line overrides single fields."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scalelong_fast.data import list_training_sets
from scalelong_fast.diffusion import list_schedules, resolve_sampler
from scalelong_fast.errors import UserError, check_bool, check_range, invalid, unknown_name
from scalelong_fast.models import ModelConfig, UNetConfig, UViTConfig
from scalelong_fast.training.posthoc_profiles import check_sigma

#: Networks by the name that ``config.json`` has for them, under ``architecture``. Runs that lack it are older than the
#: second one.
ARCHITECTURES: dict[str, type[ModelConfig]] = {"uvit": UViTConfig, "unet": UNetConfig}
_OLDEST = "uvit"

#: What ``train.compile``, ``.recompute``, ``.precision`` and ``.parallel`` may say; the fields explain it.
Compile = Literal["auto", "off", "block", "whole", "graphs", "on"]
Recompute = Literal["none", "selective", "block"]
Precision = Literal["auto", "auto-gpu", "bf16", "fp16", "fp32"]
Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]


@dataclass(frozen=True)
class DataConfig:
    """Images to train on."""

    name: str = "digits"
    """Data set: digits (scikit-learn's 8x8 handwritten digits), cifar10, folder (any folder of images), packed (what
    scalelong-fast prepare wrote) or synthetic (made-up samples of the model's shapes, for benchmarks)."""
    path: Path | None = None
    """Where the data lies: needed for folder and packed, optional for cifar10."""
    flip: bool = False
    """Random horizontal flips; not of latents."""
    size: int = 50_000
    """synthetic: number of samples."""

    def __post_init__(self) -> None:
        if self.name not in list_training_sets():
            raise unknown_name("data.name", self.name, list_training_sets())
        check_range("data.size", self.size, low=1, integer=True)


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise process."""

    schedule: str = "vpsde"
    """vpsde (continuous time, as in the paper), ddpm, cosine or stable-diffusion (1000 discrete steps)."""
    beta_min: float = 0.1
    """vpsde: beta at t = 0."""
    beta_max: float = 20.0
    """vpsde: beta at t = 1."""
    label_dropout: float = 0.0
    """Share of labels replaced by the null class (the model's last label), or of captions by the empty one, for
    classifier-free guidance."""

    def __post_init__(self) -> None:
        if self.schedule not in list_schedules():
            raise unknown_name("diffusion.schedule", self.schedule, list_schedules())
        check_range("diffusion.beta_min", self.beta_min, low=0, low_open=True)
        check_range("diffusion.beta_max", self.beta_max, low=self.beta_min)
        check_range("diffusion.label_dropout", self.label_dropout, low=0, high=1, high_open=True)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = 100_000
    """Optimiser steps of the whole run."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 2e-4
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: float = 0.03
    """Decoupled weight decay; norms, biases and embeddings are spared."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """Step at which a cosine decay after the warm-up has reached final_lr; 0: constant. Independent of
    --train.steps, so that a run can be lengthened without changing its past."""
    final_lr: float = 0.0
    """Learning rate after decay_steps."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average of the weights, which is what samples are drawn from."""
    ema_profiles: tuple[float, ...] = ()
    """Post-hoc EMA: widths (sigma_rel in Karras et al. 2024) of power-function averages to follow besides, e.g. 0.05
    0.1; scalelong-fast ema then makes an average of any width after the training. Each takes the parameters' memory in
    fp32."""
    ema_snapshot_every: int = 0
    """Steps between stored copies of the averages of ema_profiles; 0: a 32nd of the run."""
    grad_clip: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    seed: int = 0
    """Seed of initialisation, data order, noise, times, flips and label dropout."""
    log_every: int = 100
    """Steps between metrics; only then does the host wait for the device."""
    save_every: int = 5000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept, newest first."""
    sample_every: int = 0
    """Steps between sample grids; 0: only at the end."""
    compile: Compile = "auto"
    """What torch.compile turns into one graph: block (each block of the network; starts fast), whole (forward and loss,
    and the backward with them), graphs (the same, replayed as CUDA graphs; GPUs only); on is whole. auto: whole, or
    block in big networks and in several processes (fsdp and hsdp take no other); where a compiler is found and the run
    has at least 500 steps to repay it."""
    recompute: Recompute = "none"
    """Activations made again in the backward, to save memory: selective (norms, activations and additions, for little
    time), block (all inside a block, for a forward more). The same gradients."""
    profile: int = 0
    """Steps to record with PyTorch's profiler after the first few: a table and a Chrome trace in the run folder's
    profile/; 0: none."""
    tf32: bool = True
    """Let a GPU round the factors of float32 products and convolutions to TF32; no matter in bf16 and fp16."""
    precision: Precision = "auto"
    """Autocast dtype; auto: bf16 where the hardware computes in it, else fp16 on a GPU and fp32 on a CPU; auto-gpu: the
    same on a GPU, fp32 on any CPU."""
    device: str = "auto"
    """auto (the first GPU, else the CPU), cpu, cuda, cuda:1, ..."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
    compat: bool = False
    """Follow the authors' released code where we deviate: decay every parameter, draw times independently instead of
    stratified over the batch."""
    parallel: Parallel = "auto"
    """How several processes (torchrun) share the work: ddp (each has the whole model), fsdp (each has a share of it),
    hsdp (shares within a machine, copies across machines); auto: ddp. Of no consequence in a run of one process."""
    accumulate: int = 1
    """Parts that a process takes its share of the batch in, one after the other: less memory, the same step."""
    timeout: float = 600.0
    """Seconds without progress after which the processes of a run give up on one that hangs."""
    async_save: bool = True
    """Write checkpoints while the training goes on; they need a copy of the state in the host's memory."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "keep_checkpoints", "accumulate"):
            check_range(f"train.{name}", getattr(self, name), low=1, integer=True)
        for name in ("warmup_steps", "decay_steps", "sample_every", "ema_snapshot_every", "profile"):
            check_range(f"train.{name}", getattr(self, name), low=0, integer=True)
        check_range("train.seed", self.seed, low=0, high=2**63 - 1, integer=True)
        check_range("train.lr", self.lr, low=0, high=10, low_open=True)
        check_range("train.final_lr", self.final_lr, low=0, high=self.lr)
        check_range("train.weight_decay", self.weight_decay, low=0)
        check_range("train.grad_clip", self.grad_clip, low=0)
        check_range("train.timeout", self.timeout, low=1, high=7 * 24 * 3600)
        check_range("train.ema_decay", self.ema_decay, low=0, high=1, high_open=True)
        for sigma in self.ema_profiles:
            check_sigma("train.ema_profiles", sigma)
        if len(set(self.ema_profiles)) != len(self.ema_profiles):
            raise invalid("train.ema_profiles", self.ema_profiles, "widths that differ")
        if len(self.betas) != 2:
            raise invalid("train.betas", self.betas, "two numbers in [0, 1)")
        for beta in self.betas:
            check_range("train.betas", beta, low=0, high=1, high_open=True)
        if 0 < self.decay_steps <= self.warmup_steps:
            raise invalid("train.decay_steps", self.decay_steps, f"more than train.warmup_steps = {self.warmup_steps}")
        choices = {"compile": Compile, "recompute": Recompute, "precision": Precision, "parallel": Parallel}
        for name, known in choices.items():
            if getattr(self, name) not in typing.get_args(known):
                raise unknown_name(f"train.{name}", getattr(self, name), typing.get_args(known))
        check_bool("train.tf32", self.tf32)
        if self.compile == "graphs" and self.accumulate > 1:
            # The parts' gradients would lie in the memory that the next replay writes to.
            raise invalid("train.compile", "graphs", "block or whole with train.accumulate > 1")


@dataclass(frozen=True)
class SampleConfig:
    """How samples are drawn, unless the sample command says otherwise."""

    sampler: str = "dpm-solver++"
    """ddim, dpm-solver++ or euler-maruyama."""
    steps: int | None = None
    """Steps of the sampler; default: 50, and 1000 of euler-maruyama as in the paper."""
    guidance: float = 1.0
    """Classifier-free guidance weight w: null + w (conditional - null); 1: none."""
    grid: int = 10
    """Images per label (or rows and columns, if unconditional) in the sample grid."""

    def __post_init__(self) -> None:
        resolve_sampler(self.sampler)
        if self.steps is not None:
            check_range("sample.steps", self.steps, low=1, high=1000, integer=True)
        check_range("sample.guidance", self.guidance, low=0)
        check_range("sample.grid", self.grid, low=1, high=100, integer=True)


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=UViTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        conditional = self.model.num_classes > 0 or self.model.clip_dim > 0
        if self.diffusion.label_dropout > 0 and not conditional:
            raise invalid(
                "diffusion.label_dropout",
                self.diffusion.label_dropout,
                "0 in a model without labels or text",
                "Set it to 0.",
            )
        if self.sample.guidance != 1 and self.diffusion.label_dropout == 0:
            raise invalid(
                "sample.guidance",
                self.sample.guidance,
                "1 in a run without label dropout, since the model then never learns the null class",
                "Set --diffusion.label-dropout 0.1 or --sample.guidance 1.",
            )
        if resolve_sampler(self.sample.sampler) == "euler-maruyama" and self.diffusion.schedule != "vpsde":
            raise invalid(
                "sample.sampler",
                self.sample.sampler,
                f"ddim or dpm-solver++ with diffusion.schedule {self.diffusion.schedule!r}",
                "Euler-Maruyama solves the differential equation of the schedule vpsde.",
            )

    @property
    def null_label(self) -> int | None:
        """Label of the null class (the last one), or None in a run without label dropout or without labels.

        A text-conditional model has no null label: its null condition is the features of the empty caption.
        """
        return self.model.num_classes - 1 if self.diffusion.label_dropout > 0 and self.model.num_classes > 0 else None

    @property
    def num_labels(self) -> int:
        """Labels that can be asked for: the null class is not one; 0 for an unconditional model."""
        return max(self.model.num_classes, 0) - (self.null_label is not None)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready nested dicts; that of a model also says of which ``architecture``."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            architecture = next((name for name, cls in ARCHITECTURES.items() if type(value) is cls), None)
            kind = {} if architecture is None else {"architecture": architecture}
            return kind | {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

    return plain(config)


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Rebuild a config of dataclass ``cls`` from :func:`to_dict`'s output; unknown fields are an error."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{where}{name}: a field this version of scalelong_fast does not know.")
        hint = hints[name]
        options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        if hint == ModelConfig:
            value = _model_from_dict(value, f"{where}{name}.")
        elif dataclasses.is_dataclass(hint):
            value = from_dict(hint, value, f"{where}{name}.")
        elif Path in options and value is not None:
            value = Path(value)
        elif typing.get_origin(hint) is tuple:
            value = tuple(value)
        arguments[name] = value
    return cls(**arguments)


def _model_from_dict(values: dict[str, Any], where: str) -> ModelConfig:
    """The config of a model, of the class that its ``architecture`` names."""
    values = dict(values)
    architecture = values.pop("architecture", _OLDEST)
    if architecture not in ARCHITECTURES:
        raise unknown_name(f"{where}architecture", architecture, ARCHITECTURES)
    return from_dict(ARCHITECTURES[architecture], values, where)


def changed_fields(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Fields in which two :func:`to_dict` outputs differ, as (dotted name, old, new).

    Where two models are of different architectures, that is all that is said of them: their fields are others.
    """
    changes: list[tuple[str, Any, Any]] = []
    keys = dict.fromkeys([*old, *new])
    for key in ["architecture"] if old.get("architecture") != new.get("architecture") else keys:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += changed_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            changes.append((f"{prefix}{key}", a, b))
    return changes
