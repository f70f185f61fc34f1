"""What extra noise at the input does to trained networks (ScaleLong Fig. 3c), and ‖b_i ∘ a_i‖ (Fig. 11)."""

import functools
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from scalelong_fast.analysis.composition import composition_norms
from scalelong_fast.analysis.finding import Finding
from scalelong_fast.analysis.networks import train_each
from scalelong_fast.analysis.paired import less_none, sign
from scalelong_fast.analysis.progress import Progress, silent
from scalelong_fast.analysis.statistics import Band, band
from scalelong_fast.analysis.training import Training, Watched, train_watched
from scalelong_fast.analysis.units import Units
from scalelong_fast.errors import check_range, invalid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What says how robust a network is, and what it is called. Its loss under noise does not: that depends as much on how
#: well it was trained.
COMPARED = {"increase": "rise of the loss", "amplification": "movement of the output"}


@dataclass(frozen=True)
class RobustnessSettings:
    """What is trained, and how it is disturbed.

    Attributes:
        training: the networks.
        levels: standard deviations c of the extra Gaussian noise, in the units of x_t.
        draws: of the extra noise, per level.
        checks: of ‖b_i ∘ a_i‖ during the training of a U-ViT, evenly spaced, the start not counted.
    """

    training: Training = field(default_factory=lambda: Training(batch_size=64, seeds=(0, 1, 2)))
    levels: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4)
    draws: int = 8
    checks: int = 4

    def __post_init__(self) -> None:
        if not self.levels or list(self.levels) != sorted(set(self.levels)):
            raise invalid("--levels", self.levels, "numbers that grow")
        for level in self.levels:
            check_range("--levels", level, low=0, low_open=True)
        check_range("--draws", self.draws, low=1, integer=True)
        check_range("--checks", self.checks, low=1, high=self.training.steps, integer=True)


SCALES = {
    "smoke": RobustnessSettings(
        Training(depth=4, steps=30, batch_size=16, seeds=(0, 1)), levels=(0.1, 0.4), draws=2, checks=1
    ),
    "digits": RobustnessSettings(),
}


def measure_robustness(settings: RobustnessSettings, scaling: str, seed: int) -> dict[str, Any]:
    """Train one network and disturb it.

    Returns:
        ``loss``: on the probe, undisturbed; ``losses``: under each level; ``amplification``: ‖UNet(x_t + δ) −
        UNet(x_t)‖ / ‖δ‖ at each level (mean over the probe): what Theorem 3.4 bounds; ``compositions``: of a U-ViT,
        ‖b_i ∘ a_i‖ by skip at each of ``steps`` (:func:`composition_norms`).
    """
    found: dict[str, Any] = {"steps": [], "compositions": []}

    def observe(watched: Watched) -> None:
        if norms := composition_norms(watched):
            found["steps"].append(watched.step)
            found["compositions"].append(norms)
        if watched.step == settings.training.steps:
            found.update(_disturb(watched, settings))

    train_watched(settings.training.config(scaling, seed), observe, settings.training.steps // settings.checks)
    return found


def _disturb(watched: Watched, settings: RobustnessSettings) -> dict[str, Any]:
    clean = watched.predict()
    losses, amplification = [], []
    for level in settings.levels:
        level_losses, ratios = [], []
        for draw in range(settings.draws):
            # On the CPU: the same noise for every network and level, on any device.
            generator = torch.Generator().manual_seed(draw)
            extra = level * torch.randn(watched.probe.x0.shape, generator=generator).to(clean.device)
            moved = watched.predict(extra)
            level_losses.append((moved - watched.probe.noise).square().mean().item())
            ratios.append(((moved - clean).flatten(1).norm(dim=1) / extra.flatten(1).norm(dim=1)).mean().item())
        losses.append(sum(level_losses) / len(level_losses))
        amplification.append(sum(ratios) / len(ratios))
    return {"loss": watched.loss(), "losses": losses, "amplification": amplification}


def analyze_robustness(
    settings: RobustnessSettings | None = None,
    units: Units | None = None,
    progress: Progress = silent,
    workers: int | None = 1,
) -> Finding:
    """Train a network of each scaling and seed, and compare what extra noise does to them.

    Args:
        settings: what to train.
        units: keeps what each network gave.
        progress: told about each network.
        workers: processes, see :func:`~scalelong_fast.analysis.sweep.run_jobs`.

    Raises:
        UserError: networks diverged.
    """
    settings, units = settings or RobustnessSettings(), units or Units()
    training = settings.training
    key = {"analysis": "robustness", **asdict(settings), "training": training.key()}
    compute = functools.partial(measure_robustness, settings)
    results: dict[str, list[dict[str, Any]]] = train_each(training, key, compute, units, progress, workers)
    for result in (result for found in results.values() for result in found):
        result["increase"] = [loss - result["loss"] for loss in result["losses"]]
    bands = {
        what: {scaling: _bands(found, what, len(settings.levels)) for scaling, found in results.items()}
        for what in ("losses", *COMPARED)
    }
    differences = {what: _differences(results, what, len(settings.levels)) for what in COMPARED}
    return Finding(
        "robustness",
        "ScaleLong Fig. 3c and 11",
        _sentence(settings, results, bands["amplification"], differences),
        asdict(settings),
        {"results": results, "bands": _as_dict(bands), "differences": _as_dict(differences)},
        lambda figure: _draw(figure, settings, bands, results),
    )


def _bands(results: list[dict[str, Any]], what: str, count: int) -> list[Band]:
    return [band([result[what][level] for result in results]) for level in range(count)]


def _differences(results: dict[str, list[dict[str, Any]]], what: str, count: int) -> dict[str, list[Band]]:
    """Each scaling less ``none`` at equal seeds, at each level."""
    levels = [less_none({s: [r[what][level] for r in found] for s, found in results.items()}) for level in range(count)]
    return {scaling: [found[scaling] for found in levels] for scaling in levels[0]}


def _as_dict(bands: dict[str, dict[str, list[Band]]]) -> dict[str, Any]:
    """JSON-ready."""
    return {what: {s: [b.as_dict() for b in own] for s, own in found.items()} for what, found in bands.items()}


def _sentence(
    settings: RobustnessSettings,
    results: dict[str, list[dict[str, Any]]],
    amplification: dict[str, list[Band]],
    differences: dict[str, dict[str, list[Band]]],
) -> str:
    training, level = settings.training, settings.levels[-1]
    losses = {
        scaling: (band([r["loss"] for r in found]).mean, band([r["losses"][-1] for r in found]).mean)
        for scaling, found in results.items()
    }
    listed = ", ".join(f"{clean:.3f} to {noisy:.3f} ({scaling})" for scaling, (clean, noisy) in losses.items())
    moved = ", ".join(f"{found[-1].mean:.2f} ({scaling})" for scaling, found in amplification.items())
    largest = _largest_compositions(results)
    changes = ", ".join(f"{found[0].mean:.2f} to {found[-1].mean:.2f} ({s})" for s, found in largest.items())
    compositions = f" During training max ‖b_i ∘ a_i‖ went from {changes} (Fig. 11)." if changes else ""
    shown = "; ".join(f"{called}: {_compare(differences[what])}" for what, called in COMPARED.items())
    against = f" Against none at equal seeds, {shown}." if differences["increase"] else ""
    return (
        f"{training.name}, {training.steps} steps, {len(training.seeds)} seeds: extra input noise of c = {level:g} "
        f"takes the loss from {listed} and moves the output by {moved} times its own norm "
        f"(ScaleLong Fig. 3c, Theorem 3.4).{compositions}{against}"
    )


def _compare(differences: dict[str, list[Band]]) -> str:
    """What the differences to ``none`` at the largest level show, in words."""
    said: dict[str, list[str]] = {}
    for scaling, found in differences.items():
        said.setdefault(sign(found[-1]), []).append(scaling)
    return ", ".join(f"{word} ({', '.join(scalings)})" for word, scalings in said.items())


def _largest_compositions(results: dict[str, list[dict[str, Any]]]) -> dict[str, list[Band]]:
    """M_0 = max_i ‖b_i ∘ a_i‖ over seeds at each check, by scaling; nothing of UNets."""
    return {
        scaling: [band([max(result["compositions"][check]) for result in found]) for check in range(len(steps))]
        for scaling, found in results.items()
        if (steps := found[0]["steps"])
    }


def _draw(
    figure: "Figure",
    settings: RobustnessSettings,
    bands: dict[str, dict[str, list[Band]]],
    results: dict[str, list[dict[str, Any]]],
) -> None:
    labels = {"losses": "loss", "amplification": "‖UNet(x + δ) − UNet(x)‖ / ‖δ‖"}
    largest = _largest_compositions(results)
    columns = 3 if largest else 2
    for place, (what, label) in enumerate(labels.items(), start=1):
        axes = figure.add_subplot(1, columns, place)
        for scaling, found in bands[what].items():
            axes.plot(settings.levels, [b.mean for b in found], marker=".", label=scaling)
            axes.fill_between(settings.levels, [b.low for b in found], [b.high for b in found], alpha=0.2)
        axes.set_xlabel("standard deviation of the extra noise")
        axes.set_ylabel(label)
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.suptitle("Robustness to extra input noise (ScaleLong Fig. 3c), mean and 95 % band")
    if not largest:
        return
    axes = figure.add_subplot(1, columns, columns)
    for scaling, found in largest.items():
        steps = results[scaling][0]["steps"]
        axes.plot(steps, [b.mean for b in found], marker=".", label=scaling)
        axes.fill_between(steps, [b.low for b in found], [b.high for b in found], alpha=0.2)
    axes.set_xlabel("step")
    axes.set_ylabel("max ‖b_i ∘ a_i‖ (Fig. 11)")
    axes.grid(True, alpha=0.3)
    axes.legend()
