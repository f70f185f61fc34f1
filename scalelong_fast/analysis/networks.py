"""A network for each scaling and seed, where an analysis compares them all and can do without none."""

import functools
from collections.abc import Callable
from typing import Any

from scalelong_fast.analysis.matrix_training import MatrixTraining
from scalelong_fast.analysis.progress import Progress
from scalelong_fast.analysis.sweep import Job, require_all, run_jobs
from scalelong_fast.analysis.training import DivergedError, Training, open_data
from scalelong_fast.analysis.units import Units
from scalelong_fast.errors import UserError


def unless_diverged(train: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """``train(*args)``, or the step at which the training was seen to have ``diverged``.

    A result like any other: the same network diverges again, so that it is kept and not tried again.
    """
    try:
        return train(*args)
    except DivergedError as error:
        return {"diverged": error.step}


def train_each(
    training: Training | MatrixTraining,
    key: dict[str, Any],
    compute: Callable[[str, int], dict[str, Any]],
    units: Units,
    progress: Progress,
    workers: int | None,
    mend: str = "Choose other --seeds or --scalings, or a larger --batch-size.",
) -> dict[str, list[Any]]:
    """What the network of each scaling and seed gives.

    Args:
        training: the networks.
        key: everything that a result depends on beside scaling and seed.
        compute: trains one, given both, and gives the result; picklable, see :class:`Job`.
        units, progress, workers: see :func:`run_jobs`.
        mend: says what to do about networks that diverge.

    Returns:
        By scaling, a result for each seed.

    Raises:
        UserError: the data cannot be opened, or networks diverged: all of them are named, and the others kept.
    """
    if isinstance(training, Training):
        open_data(training.config(training.scalings[0], training.seeds[0]))
    networks = [(scaling, seed) for scaling in training.scalings for seed in training.seeds]
    jobs = [
        Job(
            {**key, "scaling": scaling, "seed": seed},
            f"{scaling}, seed {seed}",
            functools.partial(unless_diverged, compute, scaling, seed),
        )
        for scaling, seed in networks
    ]
    results = require_all(run_jobs(jobs, units, progress, workers))
    pairs = list(zip(networks, results, strict=True))
    broken = [f"{s}, seed {n} (seen at step {found['diverged']})" for (s, n), found in pairs if "diverged" in found]
    if broken:
        raise UserError(
            f"{len(broken)} of {len(pairs)} networks diverged (a loss or gradient NaN or infinite, or a feature all "
            f"0): {'; '.join(broken)}. They would again. {mend}"
        )
    return {scaling: [found for (own, _), found in pairs if own == scaling] for scaling in training.scalings}
