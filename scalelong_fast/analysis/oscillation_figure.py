"""The figure of oscillation during training (ScaleLong Fig. 1 and 12)."""

from typing import TYPE_CHECKING, Any

from scalelong_fast.analysis.statistics import Band

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_oscillation(
    figure: "Figure", records: dict[str, list[dict[str, Any]]], bands: dict[str, dict[str, Band]]
) -> None:
    """Features and gradients of the first seed over the steps, and the indices of all seeds.

    Args:
        figure: empty.
        records: of each scaling, one per seed.
        bands: of each index and scaling.
    """
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 3))
    features, gradients = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    for axes, what, label in (
        (features, "batch features", "batch r"),
        (gradients, "gradients", "‖∇‖"),
    ):
        for scaling, found in records.items():
            blocks = found[0][what]
            mean = [sum(row) / len(row) for row in blocks]
            axes.plot(found[0]["steps"], mean, linewidth=0.8, label=scaling)
        axes.set_ylabel(f"{label}, mean over blocks", fontsize="small")
    features.tick_params(labelbottom=False)
    gradients.set_xlabel("step")
    _draw_indices(figure.add_subplot(grid[:, 1]), bands)
    figure.suptitle("Oscillation during training (ScaleLong Fig. 1 and 12)")


def _draw_indices(axes: Any, bands: dict[str, dict[str, Band]]) -> None:
    """A bar for each index and scaling, as multiples of the first scaling's: their sizes differ by far."""
    scalings = list(next(iter(bands.values())))
    width = 0.8 / len(scalings)
    for number, scaling in enumerate(scalings):
        units = [found[scalings[0]].mean for found in bands.values()]
        own = [found[scaling] for found in bands.values()]
        axes.bar(
            [place + width * number for place in range(len(bands))],
            [b.mean / unit for b, unit in zip(own, units, strict=True)],
            width,
            yerr=[(b.high - b.mean) / unit for b, unit in zip(own, units, strict=True)],
            capsize=2,
            label=scaling,
        )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(
        [place + 0.4 - width / 2 for place in range(len(bands))], [what.replace(" ", "\n") for what in bands]
    )
    axes.tick_params(axis="x", labelsize="small")
    axes.set_ylabel(f"oscillation index, {scalings[0]} = 1, 95 % bands")
    axes.legend(fontsize="x-small")
