"""The self-attentions that ``python -m benchmarks attention`` times: shapes, backends, floors."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.op_variants import Variant
from scalelong_fast.errors import UserError
from scalelong_fast.models import ModelConfig, UViTConfig
from scalelong_fast.models.attention import attend, require_backend
from scalelong_fast.models.cpu_attention import kept_attention, recomputed_attention
from scalelong_fast.models.registry import PRESETS
from scalelong_fast.ops.examples import Example, example_gradients

DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.bfloat16, torch.float32)}
#: Images of a call; fewer where the logits of the check in float64 would take more than this.
BATCH = {"cuda": 128, "cpu": 2}
_LOGITS = 1 << 28
#: Presets whose shapes a CPU is given; a GPU is given those of all.
_ON_CPU = ("uvit_s2", "uvit_h2", "uvit_t2i_s2", "unet_cifar10", "unet_imagenet64")

_ATTENTION, _CPU_ATTENTION = "scalelong_fast/models/attention.py", "scalelong_fast/models/cpu_attention.py"


@dataclass(frozen=True)
class AttentionCase:
    """One self-attention, ``qkv`` (B, L, 3, H, d) to (B, L, H · d), as the joint projection leaves it.

    It is to :mod:`benchmarks.op_timing` what a :class:`~benchmarks.op_cases.Case` is.

    Attributes:
        model: a preset that has it.
        shape: (B, L, H, d).
        dtype: of q, k and v.
    """

    model: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype

    #: There is none: q, k and v come in the dtype of autocast.
    autocast = None

    def __str__(self) -> str:
        return f"attention {' × '.join(map(str, self.shape))} {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return self.shape[3] ** -0.5

    def example(self, device: torch.device, batch: int | None = None) -> Example:
        """Random arguments; ``batch`` replaces B."""
        own, length, heads, width = self.shape
        generator = torch.Generator().manual_seed(0)
        size = own if batch is None else batch
        qkv = torch.randn(size, length, 3, heads, width, generator=generator)
        return Example((qkv.to(device, self.dtype).requires_grad_(),), {})

    def grade(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs that get a gradient: all."""
        return outputs

    def cotangents(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Random gradients of the outputs."""
        return example_gradients(outputs)

    def reference(self) -> Callable[[Tensor], Tensor]:
        """The definition: products and softmax."""
        return functools.partial(_of_backend, scale=self.scale, backend="math")


def _of_backend(qkv: Tensor, scale: float, backend: str) -> Tensor:
    return attend(*qkv.unbind(2), scale, backend)


def _authors(qkv: Tensor, scale: float) -> Tensor:
    """As in the authors' released code: q, k and v raised to float32, and what comes of it in the dtype again."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).float().unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2).to(qkv.dtype)


def variants(case: AttentionCase, device: torch.device, example: Example) -> list[Variant]:
    """Every backend; those with an obstacle are listed too."""
    cpu = device.type == "cpu"

    def of(backend: str, obstacle: str | None = None) -> Variant:
        function = functools.partial(_of_backend, scale=case.scale, backend=backend)
        return Variant(backend, function, obstacle=obstacle, sources=(_ATTENTION,))

    low = case.dtype != torch.float32
    return [
        of("math"),
        Variant(
            "authors_fp32",
            functools.partial(_authors, scale=case.scale),
            obstacle=None if low else "the same as sdpa in float32",
            sources=("benchmarks/attention_cases.py",),
        ),
        of("sdpa"),
        of("xformers", _xformers_obstacle(case, device, example)),
        Variant(
            "cpu_op",
            functools.partial(recomputed_attention, scale=case.scale),
            obstacle=None if cpu else "for tensors on a CPU",
            sources=(_CPU_ATTENTION,),
        ),
        Variant(
            "cpu_kept",
            functools.partial(kept_attention, scale=case.scale),
            obstacle=None if cpu else "for tensors on a CPU",
            sources=(_CPU_ATTENTION,),
        ),
    ]


def _xformers_obstacle(case: AttentionCase, device: torch.device, example: Example) -> str | None:
    """Why xformers cannot take a case: it is optional, and has no kernel for some shapes, dtypes and devices."""
    try:
        require_backend("xformers")
    except UserError:
        return "not installed"
    if device.type == "cpu":
        return "takes no tensors on a CPU"
    try:
        _of_backend(*example.args, scale=case.scale, backend="xformers").sum().backward()
    except Exception as error:  # which kernel is missing is said in many ways
        return f"not supported: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
    finally:
        for tensor in example.tensors():
            tensor.grad = None
    return None


def attention_shapes(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(L, H, d) of the self-attentions of a network, the largest first."""
    if isinstance(config, UViTConfig):
        return [(config.num_tokens, config.num_heads, config.embed_dim // config.num_heads)]
    sides = {config.img_size >> level: width for level, width in enumerate(config.level_channels)}
    innermost = min(sides)
    found = []
    for side, width in sides.items():
        if side in config.attention_resolutions or side == innermost:  # the middle always has it
            heads = config.heads_of(width)
            found.append((side**2, heads, width // heads))
    return found


def cases(device: torch.device, presets: Mapping[str, ModelConfig] | None = None) -> list[AttentionCase]:
    """What is timed on a device: each shape once, under the first preset that has it, in each dtype.

    Args:
        device: where; a CPU is given few images.
        presets: configurations by name; None: those of the package, on a CPU some of them.
    """
    if presets is None:
        presets = PRESETS if device.type == "cuda" else {name: PRESETS[name] for name in _ON_CPU}
    shapes: dict[tuple[int, int, int], str] = {}
    for name, config in presets.items():
        for shape in attention_shapes(config):
            shapes.setdefault(shape, name)
    found = []
    for (length, heads, width), name in shapes.items():
        batch = min(BATCH[device.type], max(1, _LOGITS // (heads * length**2)))
        found += [AttentionCase(name, (batch, length, heads, width), dtype) for dtype in DTYPES[device.type]]
    return found


def total_flop(shape: tuple[int, int, int, int], direction: str) -> int:
    """FLOP of the products: two forward and four backward, the logits not computed anew."""
    batch, length, heads, width = shape
    product = 2 * batch * heads * length**2 * width
    return product * {"fwd": 2, "bwd": 4, "fwd_bwd": 6}[direction]


def total_bytes(case: AttentionCase, direction: str) -> int:
    """Bytes that must move: forward q, k, v and the output; backward these, its gradient and those of q, k and v.

    No logits: they need not leave the chip.
    """
    batch, length, heads, width = case.shape
    tensor = batch * length * heads * width * case.dtype.itemsize
    return tensor * {"fwd": 4, "bwd": 8, "fwd_bwd": 12}[direction]
