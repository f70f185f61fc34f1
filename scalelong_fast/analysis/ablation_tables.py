"""What the paper's ablations compare: the networks of Tables 2, 3 and 4 and of Fig. 6 and 13."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from scalelong_fast.analysis.training import Training


@dataclass(frozen=True)
class Row:
    """One network of a table.

    Attributes:
        series: what varies, a line of the figure.
        point: its value, a place on the figure's axis.
        model: changes of the model's configuration.
        batch_size: images a step; None: that of the training.
        against: label of the row that it is compared with.
    """

    series: str
    point: str
    model: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    against: str | None = None

    @property
    def label(self) -> str:
        return f"{self.series}, {self.point}" if self.point else self.series


@dataclass(frozen=True)
class Table:
    """Networks that a table or figure of the paper compares.

    Attributes:
        name: stem of its files.
        reference: in the paper.
        title: what is compared.
        rows: the networks.
    """

    name: str
    reference: str
    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Variants:
    """The values that are compared where they are numbers.

    Attributes:
        reductions: r of LS (Table 2); the first is that of every other LS here.
        taus: τ of stable-tau (Table 3).
        kappas: of CS and reversed CS (Table 4).
        depths: of a U-ViT (Fig. 6); its batch sizes are that of the training, a half and a quarter, as in the paper.
        bases: κ of CS up to above 1 (Fig. 13).
    """

    reductions: tuple[int, ...] = (4, 8, 16)
    taus: tuple[float, ...] = (0.1, 0.3)
    kappas: tuple[float, ...] = (0.5, 0.7, 0.9)
    depths: tuple[int, ...] = (4, 12, 20)
    bases: tuple[float, ...] = (0.7, 0.9, 1.0, 1.1, 1.2, 1.3)


def table_2(training: Training, variants: Variants) -> Table:
    """Parts of LS, one changed at a time."""
    usual = f"reduction, r = {variants.reductions[0]}"
    ls = _scaled("ls", training, variants)
    compared = [("reduction", f"r = {r}", {"reduction": r}) for r in variants.reductions]
    compared += [("activation", name, {"activation": name}) for name in ("relu", "elu", "mish")]
    compared += [("module", name.upper(), {"calibration": name}) for name in ("se", "ie")]
    compared += [
        ("gate", name, {"scaling": scaling}) for name, scaling in (("shared", "ls"), ("individual", "ls-individual"))
    ]
    rows = []
    for series, point, changes in compared:
        model = ls | changes
        rows.append(Row(series, point, model, against=None if model == ls else usual))
    return Table("ablation-table-2", "ScaleLong Table 2", "parts of LS", tuple(rows))


def table_3(training: Training, variants: Variants) -> Table:
    """Scaling of the blocks' outputs instead of the long skips."""
    none = _scaled("none", training, variants)
    rows = [Row("none", "", none)]
    for tau in variants.taus:
        changes = {"block_scaling": "stable-tau", "block_tau": tau}
        rows.append(Row("stable-tau", f"τ = {tau:g}", none | changes, against="none"))
    rows.append(Row("rezero", "", none | {"block_scaling": "rezero"}, against="none"))
    rows += [Row(scaling, "", _scaled(scaling, training, variants), against="none") for scaling in ("cs", "ls")]
    return Table("ablation-table-3", "ScaleLong Table 3", "scaling of block outputs and of long skips", tuple(rows))


def table_4(training: Training, variants: Variants) -> Table:
    """Direction of the scaling."""
    rows = []
    for kappa in variants.kappas:
        point = f"κ = {kappa:g}"
        rows.append(Row("cs", point, {"scaling": "cs", "kappa": kappa}))
        reverse = {"scaling": "cs-reversed", "kappa": kappa}
        rows.append(Row("cs-reversed", point, reverse, against=f"cs, {point}"))
    return Table("ablation-table-4", "ScaleLong Table 4", "direction of the scaling", tuple(rows))


def figure_6(training: Training, variants: Variants) -> Table:
    """Batch size and depth; a UNet has no depth to vary."""
    rows = []
    sizes = [max(1, training.batch_size // part) for part in (4, 2, 1)]
    for scaling in training.scalings:
        model = _scaled(scaling, training, variants)
        for size in sizes:
            rows.append(_beside_none(scaling, f"batch {size}", model, size))
        for depth in variants.depths if training.depth is not None else ():
            rows.append(_beside_none(scaling, f"depth {depth}", model | {"depth": depth}, None))
    return Table("ablation-figure-6", "ScaleLong Fig. 6", "batch size and depth", tuple(rows))


def figure_13(training: Training, variants: Variants) -> Table:
    """κ up to above 1. At 1 CS is the plain long skip."""
    rows = []
    for base in variants.bases:
        model = {"scaling": "cs", "kappa": base} if base != 1 else _scaled("none", training, variants)
        rows.append(Row("cs", f"κ = {base:g}", model, against=None if base == 1 else "cs, κ = 1"))
    return Table("ablation-figure-13", "ScaleLong Fig. 13", "κ of CS below and above 1", tuple(rows))


#: By number, as the command line has them.
TABLES: dict[int, Callable[[Training, Variants], Table]] = {2: table_2, 3: table_3, 4: table_4}
FIGURES: dict[int, Callable[[Training, Variants], Table]] = {6: figure_6, 13: figure_13}


def _scaled(scaling: str, training: Training, variants: Variants) -> dict[str, Any]:
    """Changes that give a network the scaling with its usual options, the same wherever it appears."""
    if scaling.startswith("cs"):
        return {"scaling": scaling, "kappa": training.kappa}
    if scaling.startswith("ls"):
        gate = {"calibration": "se", "reduction": variants.reductions[0], "activation": "relu"}
        return {"scaling": scaling, **gate}
    return {"scaling": scaling}


def _beside_none(scaling: str, point: str, model: dict[str, Any], batch_size: int | None) -> Row:
    return Row(scaling, point, model, batch_size, against=None if scaling == "none" else f"none, {point}")
