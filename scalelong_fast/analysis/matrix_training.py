"""Matrix UNets (ScaleLong Eq. 3) that learn to predict the noise under a scaling of any kind, LS among them."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from scalelong_fast.analysis.matrix_unet import INITS, MatrixUNet, apply_block
from scalelong_fast.analysis.samples import check_dataset, draw_clean, open_samples
from scalelong_fast.analysis.training import DivergedError
from scalelong_fast.data import TrainingSet
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import check_range, invalid, unknown_name
from scalelong_fast.scaling import LongSkipScaling, create_scaling, resolve_scaling

#: Noisy images that no step of the training has.
PROBES = 64


@dataclass(frozen=True)
class MatrixTraining:
    """Which matrix UNets are trained.

    Attributes:
        dataset: data that they learn to denoise; an image of m numbers gives matrices of m × m.
        scalings: of the long skips, one network each. The gates of LS take the m numbers of a skip for m channels.
        kappa: base κ of ``cs`` and ``cs-reversed``; ``uniform`` has 1/√2.
        depth: 2N blocks beside the middle one, for N long skips.
        block_depth, init: see :class:`~scalelong_fast.analysis.MatrixUNet`.
        steps, batch_size: of the training, with Adam.
        seeds: one network of each scaling per seed; equal seeds begin with equal matrices and see equal batches.
    """

    dataset: str = "digits"
    scalings: tuple[str, ...] = ("none", "uniform", "cs", "ls")
    kappa: float = 0.7
    depth: int = 12
    block_depth: int = 1
    init: str = "norm-keeping"
    steps: int = 400
    batch_size: int = 8
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)

    def __post_init__(self) -> None:
        check_dataset(self.dataset)
        object.__setattr__(self, "scalings", tuple(resolve_scaling(name) for name in self.scalings))
        for name in ("scalings", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise invalid(f"--{name}", values, "at least one, each once")
        check_range("--steps", self.steps, low=4, integer=True)
        for name, value in (("--depth", self.depth), ("--batch-size", self.batch_size)):
            check_range(name, value, low=1, integer=True)
        if self.depth % 2:
            raise invalid("--depth", self.depth, "an even number: a block before and one after for each long skip")
        check_range("--block-depth", self.block_depth, low=1, integer=True)
        check_range("--kappa", self.kappa, low=0, low_open=True)
        if self.init not in INITS:
            raise unknown_name("init", self.init, INITS)
        for seed in self.seeds:
            check_range("--seeds", seed, low=0, integer=True)

    def key(self) -> dict[str, Any]:
        """What the result of one network depends on, beside its scaling and seed."""
        found = asdict(self)
        del found["scalings"], found["seeds"]
        return found

    @property
    def num_skips(self) -> int:
        """N."""
        return self.depth // 2


class ScaledMatrixUNet(MatrixUNet):
    """One matrix UNet whose κ_i come from a scaling, which may depend on the skip.

    Args:
        scaling: of N long skips, of width m where it has gates.
        width, block_depth, init, generator: see :class:`~scalelong_fast.analysis.MatrixUNet`; float32.
    """

    def __init__(
        self, scaling: LongSkipScaling, width: int, block_depth: int, init: str, *, generator: torch.Generator
    ):
        # The constants of the base class are those of no scaling.
        constants = (1.0,) * scaling.num_skips
        super().__init__(constants, width, block_depth, init, generator=generator, dtype=torch.float32)
        self.scaling = scaling

    def features(self, x: Tensor) -> list[Tensor]:
        """h_0 … h_N, each ``(1, B, m)``, of ``x`` ``(1, B, m)``; see :meth:`MatrixUNet.features`."""
        blocks, skips = self.weights.unbind(1), []
        for encoder in blocks[: self.num_skips]:
            x = apply_block(encoder, x)
            skips.append(x)
        h = [apply_block(blocks[self.num_skips], x)]
        for i in range(self.num_skips, 0, -1):
            scaled = self.scaling(skips[i - 1][0], i)[None]
            h.append(apply_block(blocks[self.num_skips + i], scaled + h[-1]))
        return h[::-1]


@dataclass(frozen=True)
class WatchedMatrices:
    """What an observer sees after a step.

    Attributes:
        step: finished steps.
        batch_features: root mean square of h_{N−1} … h_0 on the step's batch, before its update.
        gradients: ‖∇‖ of b_N … b_1 at this step.
        features: as ``batch_features``, on the probe and after the update.
        loss: on the probe, after the update.
    """

    step: int
    batch_features: list[float]
    gradients: list[float]
    features: list[float]
    loss: float


def train_matrices(
    training: MatrixTraining,
    scaling: str,
    seed: int,
    learning_rate: float,
    warmup: int,
    observe: Callable[[WatchedMatrices], None],
    every: int = 1,
) -> ScaledMatrixUNet:
    """Train one network to predict the noise and show it to ``observe``.

    Args:
        training: the networks.
        scaling, seed: of this one.
        learning_rate: of Adam, after ``warmup`` steps of linear growth.
        warmup: number of these steps.
        observe: called after every ``every``-th step and the last one.
        every: steps between calls.

    Raises:
        DivergedError: the loss became NaN or infinite, or a feature of the step's batch all 0, after which its blocks
            learn nothing more.
    """
    dataset = open_samples(training.dataset)
    width = math.prod(dataset.image_shape)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the gates' first weights; the matrices have the generator
    kappa = training.kappa if scaling.startswith("cs") else None
    coefficients = create_scaling(scaling, num_skips=training.num_skips, widths=width, kappa=kappa)
    net = ScaledMatrixUNet(coefficients, width, training.block_depth, training.init, generator=generator)
    alphas = create_schedule("vpsde").grid_alphas_cumprod().float()
    probe, probe_noise = _noisy(dataset, alphas, PROBES, torch.Generator().manual_seed(2**31 + seed))
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    growth = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)))
    for step in range(1, training.steps + 1):
        x, noise = _noisy(dataset, alphas, training.batch_size, generator)
        features = net.features(x)
        loss = (features[0] - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growth.step()
        if step % every and step != training.steps:
            continue
        sizes = _sizes(features)
        if not math.isfinite(loss.item()) or min(sizes) == 0:
            what = "became NaN or infinite," if min(sizes) > 0 else "died, one of its features being all 0,"
            raise DivergedError(
                f"A matrix UNet with scaling {scaling!r} and seed {seed} {what} seen at step {step}. Take a smaller "
                "--learning-rate, other --seeds or --block-depth 1.",
                step,
            )
        with torch.no_grad():
            seen = net.features(probe)
        gradients = net.weights.grad[0, training.num_skips + 1 :].flatten(1).double().norm(dim=1).flip(0).tolist()
        missed = (seen[0] - probe_noise).square().mean().item()
        observe(WatchedMatrices(step, sizes, gradients, _sizes(seen), missed))
    return net


def _noisy(dataset: TrainingSet, alphas: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_t and ε_t at random times, each ``(1, count, m)`` float32."""
    square = alphas[torch.randint(len(alphas), (count, 1), generator=generator)]
    x0 = draw_clean(dataset, count, generator).float().flatten(1)
    noise = torch.randn(x0.shape, generator=generator)
    return (square.sqrt() * x0 + (1 - square).sqrt() * noise)[None], noise[None]


def _sizes(features: list[Tensor]) -> list[float]:
    """Root mean square of h_{N−1} … h_0, of h_0 … h_N."""
    return [feature.detach().double().square().mean().sqrt().item() for feature in features[-2::-1]]
