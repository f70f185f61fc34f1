"""The paper's ablations: ablation."""

import dataclasses
from typing import TYPE_CHECKING

from scalelong_fast.cli.analyses.options import Analysis, TrainingOptions, given, with_training
from scalelong_fast.errors import unknown_name

if TYPE_CHECKING:
    from scalelong_fast.cli.analyses.options import Task


@dataclasses.dataclass(frozen=True)
class AblationArguments(TrainingOptions):
    """The paper's ablations, a table of ours for each of its tables and figures (ScaleLong Tables 2 to 4, Fig. 6, 13).
    Without --tables and --figures all of them."""

    scalings: tuple[str, ...] = ()
    """Scalings of Fig. 6; the tables and Fig. 13 have their own."""
    kappa: float | None = None
    """Base κ of CS in Table 3 and Fig. 6; Table 4 and Fig. 13 have their own."""
    tables: tuple[int, ...] = ()
    """Tables of the paper: 2 (parts of LS), 3 (block outputs), 4 (direction)."""
    figures: tuple[int, ...] = ()
    """Figures of the paper: 6 (batch size and depth), 13 (κ above 1)."""
    samples: int | None = None
    """Images that a Fréchet distance is of."""
    extractor: str | None = None
    """Network whose features are compared: auto (digits on digits, inception elsewhere), what evaluate takes, or none
    for the loss alone."""


def ablation(arguments: AblationArguments) -> "list[Task]":
    from scalelong_fast.analysis.ablation import SCALES, analyze_ablation
    from scalelong_fast.analysis.ablation_tables import FIGURES, TABLES

    for option, numbers, known in (("--tables", arguments.tables, TABLES), ("--figures", arguments.figures, FIGURES)):
        for number in numbers:
            if number not in known:
                raise unknown_name(option, str(number), map(str, known))
    settings = with_training(SCALES[arguments.scale], arguments)
    settings = dataclasses.replace(settings, **given(arguments, "samples", "extractor"))
    chosen = [TABLES[number] for number in arguments.tables] + [FIGURES[number] for number in arguments.figures]
    return [
        lambda units, progress, table=table: analyze_ablation(table, settings, units, progress, arguments.workers)
        for table in chosen or [*TABLES.values(), *FIGURES.values()]
    ]


ANALYSES = {
    "ablation": Analysis(
        "parts of LS, block outputs, direction, batch size, depth, κ > 1 (Tables 2 to 4, Fig. 6, 13)",
        AblationArguments,
        ablation,
    )
}
