"""Theorem 3.4 through training: both bounds beside what is measured, on the matrix UNet (ScaleLong Fig. 11)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scalelong_fast.analysis.finding import Finding
from scalelong_fast.analysis.matrix_unet import INITS, MatrixUNet
from scalelong_fast.analysis.progress import Progress, silent
from scalelong_fast.analysis.robust_bound import check_bound
from scalelong_fast.analysis.samples import check_dataset, draw_clean, open_samples
from scalelong_fast.analysis.units import Units
from scalelong_fast.data import TrainingSet
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import check_range, invalid, unknown_name
from scalelong_fast.scaling import create_scaling

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LipschitzSettings:
    """Which matrix UNets are trained to predict the noise, and how often the bounds are checked.

    Attributes:
        dataset, path, img_size: see :func:`~scalelong_fast.analysis.samples.open_samples`; an image of m numbers gives
            matrices of m × m.
        scalings: constant ones: ``none``, ``uniform``, ``cs``, ``cs-reversed``.
        kappa: base κ of the last two.
        skips: N.
        block_depth: matrices per block.
        init: see :class:`MatrixUNet`.
        steps, batch_size, lr: of Adam.
        checks: how often the bounds are checked, evenly spaced, the start not counted.
        inputs: noisy images that each check looks at.
        seeds: one network of each scaling per seed.
    """

    dataset: str = "digits"
    path: Path | None = None
    img_size: int | None = None
    scalings: tuple[str, ...] = ("none", "uniform", "cs")
    kappa: float = 0.7
    skips: int = 4
    block_depth: int = 2
    init: str = "norm-keeping"
    steps: int = 500
    batch_size: int = 64
    lr: float = 1e-3
    checks: int = 10
    inputs: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        check_dataset(self.dataset, "--dataset")
        for name in ("skips", "block_depth", "steps", "batch_size", "inputs"):
            check_range(f"--{name.replace('_', '-')}", getattr(self, name), low=1, integer=True)
        check_range("--checks", self.checks, low=1, high=self.steps, integer=True)
        check_range("--lr", self.lr, low=0, low_open=True)
        if self.init not in INITS:
            raise unknown_name("--init", self.init, INITS)
        for name in ("scalings", "seeds"):
            if not getattr(self, name):
                raise invalid(f"--{name}", getattr(self, name), "at least one")
        for scaling in self.scalings:
            self.kappas(scaling)

    def kappas(self, scaling: str) -> tuple[float, ...]:
        """κ_1 … κ_N of a constant scaling."""
        kappa = self.kappa if scaling.startswith("cs") else None
        found = getattr(create_scaling(scaling, num_skips=self.skips, widths=1, kappa=kappa), "kappas", None)
        if not isinstance(found, tuple):
            raise invalid("--scalings", scaling, "constant scalings: none, uniform, cs or cs-reversed")
        return found


SCALES = {
    "smoke": LipschitzSettings(skips=2, steps=20, checks=2, inputs=8, seeds=(0,)),
    "digits": LipschitzSettings(),
}


def _noisy(dataset: TrainingSet, alphas: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_t and ε_t at random times, each ``(1, count, m)`` float64."""
    square = alphas[torch.randint(len(alphas), (count, 1), generator=generator)]
    x0 = draw_clean(dataset, count, generator).double().flatten(1)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    return (square.sqrt() * x0 + (1 - square).sqrt() * noise)[None], noise[None]


def train_and_check(settings: LipschitzSettings, scaling: str, seed: int) -> list[dict[str, Any]]:
    """Train one network; a row for each check with ``step``, ``loss`` and the fields of :class:`BoundCheck`."""
    dataset = open_samples(settings.dataset, settings.path, settings.img_size)
    generator = torch.Generator().manual_seed(seed)
    width = dataset.image_shape[0] * dataset.image_shape[1] * dataset.image_shape[2]
    net = MatrixUNet(settings.kappas(scaling), width, settings.block_depth, settings.init, generator=generator)
    alphas = create_schedule("vpsde").grid_alphas_cumprod()
    held_out, _ = _noisy(dataset, alphas, settings.inputs, torch.Generator().manual_seed(2**31 + seed))
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.lr)
    every, rows, loss = settings.steps // settings.checks, [], None
    for step in range(settings.steps + 1):
        if step % every == 0 or step == settings.steps:
            check = check_bound(net, held_out, torch.Generator().manual_seed(seed))
            rows.append({"step": step, "loss": loss, **asdict(check), "paper_is_violated": check.paper_is_violated})
        if step < settings.steps:
            x, noise = _noisy(dataset, alphas, settings.batch_size, generator)
            error = (net(x) - noise).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            loss = error.item()
    return rows


def analyze_lipschitz(
    settings: LipschitzSettings | None = None, units: Units | None = None, progress: Progress = silent
) -> Finding:
    """Both bounds of Theorem 3.4 and the measured amplification through training; violations of either are listed."""
    settings, units = settings or LipschitzSettings(), units or Units()
    jobs = [(scaling, seed) for scaling in settings.scalings for seed in settings.seeds]
    key = {"analysis": "lipschitz", **asdict(settings)}
    del key["scalings"], key["seeds"]
    rows = []
    for done, (scaling, seed) in enumerate(jobs):
        progress(done, len(jobs), f"{scaling}, seed {seed}")
        own = {**key, "scaling": scaling, "seed": seed}
        found = units.get(own, lambda s=scaling, n=seed: train_and_check(settings, s, n))
        rows += [{"scaling": scaling, "seed": seed, **row} for row in found]
    violations = {
        "rigorous": [row for row in rows if row["measured"] > row["rigorous"]],
        "paper": [row for row in rows if row["paper_is_violated"]],
    }
    return Finding(
        "lipschitz",
        "ScaleLong Theorem 3.4, Fig. 11",
        _sentence(settings, rows, violations),
        asdict(settings),
        {"rows": rows, "violations": violations},
        lambda figure: _draw(figure, rows),
    )


def _sentence(settings: LipschitzSettings, rows: list[dict[str, Any]], violations: dict[str, Any]) -> str:
    nearest = min(row["paper"] / row["measured"] for row in rows)
    largest = max(row["largest_composition"] for row in rows)
    smallest = min(row["largest_composition"] for row in rows)
    rigorous = f"was violated {len(violations['rigorous'])} times" if violations["rigorous"] else "always held"
    paper = (
        f"was violated {len(violations['paper'])} times"
        if violations["paper"]
        else f"held too and was at least {nearest:.1f} times what was measured"
    )
    return (
        f"Theorem 3.4 on matrix UNets of {settings.skips} skips in {len(rows)} checks through training on "
        f"{settings.dataset}: the rigorous bound with ‖b_i‖‖a_i‖ {rigorous}; the paper's, with M_0 = max ‖b_i ∘ a_i‖ "
        f"between {smallest:.2f} and {largest:.2f} (Fig. 11), {paper}."
    )


def _draw(figure: "Figure", rows: list[dict[str, Any]]) -> None:
    bounds, norms = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for number, scaling in enumerate(dict.fromkeys(row["scaling"] for row in rows)):
        own = [row for row in rows if row["scaling"] == scaling]
        seed = own[0]["seed"]
        first = [row for row in own if row["seed"] == seed]
        steps, colour = [row["step"] for row in first], f"C{number}"
        for what, style in (("measured", "-"), ("paper", "--"), ("rigorous", ":")):
            bounds.plot(steps, [row[what] for row in first], style, color=colour, label=f"{scaling}, {what}")
        norms.plot(steps, [row["largest_composition"] for row in first], color=colour, label=scaling)
    bounds.set_yscale("log")
    bounds.set_ylabel("amplification and its bounds (Theorem 3.4)")
    bounds.legend(fontsize="x-small")
    norms.set_ylabel("M_0 = max ‖b_i ∘ a_i‖ (Fig. 11)")
    norms.legend()
    for axes in (bounds, norms):
        axes.set_xlabel("step")
        axes.grid(True, alpha=0.3)
