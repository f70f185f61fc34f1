"""Which device, which precision, compiled or not."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from scalelong_fast.errors import UserError, invalid
from scalelong_fast.training.config import Compile, TrainConfig

#: Compiling costs about as much as a few hundred steps of a small model.
STEPS_THAT_REPAY_COMPILING = 500


@dataclass(frozen=True)
class Execution:
    """How a run is executed, resolved from the ``auto`` settings.

    Attributes:
        device: where model and data live.
        autocast: dtype of autocast, or None for float32 throughout.
        mode: what of the step is compiled, a :data:`~scalelong_fast.training.config.Compile`; ``off`` where nothing is.
            The step resolves ``auto`` for its network, see :func:`~scalelong_fast.training.compiling.choose_mode`.
        notes: lines for the user about what was not to be had.
    """

    device: torch.device
    autocast: torch.dtype | None
    mode: Compile = "off"
    notes: tuple[str, ...] = ()

    @property
    def compiled(self) -> bool:
        """Whether anything is compiled."""
        return self.mode != "off"

    def describe(self) -> str:
        precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[self.autocast]
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        ways = {"off": "eager", "block": "compiled block by block", "graphs": "compiled, CUDA graphs"}
        return f"{name}, {precision}, {ways.get(self.mode, 'compiled')}"


def resolve_execution(train: TrainConfig) -> Execution:
    """Resolve ``train.device``, ``train.precision`` and ``train.compile`` on this machine."""
    device = resolve_device(train.device)
    mode, notes = _mode(train, device)
    return Execution(device, autocast_dtype(train.precision, device), mode, notes)


def resolve_device(name: str, argument: str = "train.device") -> torch.device:
    """The device called ``name``; ``auto`` is the first GPU, else the CPU.

    Raises:
        UserError: no such device; the message names ``argument``.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise invalid(argument, name, "auto, cpu, cuda or cuda:<number>") from error
    if device.type not in ("cpu", "cuda"):
        raise invalid(argument, name, "auto, cpu, cuda or cuda:<number>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{argument}: got {name!r}, but {torch.cuda.device_count()} CUDA devices are visible.")
    return device


def cpu_has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices natively; emulation is slower than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Resolve ``train.precision`` on ``device``; None is float32 throughout."""
    if precision == "auto-gpu":
        precision = "fp32" if device.type == "cpu" else "auto"
    if precision == "auto":
        if device.type == "cuda":
            with torch.cuda.device(device):
                native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        return torch.bfloat16 if device.type == "cpu" and cpu_has_native_bf16() else None
    if precision == "fp16" and device.type == "cpu":
        raise invalid("train.precision", "fp16", "bf16 or fp32 on a CPU", "fp16 needs a GPU.")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def find_cxx_compiler() -> str | None:
    """Path of a C++ compiler that torch.compile can use on this machine, or None."""
    from torch._inductor import config

    candidates = config.cpp.cxx if isinstance(config.cpp.cxx, (tuple, list)) else (config.cpp.cxx,)
    return next((path for name in (*candidates, "g++", "clang++") if name and (path := shutil.which(name))), None)


def _mode(train: TrainConfig, device: torch.device) -> tuple[Compile, tuple[str, ...]]:
    if train.compile == "graphs" and device.type != "cuda":
        raise invalid("train.compile", "graphs", "auto, off, block or whole on a CPU", "CUDA graphs need a GPU.")
    if train.compile == "off" or (train.compile == "auto" and train.steps < STEPS_THAT_REPAY_COMPILING):
        return "off", ()
    if device.type == "cpu" and find_cxx_compiler() is None:
        return "off", ("No C++ compiler found: training eagerly, without torch.compile (install g++ to speed it up).",)
    return train.compile, ()


@contextmanager
def fp32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Say, inside, whether a GPU may round the factors of float32 products and convolutions to TF32.

    bf16 and fp16 products are none of this setting's business, nor is a CPU.

    Raises:
        UserError: the process has set PyTorch's newer ``fp32_precision``; the older settings can then not be read.
    """
    if device.type != "cuda":
        yield
        return
    # Not the newer ``fp32_precision``: where that is set, torch.compile fails as it reads the older settings (2.13).
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError as error:
        raise UserError(
            "train.tf32: this process has set fp32_precision of torch.backends, beside which the settings that "
            "torch.compile reads cannot be read. Leave it at 'none' and say --train.tf32 or --train.no-tf32."
        ) from error
    _set_tf32("high" if tf32 else "highest", tf32)
    try:
        yield
    finally:
        _set_tf32(*before)


def _set_tf32(matmul: str, convolutions: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions announce the newer settings
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions
